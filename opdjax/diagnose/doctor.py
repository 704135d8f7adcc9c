"""`opdjax doctor`: finds mistakes that would train without an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from opdjax.config import Config, MeshConfig
from opdjax.config.validation import require
from opdjax.data.tokenizer import load_tokenizer
from opdjax.diagnose import checks
from opdjax.diagnose.measurements import Measurements
from opdjax.models.hf import open_checkpoint
from opdjax.rollouts.checks import Finding, check_tokenizers
from opdjax.rollouts.setup import Setup, prepare, reads_scores


@dataclasses.dataclass(frozen=True)
class Check:
    """A row of CHECKS: a function whose docstring says what it finds, and what to do then."""

    run: Callable[[Measurements], Finding | None]  # None: there is nothing to judge
    advice: str
    applies: Callable[[Config], bool] = lambda config: True

    @property
    def name(self) -> str:
        """The name of the check and of its finding."""
        return self.run.__name__

    @property
    def finds(self) -> str:
        """The mistake that the check looks for."""
        return self.run.__doc__.partition("\n")[0]


_is_judged = lambda config: config.is_judged

# In the order in which they run. A new check is a function in checks.py and a row here.
CHECKS = (
    Check(checks.tokenizers, "choose a teacher with the student's tokenizer", reads_scores),
    Check(checks.padded_vocabulary, "mask ids from the tokenizer's size on (valid_vocab)"),
    Check(checks.stop_tokens, "set --sampling.stop-token-ids"),
    Check(checks.chat_template, "copy a template, or set --data.teacher-format", reads_scores),
    Check(checks.sampler_matches_scorer, "look at mask, shift by one, temperature and dtypes"),
    Check(checks.sampling_filter, "set top_p 1, top_k 0, or use an exact divergence"),
    Check(checks.staleness, "set estimator.importance, or use an exact divergence"),
    Check(checks.self_distillation, "use one dtype and one vocabulary mask", reads_scores),
    Check(checks.teacher_dtype, "set --train.dtype", reads_scores),
    Check(checks.repeated_scores, "look at segment ids and kernels", reads_scores),
    Check(checks.teacher_is_better, "look at paths, tokenizer, prompt format", reads_scores),
    Check(checks.mask, "look at the packing of the rollouts"),
    Check(checks.judge, "look at endpoints, keys and the judges' models", _is_judged),
    Check(checks.judge_spread, "use finer criteria or a stronger judge", _is_judged),
    Check(checks.judge_references, "look at references and criteria", _is_judged),
    Check(checks.judge_cost, "set the prices of the endpoints", _is_judged),
)


def choose(names: Sequence[str], config: Config) -> list[Check]:
    """Return the checks of these names that apply to a run; no names: all that apply.

    ConfigError, which lists the names, if there is no such check or it does not apply.
    """
    chosen = [check for check in CHECKS if check.applies(config)]
    applicable = [check.name for check in chosen]
    for name in names:
        expected = f"checks that apply to this run: {', '.join(applicable)}"
        require(name in applicable, "--only", name, expected)
    return [check for check in chosen if not names or check.name in names]


def run_checks(config: Config, num_prompts: int = 8, only: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield the findings on a run of this config, by the checks of `choose(only, config)`.

    If the tokenizers differ, that finding alone: the other checks compare ids.
    """
    require(num_prompts > 0, "--num-prompts", num_prompts, "at least 1")
    choose(only, config)  # before the models are loaded
    if reads_scores(config):
        tokenizers = [
            load_tokenizer(open_checkpoint(*model.place).path)
            for model in (config.student, config.teacher_model)
        ]
        found = check_tokenizers(*tokenizers, config.estimator.recipe)
        if found.status == "fault":
            note = "the other checks compare ids, so they were not made"
            yield dataclasses.replace(found, details=(*found.details, note))
            return
    # A few rows need one device only and no separate generator.
    near_policy = dataclasses.replace(config.near_policy, generator="inline", lag="fixed")
    config = dataclasses.replace(config, mesh=MeshConfig(1), near_policy=near_policy)
    yield from examine(prepare(config), num_prompts, only)


def examine(setup: Setup, num_prompts: int = 8, only: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield the finding of each check on the run's first prompts, as soon as it is made."""
    measured = Measurements(setup, num_prompts)
    found = (check.run(measured) for check in choose(only, setup.config))
    return (finding for finding in found if finding is not None)


def describe() -> str:
    """Return all checks: name, what it finds, what to do."""
    rows = [f"{check.name:24}{check.finds} What to do: {check.advice}." for check in CHECKS]
    return "\n".join(rows)
