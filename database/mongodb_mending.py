"""What a write left behind that was cut off between two documents: a stand-alone MongoDB server has no transactions.

Done under the lease: at every start, and by whoever gets it next. Documents of elements are whole by themselves; here
is what stands in one document about others, put right from them.
"""

from __future__ import annotations

from typing import Any

from pymongo.database import Database

from database.mongodb_counts import recount
from database.mongodb_documents import ELEMENTS
from database.mongodb_draft import Draft
from database.mongodb_session import MongoSession
from database.mongodb_state import BASELINES

__all__ = ["mend"]

_ORDER = "baselines"


def mend(database: Database[dict[str, Any]]) -> list[str]:
    """Puts it right; returns a line for each kind of thing that was broken."""
    # What is looked at first has to be right before anything is changed.
    counts = recount(database)
    draft = Draft(database)
    session = MongoSession(database, draft=draft)
    said = [
        _forgotten_vectors(database, session),
        _lost_candidates(session),
        _unlisted_baselines(database, session),
        _lost_parents(session),
    ]
    # Other servers over this store look again at what is gone.
    session.outdate_vectors()
    draft.send()
    return [*counts, *(line for line in said if line)]


def _forgotten_vectors(database: Database[dict[str, Any]], session: MongoSession) -> str:
    """Cut off after the embedding model was changed and before all others were marked as pending."""
    other = {"asi.vector.model": {"$exists": True, "$ne": session.state("model")}, "asi.pending": False}
    count = database[ELEMENTS].update_many(other, {"$set": {"asi.pending": True}}).modified_count
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


def _lost_parents(session: MongoSession) -> str:
    """Cut off while everything was being removed."""
    orphans = session.orphans()
    if not orphans:
        return ""
    session.set_parent(orphans, None)
    return f"{len(orphans)} elements whose parent does not exist are roots now"
