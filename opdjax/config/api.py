"""Chat models that are asked over HTTP: where each is, how it answers, what it may cost. Standard
library only.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from opdjax.config.validation import require, require_types

RULE_JUDGE = "@rules"  # the built-in judge of the built-in task, in the run's own process

# Fields of an endpoint that say how it is reached and paid, and not what it answers.
TRANSPORT = (
    *("base_url", "api_key_env", "max_tokens_field", "timeout", "concurrency"),
    *("requests_per_minute", "tokens_per_minute", "input_price", "output_price"),
)


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """One role at the telephone: a model behind the OpenAI chat-completions protocol (vLLM, SGLang,
    Gemini, OpenAI ...).
    """

    # Such as http://127.0.0.1:8000/v1; @rules: the judge without a model, which knows sums; empty:
    # nobody has this role
    base_url: str = ""
    model: str = ""  # as the server calls it
    # The environment variable that holds the key; a key itself never stands in a config. Empty: the
    # server wants none
    api_key_env: str = ""
    temperature: float | None = None  # None: not sent, as some reasoning models want it
    top_p: float | None = None  # None: not sent
    seed: int | None = None  # None: not sent
    reasoning_effort: Literal["minimal", "low", "medium", "high"] | None = None  # None: not sent
    max_tokens: int = 8192  # of a reply
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = (
        "max_tokens"  # what the server calls it
    )
    # How an answer is made JSON: a schema that the server enforces, its JSON mode, or the prompt's
    # words alone
    output: Literal["json_schema", "json_object", "text"] = "json_schema"
    timeout: float = 120.0  # seconds a request may take
    concurrency: int = 32  # requests in flight
    requests_per_minute: int = 0  # 0: no limit
    tokens_per_minute: int = (
        0  # of prompts and replies, foreseen as characters / 4 and max_tokens; 0: no limit
    )
    input_price: float = 0.0  # dollars a million tokens of prompts
    output_price: float = 0.0  # dollars a million tokens of replies

    def __post_init__(self):
        require_types(self, "endpoint.")
        require(
            bool(self.base_url) == bool(self.model),
            "endpoint.model",
            self.model,
            "a name where base_url is given, and only there",
        )
        is_address = self.base_url in ("", RULE_JUDGE) or self.base_url.startswith(
            ("http://", "https://")
        )
        require(
            is_address,
            "endpoint.base_url",
            self.base_url,
            f"an address that starts with http:// or https://, or {RULE_JUDGE}",
        )
        # Would be a key: letters and figures of a variable's name are upper case in every system's
        # habit.
        is_name = not self.api_key_env or (
            self.api_key_env.isidentifier() and self.api_key_env.isupper()
        )
        require(
            is_name,
            "endpoint.api_key_env",
            "***",
            "the NAME of an environment variable, in capital letters, never the key itself",
        )
        require(
            self.temperature is None or self.temperature >= 0,
            "endpoint.temperature",
            self.temperature,
            "0 or more",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            "endpoint.top_p",
            self.top_p,
            "more than 0 and at most 1",
        )
        require(self.max_tokens > 0, "endpoint.max_tokens", self.max_tokens, "at least 1")
        require(self.timeout > 0, "endpoint.timeout", self.timeout, "more than 0")
        require(self.concurrency > 0, "endpoint.concurrency", self.concurrency, "at least 1")
        for name in ("requests_per_minute", "tokens_per_minute", "input_price", "output_price"):
            require(
                getattr(self, name) >= 0,
                f"endpoint.{name}",
                getattr(self, name),
                "0 (none) or more",
            )

    @property
    def is_given(self) -> bool:
        """Whether somebody has this role."""
        return bool(self.base_url)


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """What all roles share."""

    # SQLite file of replies, which several runs may share; empty: replies.sqlite in the work
    # directory
    cache: str = ""
    offline: bool = (
        False  # answer from the cache alone; a reply that is not there ends the run and is named
    )
    # of the whole run, by the prices of its roles; a run that reaches it stops, with a checkpoint;
    # 0: no cap
    max_dollars: float = 0.0
    # of a request after 408, 429, 5xx, a timeout or a broken connection; nothing else is tried
    # again
    max_retries: int = 4
    # Requests in a row, retries included, that fail before a role is taken for down; whoever says
    # 429 is not down
    breaker_failures: int = 5
    # that nobody calls it then, before one request tries; all others wait for what comes of it
    breaker_seconds: float = 30.0

    def __post_init__(self):
        require_types(self, "api.")
        require(self.max_dollars >= 0, "api.max_dollars", self.max_dollars, "0 (no cap) or more")
        require(self.max_retries >= 0, "api.max_retries", self.max_retries, "0 or more")
        require(
            self.breaker_failures > 0, "api.breaker_failures", self.breaker_failures, "at least 1"
        )
        require(self.breaker_seconds >= 0, "api.breaker_seconds", self.breaker_seconds, "0 or more")
