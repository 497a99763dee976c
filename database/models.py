"""What crosses the wire. An Element has exactly the eleven published keys: existing clients build an object from all
of them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

from common.records import Usage
from database.possible import NewRun

__all__ = [
    "Context",
    "Element",
    "ElementPage",
    "NewElement",
    "NewExperiment",
    "ParentChange",
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


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected an integer, got {str(value).lower()}")
    return value


WholeNumber = Annotated[int, BeforeValidator(_no_boolean)]


class Result(BaseModel):
    """Two CSV texts, each a header row and one data row; the first column is a row label."""

    train: Text = ""
    test: Text = ""


class NewElement(BaseModel):
    """An element before the store gives it an index."""

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
    element: NewElement
    run: NewRun
    usage: list[Usage] = Field([], max_length=1000, description="what calls of language models took on the way")

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
