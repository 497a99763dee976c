"""The loop: sample, evolve, evaluate, analyse, update. Knows services and training only through their clients."""
