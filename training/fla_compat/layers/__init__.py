"""Stand-in for the package fla.layers, of which only `utils` is there."""
