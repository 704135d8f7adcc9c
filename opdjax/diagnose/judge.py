"""What `opdjax doctor` measures of judges: usable replies, spread of the scores, and cost."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator

from opdjax.config import Config, MeshConfig
from opdjax.data.prompts import collate, indices_at
from opdjax.judge.judgement import Judgement
from opdjax.judge.replies import ApiError
from opdjax.ops.sharding import to_host
from opdjax.rollouts.findings import Finding, fault, warning
from opdjax.rollouts.judged import JudgedSource, background_judge
from opdjax.rollouts.on_policy import draw
from opdjax.rollouts.setup import initial_weights, prepare

_NUM_GROUPS = 4
# Below this mean score, the teacher's own answers do not meet the criteria.
_MIN_REFERENCE_SCORE = 0.5


def examine_judge(config: Config) -> Iterator[Finding]:
    """Send the run's first groups to its judges and yield findings; nothing is kept."""
    setup = prepare(dataclasses.replace(config, mesh=MeshConfig(1)))
    indices = indices_at(0, min(_NUM_GROUPS, len(setup.prompts)), len(setup.prompts), config.seed)
    rollouts = to_host(draw(setup, initial_weights(setup), collate(setup.prompts, indices), 0))
    with (
        tempfile.TemporaryDirectory() as scratch,
        background_judge(config, pathlib.Path(scratch)) as background,
    ):
        source = JudgedSource(setup, pathlib.Path(scratch), background)
        try:
            found = [judgement for judgements in source.judge(rollouts) for judgement in judgements]
        except ApiError as error:
            yield Finding("judge", *fault(f"the request failed: {error}"))
            return
        yield _replies(found)
        if any(judgement.is_scored for judgement in found):
            yield from _spread(found)
            yield _cost(config, background.record_usage(0), len(indices))


def _replies(found: list[Judgement]) -> Finding:
    problems = sum((+judgement.tally.problems for judgement in found), collections.Counter())
    counts = ", ".join(f"{name} {count}" for name, count in sorted(problems.items())) or "none"
    failed = sum(not judgement.is_scored for judgement in found)
    if failed:
        text = f"{failed} of {len(found)} groups have no score; unusable replies: {counts}"
        return Finding("judge", *fault(text))
    text = f"{len(found)} groups have scores; unusable replies: {counts}"
    return Finding("judge", "warning" if problems else "ok", text)


def _spread(found: list[Judgement]) -> Iterator[Finding]:
    """Check that scores differ within a group, and that the reference answers score well."""
    groups = [
        {score for score in judgement.scores if score is not None}
        for judgement in found
        if len(judgement.scores) > 1
    ]
    if groups:
        tied = sum(len(scores) < 2 for scores in groups)
        text = f"in {tied} of {len(groups)} groups all rollouts have the same score"
        status = "warning" if tied == len(groups) else "ok"
        yield Finding("judge_spread", status, f"{text} and give no gradient")
    references = [
        score for judgement in found for score in judgement.reference_scores if score is not None
    ]
    if references:
        mean = sum(references) / len(references)
        status = "warning" if mean < _MIN_REFERENCE_SCORE else "ok"
        text = f"the teacher's own answers have a mean score of {mean:.2f}"
        yield Finding("judge_references", status, text)


def _cost(config: Config, usage: dict[str, float], groups: int) -> Finding:
    """Extrapolate the usage of these groups to the whole run."""
    scale = config.train.prompts_per_step * config.train.num_steps / groups
    total = lambda name: scale * sum(v for key, v in usage.items() if key.endswith(f"/{name}"))
    text = f"a run sends about {total('calls'):,.0f} requests with"
    text += f" {total('input_tokens') / 1e6:,.2f} million input tokens and"
    text += f" {total('output_tokens') / 1e6:,.2f} million output tokens"
    models = (config.rubricator.model, config.verifier.model)
    if any(any(config.api.price_of(model)) for model in models):
        return Finding("judge_cost", "ok", f"{text}, for {total('dollars'):,.2f} dollars")
    no_price = "no price is set, so api.max_dollars has no effect"
    if config.api.max_dollars > 0:
        return Finding("judge_cost", *warning(text, no_price))
    return Finding("judge_cost", "ok", f"{text}; {no_price}")
