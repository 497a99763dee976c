"""Analyse: analyzer, summarizer, and the question to the cognition base."""
