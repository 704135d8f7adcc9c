"""Chat models behind HTTP endpoints: address, limits, cost, and the model of each judge."""

import dataclasses
import os
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from opdjax.config.validation import Section, pairs_of, require

RULE_JUDGE = "@rules"  # the built-in judge of the built-in task, in the run's own process
ReasoningEffort = Literal["minimal", "low", "medium", "high"]
MaxTokensField = Literal["auto", "max_tokens", "max_completion_tokens"]
# OpenAI's reasoning models refuse `max_tokens`; other servers do not all know the newer name.
_OPENAI_HOSTS = ("openai.com", "openai.azure.com")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """All that a client needs of one chat model: `ApiConfig.endpoint` puts it together."""

    base_url: str
    model: str
    api_key_env: str = ""  # name of the environment variable that holds the key; empty: no key
    temperature: float | None = None  # None: not sent, as for the next two
    top_p: float | None = None
    reasoning_effort: ReasoningEffort | None = None
    max_tokens: int = 8192  # longest reply
    max_tokens_field: MaxTokensField = "auto"
    timeout: float = 120.0  # seconds
    concurrency: int = 32  # requests at the same time; 0: none is sent, the cache answers
    requests_per_minute: int = 0  # 0: no limit, as for the next
    tokens_per_minute: int = 0
    input_price: float = 0.0  # dollars per million tokens
    output_price: float = 0.0

    @property
    def limit_name(self) -> str:
        """The server's name of the limit on a reply."""
        if self.max_tokens_field != "auto":
            return self.max_tokens_field
        host = urlsplit(self.base_url).hostname or ""
        is_openai = any(host == name or host.endswith(f".{name}") for name in _OPENAI_HOSTS)
        return "max_completion_tokens" if is_openai else "max_tokens"


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """The model of one judge. Everything else of its endpoint is in the section api."""

    # Name of the model on the server; @rules: the built-in judge of the built-in task, which needs
    # no server; empty: no model has this role.
    model: str = ""
    # Address of another server than api.base_url. Its key, if it needs one, is read from the
    # environment variable RUBRICATOR_API_KEY or VERIFIER_API_KEY.
    base_url: str = ""
    # Sampling temperature; None: not sent, as some reasoning models require.
    temperature: Annotated[float | None, "0 or more"] = None
    # Reasoning effort; None: not sent.
    reasoning_effort: ReasoningEffort | None = None


class ApiConfig(Section):
    """The server of all chat models (vLLM, SGLang, Gemini, OpenAI ...), and its limits and cost."""

    # Address that speaks the OpenAI protocol, such as http://127.0.0.1:8000/v1.
    base_url: str = ""
    # Name of the environment variable that holds the key; a config never contains the key itself.
    # Empty: the server needs none.
    api_key_env: str = ""
    # Longest reply of a judge, in tokens.
    max_tokens: Annotated[int, "at least 1"] = 8192
    # Longest duration of a request, in seconds.
    timeout: Annotated[float, "more than 0"] = 120.0
    # Largest number of requests of a role at the same time. 0: no requests, only cached replies; a
    # missing one ends the run with an error that names it.
    concurrency: Annotated[int, "0 (only cached replies) or more"] = 32
    # Limits of a role's requests and tokens per minute; 0: no limit. A request counts in advance as
    # its characters / 4 and its longest reply.
    per_minute: Annotated[tuple[int, int], "0 (no limit) or more each"] = (0, 0)
    # Retries of a request after status 408, 429 or 5xx, a timeout or a broken connection. Other
    # errors are not retried.
    max_retries: Annotated[int, "0 or more"] = 4
    # Prices of models, MODEL=INPUT/OUTPUT in dollars per million tokens, such as m=1.25/10.
    prices: tuple[str, ...] = ()
    # Largest cost of the whole run in dollars, by these prices. A run that reaches it saves a
    # checkpoint and stops. 0: no cap.
    max_dollars: Annotated[float, "0 (no cap) or more"] = 0.0
    # SQLite file of cached replies, which several runs may share; empty: replies.sqlite in the work
    # directory.
    cache: str = ""
    # Name of the limit on a reply in requests. auto: max_completion_tokens for a server of OpenAI,
    # else max_tokens, which other servers of reasoning models may refuse as well.
    max_tokens_field: MaxTokensField = "auto"

    def __post_init__(self):
        super().__post_init__()
        require_address("api.base_url", self.base_url)
        # Anything but an upper-case identifier may be the key itself, so it is not printed.
        is_name = self.api_key_env.isidentifier() and self.api_key_env.isupper()
        expected = "the NAME of an environment variable, in capital letters, never the key itself"
        require(is_name or not self.api_key_env, "api.api_key_env", "***", expected)
        self.price_of("")

    def price_of(self, model: str) -> tuple[float, float]:
        """Dollars per million tokens of prompts and of replies; 0 for a model without a price."""
        expected = "MODEL=INPUT/OUTPUT, each model once, the prices 0 or more"
        prices = {}
        for name, text in pairs_of("api.prices", self.prices, expected).items():
            try:
                prices[name] = input_price, output_price = tuple(map(float, text.split("/")))
            except ValueError:
                input_price = output_price = -1.0
            is_price = 0 <= input_price < float("inf") and 0 <= output_price < float("inf")
            require(is_price, "api.prices", f"{name}={text}", expected)
        return prices.get(model, (0.0, 0.0))

    def endpoint(self, role: str, model: str, base_url: str, **own) -> Endpoint:
        """The endpoint of a role; `own`: its sampling."""
        input_price, output_price = self.price_of(model)
        # The shared key is never sent to another server.
        variable = f"{role.upper()}_API_KEY"
        own_key = variable if variable in os.environ else ""
        names = ("max_tokens", "max_tokens_field", "timeout", "concurrency")
        shared = {name: getattr(self, name) for name in names}
        return Endpoint(
            RULE_JUDGE if model == RULE_JUDGE else base_url or self.base_url,
            model.removeprefix("@"),
            own_key if base_url else self.api_key_env,
            requests_per_minute=self.per_minute[0],
            tokens_per_minute=self.per_minute[1],
            input_price=input_price,
            output_price=output_price,
            **shared | own,
        )


def require_address(field: str, url: str) -> None:
    """ConfigError unless the URL is empty or an address of a server."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:  # of brackets, or of a port that is no number
        parts, host = urlsplit(""), ""
    is_plain = re.fullmatch(r"[!-~]+", url) and re.fullmatch(r"[\w.:-]{1,253}", host)
    is_address = not url or (is_plain and parts.scheme in ("http", "https"))
    require(is_address, field, url, "an address that starts with http:// or https://")


def require_model(section: str, model: str, base_url: str, api: ApiConfig) -> None:
    """ConfigError where a role names a model and no server has it, or a server and no model."""
    require_address(f"{section}.base_url", base_url)
    expected = f"the name of a model on {base_url}"
    require(model or not base_url, f"{section}.model", model, expected)
    has_server = not model or model == RULE_JUDGE or base_url or api.base_url
    expected = f"the address of the server of {section}.model, {model}"
    require(has_server, "api.base_url", api.base_url, expected)
