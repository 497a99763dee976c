"""What at least two packages need: settings, errors, records, processes, embeddings, LLM backends."""
