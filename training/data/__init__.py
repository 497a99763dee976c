"""Text, tokens, generated tasks and the packed training stream. Nothing here imports torch."""
