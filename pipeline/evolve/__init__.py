"""Evolve: planner, novelty checker, deduplication, code checker."""
