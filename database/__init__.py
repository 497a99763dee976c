"""The architecture database: the memory that pipelines share. A FastAPI service over SQLite or MongoDB, and its
client."""
