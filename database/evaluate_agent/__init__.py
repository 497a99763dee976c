"""The Model Judger and the fitness: what an element's measurements are worth, and how each part was obtained."""
