"""All hostile programs by name, run by test_sandbox_attacks.py. See hostile_attack.py."""

from __future__ import annotations

from tests.training.hostile_attack import Attack
from tests.training.hostile_reach import FILES, KERNEL, NETWORK, PROCESSES
from tests.training.hostile_resources import ENDS, LEFT_OVERS, RESOURCES

__all__ = ["FAST", "PROGRAMS"]

PROGRAMS: dict[str, Attack] = {**RESOURCES, **ENDS, **LEFT_OVERS, **FILES, **PROCESSES, **NETWORK, **KERNEL}
FAST = (
    "fork bomb",
    "fills the disk with many files",
    "exhausts inodes",
    "endless output on standard error",
    "closes its pipes and lives on",
    "a daemon after a double fork",
    "leaves shared memory, queues and semaphores",
    *FILES,
    *PROCESSES,
    *NETWORK,
    *KERNEL,
)
"""Those of the fast suite: all that look around, and one of each kind that uses something up."""
