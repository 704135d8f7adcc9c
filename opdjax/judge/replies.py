"""What comes of a call: a reply, or one of the named errors. Nothing here needs the client's
packages.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a chat model wrote."""

    text: str
    finish_reason: str  # stop, or length where it was cut off
    is_cached: bool
    input_tokens: int
    output_tokens: int


@dataclasses.dataclass
class Usage:
    """What a role was asked since it was last counted."""

    calls: int = 0  # requests that were sent and answered
    cached: int = 0  # replies that were at hand
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float = 0.0
    seconds: float = 0.0  # of all requests together


class ApiError(RuntimeError):
    """Nobody answers, or nobody may be asked: the run stops and can be continued."""


class MissingKeyError(ApiError):
    """The environment variable that should hold the key is not set."""


class ApiRefusedError(ApiError):
    """The server refuses whoever asks, or knows no such model: no request can succeed."""


class SpendingCapError(ApiError):
    """What the run may cost is spent."""


class OfflineMissError(ApiError):
    """The reply is not in the cache, and nobody may be asked."""


class ApiUnavailableError(ApiError):
    """This request failed as often as it may be tried, or the role is taken for down; the next one
    may succeed.
    """


class ApiRequestError(ApiError):
    """The server refuses this one request, too long a context perhaps; another may succeed."""
