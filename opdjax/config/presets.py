"""Published training data, preset:NAME, and evaluation suites, suite:NAME (assets/presets.toml),
and how the papers evaluate.
"""

import dataclasses
import functools
import importlib.resources
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from opdjax.config.data import DataConfig
from opdjax.config.sampling import EvaluationConfig
from opdjax.config.validation import ConfigError, from_dict, nearest

BOX = "\\boxed"
FORMATS = {
    "plain": "{prompt}",
    "boxed": "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "letter": "{prompt}\n\nPlease reason step by step, and put the letter of your answer within "
    "\\boxed{}.",
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """Where published rows are, what their columns hold, and how a question is asked and graded."""

    source: str  # of the hub; NAME=SOURCE reads a copy
    prompt: str  # columns, as in data.columns
    licence: str
    answer: str | None = None
    reference: str | None = None
    rubric: str | None = None
    more: tuple[str, ...] = ()  # other columns that are read
    format: str = "boxed"  # of FORMATS, where data.prompt_format is its default
    grader: str = "boxed"
    # The answer is what follows the last such text, or the content of the last BOX; rows without it
    # are left out. Empty: all of the column.
    mark: str = ""
    wrapper: str = "{prompt}"  # text around the question, which is removed
    domain: str | None = None  # the rows with this value of the column domain


@functools.cache
def _tables() -> dict[str, Any]:
    file = importlib.resources.files("opdjax") / "assets" / "presets.toml"
    return tomllib.loads(file.read_text("utf-8"))


@functools.cache
def presets(kind: str) -> Mapping[str, Preset]:
    """The presets of a kind, preset or suite, by name."""
    return {name: Preset(**row) for name, row in _tables()[kind].items()}


def protocol_named(name: str) -> tuple[tuple[str, ...], DataConfig, EvaluationConfig]:
    """(suites, what the model is shown, how it is sampled); ConfigError for another name."""
    rows = _tables()["protocol"]
    if name not in rows:
        raise ConfigError(f"there is no protocol {name!r}; {nearest(name, rows)}")
    evaluation = {"num_prompts": 1_000_000} | rows[name]["evaluation"]  # the whole suite
    data = from_dict(DataConfig, rows[name].get("data", {}), "data.")
    return tuple(rows[name]["suites"]), data, from_dict(EvaluationConfig, evaluation, "evaluation.")


def presets_in(source: str) -> list[tuple[str, Preset, str]]:
    """(name, preset, where its rows are) for each NAME[:FORMAT][=SOURCE] after preset: or suite: in
    a data source; ConfigError for another name or format.
    """
    found = []
    for kind, items in re.findall(r"\b(preset|suite):([^\s+]+)", source):
        for names, _, place in (item.partition("=") for item in items.split(",")):
            name, _, format = names.partition(":")
            for key, known in ((name, presets(kind)), (format or "plain", FORMATS)):
                if key not in known:
                    raise ConfigError(f"there is no {kind}:{names}; {nearest(key, known)}")
            preset = presets(kind)[name]
            preset = dataclasses.replace(preset, format=format or preset.format)
            found.append((name, preset, place or preset.source))
    return found


def grader_of(source: str) -> str | None:
    """The grader of the presets in a data source; None without any, ConfigError for several."""
    graders = {preset.grader for _, preset, _ in presets_in(source.partition(" without ")[0])}
    if len(graders) > 1:
        found = f"{source} needs the graders {', '.join(sorted(graders))}"
        raise ConfigError(f"{found}; expected one: evaluate them apart, or set evaluation.grader")
    return min(graders, default=None)
