"""The result of a request to a chat model: a reply, or a named error. Standard library only."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Reply:
    """The text that a chat model wrote, and its token counts."""

    text: str
    finish_reason: str  # "stop", or "length" if the token limit cut it off
    is_cached: bool
    input_tokens: int
    output_tokens: int


@dataclasses.dataclass
class Usage:
    """Requests, tokens and cost of a role since its usage was last read."""

    calls: int = 0  # requests sent and answered
    cached: int = 0  # replies from the cache, or shared with an identical request in flight
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float = 0.0
    seconds: float = 0.0  # summed over requests


class ApiError(RuntimeError):
    """A request failed. The subclasses say whether the run can go on or must stop."""


class MissingKeyError(ApiError):
    """The environment variable for the API key is not set."""


class ApiRefusedError(ApiError):
    """The server rejects the key or the model: no request can succeed."""


class SpendingCapError(ApiError):
    """The run has reached its spending cap."""


class OfflineMissError(ApiError):
    """The reply is not in the cache, and api.concurrency is 0: no requests."""


class ApiUnavailableError(ApiError):
    """All attempts failed, or the role's circuit breaker is open; a later request may succeed."""


class ApiRequestError(ApiError):
    """The server rejects this request, for instance its length; another one may succeed."""
