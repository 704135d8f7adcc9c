"""Chat models behind HTTP endpoints: address, sampling, limits and cost. Standard library only."""

from __future__ import annotations

import dataclasses
from typing import Literal

from opdjax.config.validation import require, require_ranges, require_types

RULE_JUDGE = "@rules"  # the built-in judge of the built-in task, in the run's own process

# Fields of an endpoint that do not change its replies: how it is reached, and its limits and cost.
TRANSPORT = (
    *("base_url", "api_key_env", "max_tokens_field", "timeout", "concurrency"),
    *("requests_per_minute", "tokens_per_minute", "input_price", "output_price"),
)


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A chat model behind an OpenAI-compatible endpoint (vLLM, SGLang, Gemini, OpenAI ...)."""

    # Address such as http://127.0.0.1:8000/v1; @rules: the built-in judge of the built-in task,
    # which needs no model; empty: no model has this role.
    base_url: str = ""
    # Name of the model on the server.
    model: str = ""
    # Name of the environment variable that holds the key; a config never contains the key itself.
    # Empty: the server needs none.
    api_key_env: str = ""
    # Sampling temperature; None: not sent, as some reasoning models require.
    temperature: float | None = None
    # Nucleus sampling; None: not sent.
    top_p: float | None = None
    # Sampling seed; None: not sent.
    seed: int | None = None
    # Reasoning effort; None: not sent.
    reasoning_effort: Literal["minimal", "low", "medium", "high"] | None = None
    # Longest reply, in tokens.
    max_tokens: int = 8192
    # Name of that limit in requests to the server.
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    # How replies are made JSON: by a schema that the server enforces, by its JSON mode, or only by
    # the prompt.
    output: Literal["json_schema", "json_object", "text"] = "json_schema"
    # Longest duration of a request, in seconds.
    timeout: float = 120.0
    # Largest number of requests at the same time.
    concurrency: int = 32
    # Limit of requests per minute; 0: none.
    requests_per_minute: int = 0
    # Limit of tokens per minute, prompts and replies together. A request counts in advance as its
    # characters / 4 and max_tokens. 0: none.
    tokens_per_minute: int = 0
    # Dollars per million tokens of prompts.
    input_price: float = 0.0
    # Dollars per million tokens of replies.
    output_price: float = 0.0

    def __post_init__(self):
        require_types(self, "endpoint.")
        is_named = bool(self.base_url) == bool(self.model)
        expected = "a name where base_url is given, and only there"
        require(is_named, "endpoint.model", self.model, expected)
        is_address = self.base_url.startswith(("http://", "https://"))
        is_address |= self.base_url in ("", RULE_JUDGE)
        expected = f"an address that starts with http:// or https://, or {RULE_JUDGE}"
        require(is_address, "endpoint.base_url", self.base_url, expected)
        # Anything but an upper-case identifier may be the key itself, so it is not printed.
        is_name = self.api_key_env.isidentifier() and self.api_key_env.isupper()
        expected = "the NAME of an environment variable, in capital letters, never the key itself"
        require(is_name or not self.api_key_env, "endpoint.api_key_env", "***", expected)
        ranges = {"temperature": "0 or more", "top_p": "more than 0 and at most 1"}
        ranges |= {
            "max_tokens": "at least 1",
            "timeout": "more than 0",
            "concurrency": "at least 1",
        }
        limits = ("requests_per_minute", "tokens_per_minute", "input_price", "output_price")
        require_ranges(self, "endpoint.", ranges | dict.fromkeys(limits, "0 (none) or more"))

    @property
    def is_given(self) -> bool:
        """Whether a model has this role."""
        return bool(self.base_url)


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """Settings that all endpoints share."""

    # SQLite file of cached replies, which several runs may share; empty: replies.sqlite in the work
    # directory.
    cache: str = ""
    # Answer only from the cache. A missing reply ends the run with an error that names it.
    offline: bool = False
    # Largest cost of the whole run in dollars, by the prices of its endpoints. A run that reaches
    # it saves a checkpoint and stops. 0: no cap.
    max_dollars: float = 0.0
    # Retries of a request after status 408, 429 or 5xx, a timeout or a broken connection. Other
    # errors are not retried.
    max_retries: int = 4
    # Failed requests in a row, retries included, after which an endpoint counts as down. Status 429
    # does not count.
    breaker_failures: int = 5
    # Pause in seconds after an endpoint went down. Then a single request tests it while the others
    # wait.
    breaker_seconds: float = 30.0

    def __post_init__(self):
        require_types(self, "api.")
        ranges = {"max_dollars": "0 (no cap) or more", "max_retries": "0 or more"}
        ranges |= {"breaker_failures": "at least 1", "breaker_seconds": "0 or more"}
        require_ranges(self, "api.", ranges)
