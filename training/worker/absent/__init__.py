"""Stands in the sandbox where a package would stand that candidates have no use for (training/bubblewrap.py)."""

raise ImportError("this package is not there for candidate programs; it scores them, in another process")
