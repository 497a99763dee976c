"""How the rest of the system asks the cognition base."""

from __future__ import annotations

import time
from typing import Any, Self

import httpx
from pydantic import BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from common.errors import ServiceError

__all__ = ["CognitionClient", "Insight"]

FIX = "start it with python cognition_base/rag_api.py, or unset services.cognition_url to have one started"


class Insight(BaseModel):
    """One entry of one paper, as found. `score` is in [0, 1]; the six upper-case fields are texts of the corpus."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    score: FiniteFloat
    paper_key: str
    DESIGN_INSIGHT: str
    EXPERIMENTAL_TRIGGER_PATTERNS: str
    BACKGROUND: str
    ALGORITHMIC_INNOVATION: str
    IMPLEMENTATION_GUIDANCE: str
    DESIGN_AI_INSTRUCTIONS: str = ""


class CognitionClient:
    """Synchronous client, safe to share between threads.

    Args:
        url: address of the cognition base.
        timeout: seconds to wait for one answer.
        patience: seconds during which a server that is away or still starting is asked again.

    Raises, from every method:
        ServiceError: it does not answer, refuses the request, or answers with something unusable.
    """

    def __init__(self, url: str, timeout: float = 30.0, patience: float = 10.0) -> None:
        self.url = url.rstrip("/")
        self.patience = patience
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def search(self, query: str, k: int = 5, threshold: float = 0.6) -> list[Insight]:
        """The k best entries whose score is at least `threshold`, best first."""
        text = query.encode("utf-8", "replace").decode()
        answer = self._ask("POST", "/search", {"query": text, "k": k, "similarity_threshold": threshold})
        try:
            return TypeAdapter(list[Insight]).validate_python(answer["results"])
        except (KeyError, ValidationError) as error:
            raise ServiceError(f"unusable answer of {self.url}/search: {error}", FIX) from error

    def health(self) -> dict[str, Any]:
        """{status, service, stats}."""
        return self._ask("GET", "/health")

    def stats(self) -> dict[str, Any]:
        """{total_documents, unique_papers, index_name}."""
        return self._ask("GET", "/stats")

    def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        deadline = time.monotonic() + self.patience
        while True:
            try:
                answer = self._http.request(method, path, json=body)
            except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError) as error:
                if time.monotonic() > deadline:
                    raise ServiceError(f"no cognition base answers at {self.url}: {error}", FIX) from error
            except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as error:
                raise ServiceError(f"cannot ask the cognition base at {self.url}: {error}", FIX) from error
            else:
                if answer.status_code != 503 or time.monotonic() > deadline:
                    return self._value(answer)
            time.sleep(0.2)

    def _value(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            value = answer.json()
        except ValueError:
            value = None
        if answer.status_code == 200 and isinstance(value, dict):
            return value
        said = value["message"] if isinstance(value, dict) and "message" in value else answer.text[:300]
        raise ServiceError(f"{answer.request.url} answered {answer.status_code}: {said}", status=answer.status_code)
