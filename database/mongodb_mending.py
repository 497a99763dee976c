"""What a write left behind that was cut off between two documents: a stand-alone MongoDB server has no transactions.

Done under the lease: at every start, and by whoever gets it next. Documents of elements are whole by themselves; here
is what stands in one document about others, put right from them.
"""

from __future__ import annotations

import math
import time
from typing import Any

from pymongo.database import Database

from database.mongodb_counting import begin, step
from database.mongodb_draft import Draft
from database.mongodb_session import MongoSession
from database.mongodb_state import BASELINES

__all__ = ["mend"]

_ORDER = "baselines"


def mend(
    database: Database[dict[str, Any]], cut_off: bool = True, doubtful: bool = True, seconds: float = math.inf
) -> list[str]:
    """Puts it right; returns a line for each kind of thing that was broken.

    Args:
        cut_off: whether a write may have been; else only what is counted is counted anew.
        doubtful: see `database.mongodb_counting.begin`.
        seconds: for how long elements are counted. The rest is left to `database.mongodb_counting.step`.
    """
    until = time.monotonic() + seconds
    draft = Draft(database)
    session = MongoSession(database, draft=draft)
    said = begin(session, doubtful)
    if cut_off:
        said += [
            _forgotten_vectors(session),
            _lost_candidates(session),
            _unlisted_baselines(database, session),
        ]
        # Other servers over this store look again at what is gone.
        session.outdate_vectors()
    draft.send()
    counted = None
    while counted is None and time.monotonic() < until:
        counted = step(session)
        draft.send()
    return [line for line in [*said, *(counted or [])] if line]


def _forgotten_vectors(session: MongoSession) -> str:
    """Cut off after the embedding model was changed and before all others were marked as pending."""
    model = session.state("model")
    # Two ranges, which the index of the model has.
    others = [{"$type": "string"}] if model is None else [{"$lt": model}, {"$gt": model}]
    count = sum(
        session.change_elements({"asi.vector.model": other, "asi.pending": False}, {"$set": {"asi.pending": True}})
        for other in others
    )
    return f"{count} motivations are embedded again, by the model of now" if count else ""


def _lost_candidates(session: MongoSession) -> str:
    """Cut off after elements were removed and before the set was."""
    kept = [facts.index for facts in session.candidates()]
    lost = session.candidate_count() - len(kept)
    if not lost:
        return ""
    session.put_candidates(kept)
    return f"{lost} candidates that do not exist are no candidates any more"


def _unlisted_baselines(database: Database[dict[str, Any]], session: MongoSession) -> str:
    """Cut off after a baseline was kept and before it became the newest."""
    listed = session.state(_ORDER) or []
    stored = database[BASELINES].find({}, {"_id": 1, "revision": 1}).sort("revision", 1)
    missing = [row["_id"] for row in stored if row["_id"] not in listed]
    if not missing:
        return ""
    session.put_state(_ORDER, [*listed, *missing])
    return f"the baselines {', '.join(missing)[:200]} are the newest now"
