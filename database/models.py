"""What crosses the wire. An Element has exactly the eleven published keys: existing clients build an object from all
of them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

from database.possible import LONGEST_DESIGN, NewRun, NewUsage, at_most

__all__ = [
    "Context",
    "Element",
    "ElementPage",
    "NewElement",
    "NewExperiment",
    "ParentChange",
    "PostedElement",
    "Result",
    "ScoredElement",
    "StoredExperiment",
    "Text",
    "TreeStructure",
]


def _storable(text: str) -> str:
    # Encoding is the quick way to look at every character.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("expected Unicode text, got a lone surrogate, which UTF-8 cannot say") from error
    return text


Text = Annotated[str, AfterValidator(_storable)]


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError(f"expected an integer, got {json.dumps(value)[:40]}")
    return value


WholeNumber = Annotated[int, BeforeValidator(_number)]
LONGEST_TABLE = 1 << 20
"""Characters of a result CSV that comes in: 70,000 columns of a step and its loss. No other request is served while a
row is read."""
WITHOUT_TIME = ("", "none")
_TIME = r"^(none|\d{4}-[01]\d-[0-3]\d[ T][0-2]\d:[0-5]\d:[0-5]\d)?$"
"""Of those that are read the plain ones: what a client should send."""


def read_time(text: str) -> str:
    """A date and time of ISO 8601 as UTC, YYYY-MM-DD HH:MM:SS; without a zone it is UTC. An empty one, or the "none"
    that it is stored as, stays.

    Raises:
        ValueError: it is none.
    """
    if text in WITHOUT_TIME:
        return text
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"expected UTC as YYYY-MM-DD HH:MM:SS, got {text[:40]!r}") from error
    return moment.isoformat(" ", "seconds")


Name = Annotated[Text, AfterValidator(at_most(LONGEST_DESIGN)), Field(json_schema_extra={"maxLength": LONGEST_DESIGN})]
_Table = Annotated[Text, AfterValidator(at_most(LONGEST_TABLE)), Field(json_schema_extra={"maxLength": LONGEST_TABLE})]


class Result(BaseModel):
    """Two CSV texts, each a header row and one data row; the first column is a row label."""

    train: Text = ""
    test: Text = ""


class NewElement(BaseModel):
    """An element before the store gives it an index. Whatever was stored once can be one."""

    time: Text = Field(description="UTC, YYYY-MM-DD HH:MM:SS", examples=["2025-07-01 12:00:00"])
    name: Text = Field(examples=["delta_net_gated_mix"])
    result: Result = Field(
        examples=[{"train": "step,1,100\nx,10.8,10.2\n", "test": "Model,arc_easy,piqa\nx,0.32,0.53\n"}]
    )
    program: Text
    motivation: Text
    analysis: Text
    cognition: Text
    log: Text
    parent: WholeNumber | None = Field(None, examples=[1])
    summary: Annotated[Text, BeforeValidator(lambda value: "" if value is None else value)] = ""

    def stored(self) -> NewElement:
        """This element as the store keeps it: an empty text becomes "none", an empty summary stays."""
        texts = ("time", "name", "program", "motivation", "analysis", "cognition", "log")
        return self.model_copy(update={key: "none" for key in texts if not getattr(self, key)})


class PostedResult(Result):
    train: _Table = ""
    test: _Table = ""


class PostedElement(NewElement):
    """A `NewElement` that a client sends: what no element has is refused."""

    time: Annotated[Text, AfterValidator(read_time)] = Field(
        description="UTC, YYYY-MM-DD HH:MM:SS; another form of ISO 8601 is brought to this one, an empty text is none",
        examples=["2025-07-01 12:00:00"],
        json_schema_extra={"pattern": _TIME},
    )
    name: Name = Field(examples=["delta_net_gated_mix"])
    result: PostedResult = Field(
        examples=[{"train": "step,1,100\nx,10.8,10.2\n", "test": "Model,arc_easy,piqa\nx,0.32,0.53\n"}]
    )


class Element(BaseModel):
    """The published element: exactly these eleven keys."""

    time: str
    name: str
    result: Result
    program: str
    motivation: str
    analysis: str
    cognition: str
    log: str
    parent: int | None
    index: int
    summary: str


class ScoredElement(Element):
    """An element and its score, 0 to 3; null when a term cannot be computed."""

    score: float | None


class ElementPage(BaseModel):
    """A page of elements by index. `next` is the `after` of the page that follows, null at the end."""

    elements: list[ScoredElement]
    next: int | None


class ParentChange(BaseModel):
    parent_index: WholeNumber | None


class NewExperiment(BaseModel):
    """One finished experiment: stored whole, once for each idempotency key."""

    model_config = ConfigDict(extra="forbid")

    idempotency_key: Annotated[Text, Field(min_length=1, max_length=200)]
    element: PostedElement
    run: NewRun
    usage: list[NewUsage] = Field([], max_length=1000, description="what calls of language models took on the way")

    @model_validator(mode="after")
    def _run_is_text(self) -> Self:
        try:
            self.run.model_dump_json()
        except ValueError as error:
            raise ValueError(f"the run record is not JSON: {error}") from error
        return self


class StoredExperiment(BaseModel):
    """Where an experiment was stored. `created` is False when its key was stored before."""

    index: int
    name: str
    score: FiniteFloat | None
    created: bool


class Context(BaseModel):
    """The relatives of a design with this parent: what the analysis compares with."""

    direct_parent: Element
    grandparent: Element | None
    strongest_siblings: list[Element]


class TreeStructure(BaseModel):
    """{success, data}: data is {trees, total_roots}, or one tree {element, children} when a root was asked for."""

    success: bool = True
    data: dict[str, Any]
