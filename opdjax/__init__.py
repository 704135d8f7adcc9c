"""On-policy distillation of language models in JAX.

    opdjax.losses.full_kl(student_logits, teacher_logits, tokens, mask)  # and all other recipes
    opdjax.train(opdjax.Config(...), "runs/mine")  # a whole run
    model = opdjax.load("@mini_student")  # or a directory, or a hub id
    opdjax.sample(model, ["34-17+25="])
    opdjax.score(model, ["34-17+25="], ["34-17=17;17+25=42#42"])

Sections of the config have their names in `opdjax.config`. A name is imported when it is first
used.
"""

import importlib
from typing import Any

_HOMES = {
    "Model": "opdjax.rollouts.one_model",
    "load": "opdjax.rollouts.one_model",
    "sample": "opdjax.rollouts.one_model",
    "score": "opdjax.rollouts.one_model",
}
_SUBMODULES = ("config", "estimators", "losses", "train")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"opdjax.{name}")
    config = importlib.import_module("opdjax.config")
    if name not in _HOMES and name not in _names_of(config):
        raise AttributeError(f"opdjax has no {name!r}; it has {', '.join(__dir__())}")
    return getattr(importlib.import_module(_HOMES.get(name, "opdjax.config")), name)


def __dir__() -> list[str]:
    names = _names_of(importlib.import_module("opdjax.config"))
    return sorted({*_HOMES, *_SUBMODULES, *names})


def _names_of(config: Any) -> list[str]:
    return [name for name in vars(config) if name[0].isupper()]
