"""Checks, trains and scores candidate programs. Candidate code runs only in training/worker, inside the sandbox."""
