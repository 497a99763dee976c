"""That the journal and the database tell the same story, before anything is added to either.

Not covered: stages of an experiment that were edited, and elements in the middle of a run that the database lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import JournalError, StoreError
from database.client import DatabaseClient
from pipeline.experiment import STAGES, Experiment
from pipeline.workspace import Workspace

__all__ = ["require_agreement", "require_unstored"]


def require_agreement(workspace: Workspace, experiments: Sequence[Experiment], database: DatabaseClient) -> None:
    """Compares what is stored with the journal, so that "finished" is true and no experiment is done twice.

    Raises:
        StoreError: the database lacks the first or the last element that the journal says are stored: it was lost, or
            restored from an older copy.
        JournalError: the database holds an experiment that the journal lacks.
    """
    _require_stored(workspace, experiments, database)
    ended = {one.number for one in experiments if one.state not in STAGES or one.read("evaluate")}
    following = max((one.number for one in experiments), default=0) + 1
    for number in sorted(set(range(1, following + 1)) - ended):
        require_unstored(workspace.experiment(number), database)


def _require_stored(workspace: Workspace, experiments: Sequence[Experiment], database: DatabaseClient) -> None:
    updates = [found for one in experiments if (found := one.read("update"))]
    updates.sort(key=lambda update: int(update["index"]))
    for update in updates[:1] + updates[-1:]:
        element = database.scored(update["index"])
        if element is None or element.name != update["name"]:
            raise StoreError(
                f"the journal in {workspace.experiments} says that {update['name']} is stored as element "
                f"{update['index']}, but the database {database.url} does not hold it: it was lost or replaced",
                "restore the database from a backup, or start over with another --data-dir; pipeline/report.py still "
                "shows what the journal holds",
            )


def require_unstored(experiment: Experiment, database: DatabaseClient) -> None:
    """Raises:
    JournalError: the database holds this experiment, whose folder is gone or was emptied.
    """
    stored = database.experiment(experiment.key)
    if stored is not None:
        raise JournalError(
            f"the database {database.url} holds element {stored.index} ({stored.name}), which experiment "
            f"{experiment.number} of this run stored, but its journal in {experiment.folder} is gone: it was removed",
            f"restore {experiment.folder} from a backup, or start over with another --data-dir; going on would train "
            "it a second time",
        )
