"""Evaluate: trainer and debugger."""
