"""The trusted side: verdicts, losses and benchmark scores, computed from the arrays that the worker returns."""
