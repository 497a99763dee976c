"""The architecture database as the pipeline sees it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from common.errors import ServiceError
from common.records import Baseline, RunRecord, Usage
from database.answers import EventPage
from database.models import Context, Element, ElementPage, NewElement, ScoredElement, StoredExperiment

__all__ = [
    "Context",
    "DatabaseClient",
    "Element",
    "ElementPage",
    "NewElement",
    "ScoredElement",
    "StoredExperiment",
]

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
_ELEMENTS = TypeAdapter(list[Element])
_SCORED = TypeAdapter(list[ScoredElement])
_RUNS = TypeAdapter(list[RunRecord])
_INDICES = TypeAdapter(list[int])
_LONGEST_QUERY = 60_000
_RETRY_STATUS = (502, 503, 504)
_PAUSES = (0.1, 0.3, 0.8, 2.0, 4.0)
_LONGEST_WAIT = 120
"""Seconds for which a request is repeated that the server asks to be repeated."""


class DatabaseClient:
    """Synchronous, thread-safe client. Unknown single things are None; everything else that goes wrong is a
    ServiceError.

    Calls that may be repeated without harm (reads, and writes with a key) are repeated while the server cannot be
    reached, for about 7 s, so a restart of the server is not noticed.

    Args:
        url: base URL, such as http://127.0.0.1:8001.
        timeout: seconds to wait for one answer.
        api_key: sent as a bearer token.
    """

    def __init__(self, url: str, timeout: float = 30.0, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0)), headers=headers, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # The service

    def health(self) -> dict[str, Any]:
        """Status and number of elements; asks once, without repeating."""
        return self._json("GET", "/health", repeat=False)

    def stats(self) -> dict[str, Any]:
        """The published statistics, what waits to be embedded or scored, and the candidate set."""
        return self._json("GET", "/v2/stats")

    # Writing

    def add_experiment(
        self, key: str, element: NewElement, run: RunRecord, usage: Sequence[Usage] = ()
    ) -> StoredExperiment:
        """Stores a finished experiment once, with what its calls of language models took: a repeated `key` answers as
        the first did, with created False.

        Raises:
            ServiceError: status 409: the key was used before for another program.
        """
        body = {
            "idempotency_key": key,
            "element": element.model_dump(mode="json"),
            "run": run.model_dump(mode="json"),
            "usage": [record.model_dump(mode="json") for record in usage],
        }
        return self._parse(StoredExperiment, self._json("POST", "/v2/experiments", body)["data"])

    def add_element(self, element: NewElement, key: str | None = None) -> int:
        """Stores an element without a run record and returns its index; with a `key`, once."""
        headers = {} if key is None else {"Idempotency-Key": key}
        answer = self._json(
            "POST", "/elements", element.model_dump(mode="json"), headers=headers, repeat=key is not None
        )
        return int(answer["data"]["index"])

    def add_candidate(self, index: int) -> None:
        """Puts an element into the candidate set; one that is in it stays, so this may be repeated."""
        self._json("POST", f"/candidates/{index}/add")

    def put_baseline(self, baseline: Baseline) -> None:
        """Keeps a baseline; what was measured against its key is scored again."""
        self._json("PUT", f"/v2/baselines/{quote(baseline.key, safe='')}", baseline.model_dump(mode="json"))

    def add_usage(self, records: Sequence[Usage], key: str) -> None:
        """Keeps what calls of a language model took, once for each `key`."""
        body = [record.model_dump(mode="json") for record in records]
        self._json("POST", "/v2/usage", body, headers={"Idempotency-Key": key})

    # Reading

    def element(self, index: int) -> Element | None:
        return self._one(Element, f"/elements/by-index/{index}")

    def scored(self, index: int) -> ScoredElement | None:
        """With its score, computed now if it was absent."""
        return self._one(ScoredElement, f"/elements/with-score/by-index/{index}")

    def experiment(self, key: str) -> StoredExperiment | None:
        """What `add_experiment` stored under this key; its score may not be computed yet."""
        return self._one(StoredExperiment, f"/v2/experiments/{quote(key, safe='')}")

    def by_name(self, name: str) -> list[Element]:
        """Oldest first."""
        return self._list(_ELEMENTS, f"/elements/by-name/{quote(name, safe='')}")

    def candidates(self) -> list[ScoredElement]:
        """The candidate set, best score first."""
        return self._list(_SCORED, "/candidates/all")

    def candidates_range(self, a: int, b: int, k: int) -> list[Element]:
        """k candidates at random, without repetition, from ranks a to b; fewer when there are fewer."""
        return self._list(_ELEMENTS, f"/candidates/sample-range/{a}/{b}/{k}")

    def top_k(self, k: int) -> list[Element]:
        """By benchmark mean, best first."""
        return self._list(_ELEMENTS, f"/elements/top-k/{k}")

    def search_similar(self, motivation: str, top_k: int = 5) -> list[Element]:
        """The elements with the nearest motivations, nearest first. Of a very long text only the first 60 kB count."""
        while len(quote(motivation)) > _LONGEST_QUERY:
            motivation = motivation[: len(motivation) * _LONGEST_QUERY // (len(quote(motivation)) + 1)]
        return self._list(_ELEMENTS, "/elements/search-similar", {"motivation": motivation, "top_k": top_k})

    def context(self, parent: int) -> Context | None:
        """The parent, its own parent, and its two children that have most children."""
        answer = self._optional(f"/elements/context/{parent}")
        return None if answer is None else self._parse(Context, answer["data"])

    def children(self, index: int) -> list[Element]:
        return self._list(_ELEMENTS, f"/elements/{index}/children")

    def path(self, index: int) -> list[Element]:
        """From the root down to the element."""
        return self._list(_ELEMENTS, f"/elements/{index}/path")

    def runs(self, index: int) -> list[RunRecord]:
        return self._list(_RUNS, f"/v2/elements/{index}/runs")

    def events(self, cursor: int = 0, limit: int = 100) -> EventPage:
        """Changes since `cursor`; `next` is the cursor to go on from."""
        return self._parse(EventPage, self._json("GET", f"/v2/events?after={cursor}&limit={limit}"))

    def with_fingerprint(self, fingerprint: str) -> list[int]:
        """Indices of the elements that compute the same function."""
        return self._list(_INDICES, f"/v2/fingerprints/{quote(fingerprint, safe='')}")

    def all_elements(self, cursor: int = 0, limit: int = 100) -> ElementPage:
        """A page of elements with scores, by index, from the one that follows `cursor`; `next` is the cursor after
        it."""
        return self._parse(ElementPage, self._json("GET", f"/v2/elements?after={cursor}&limit={limit}"))

    def baseline(self, key: str) -> Baseline | None:
        return self._one(Baseline, f"/v2/baselines/{quote(key, safe='')}")

    def score_details(self, index: int) -> dict[str, Any]:
        """Terms of the score, the judge's parts and how each was obtained, the evidence."""
        return self._json("GET", f"/v2/elements/{index}/score")

    # Plumbing

    def _one(self, model: type[M], path: str) -> M | None:
        answer = self._optional(path)
        return None if answer is None else self._parse(model, answer)

    def _list(self, adapter: TypeAdapter[list[T]], path: str, params: dict[str, str | int] | None = None) -> list[T]:
        try:
            return adapter.validate_python(self._json("GET", path, params=params))
        except ValidationError as error:
            raise self._unusable(path, str(error)) from error

    def _optional(self, path: str) -> Any:
        try:
            return self._json("GET", path)
        except ServiceError as error:
            if error.status == 404:
                return None
            raise

    def _parse(self, model: type[M], value: Any) -> M:
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise self._unusable(model.__name__, str(error)) from error

    def _json(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: dict[str, str | int] | None = None,
        headers: dict[str, str] | None = None,
        repeat: bool = True,
    ) -> Any:
        pauses = list(_PAUSES) if repeat else []
        until = time.monotonic() + _LONGEST_WAIT
        while True:
            try:
                answer = self._http.request(method, self.url + path, json=body, params=params, headers=headers)
            except (
                httpx.ConnectError,
                httpx.ConnectTimeout,
                httpx.RemoteProtocolError,
                httpx.ReadError,
                httpx.WriteError,
            ) as error:
                if not pauses:
                    raise ServiceError(
                        f"the architecture database at {self.url} does not answer: {error}",
                        "start it (python database/mongodb_api.py), or correct services.database_url",
                    ) from error
                time.sleep(pauses.pop(0))
                continue
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise ServiceError(
                    f"{method} {self.url}{path} failed: {type(error).__name__} {error}",
                    "look at the server's log, or raise services.timeout",
                ) from error
            after = answer.headers.get("Retry-After", "")
            if answer.status_code == 503 and after.isdigit() and repeat and time.monotonic() < until:
                # The server says that it will know: elements of a large store are counted at its start.
                time.sleep(min(int(after), _LONGEST_WAIT))
                continue
            if answer.status_code in _RETRY_STATUS and pauses:
                time.sleep(pauses.pop(0))
                continue
            return self._checked(method, path, answer)

    def _checked(self, method: str, path: str, answer: httpx.Response) -> Any:
        try:
            value = answer.json()
        except ValueError as error:
            raise self._unusable(path, answer.text[:200]) from error
        if answer.status_code >= 400:
            detail = value.get("detail") if isinstance(value, dict) else None
            said, _, fix = str(detail or answer.text[:300]).partition("\n  fix: ")
            raise ServiceError(
                f"{method} {self.url}{path} answered {answer.status_code}: {said}", fix, answer.status_code
            )
        return value

    def _unusable(self, what: str, said: str) -> ServiceError:
        return ServiceError(
            f"the architecture database at {self.url} gave an unusable answer for {what}: {said[:300]}",
            "make sure that services.database_url names an architecture database of this version",
        )
