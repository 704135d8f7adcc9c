"""What `opdjax doctor` finds out about judges: whether they answer in a form that can be used, tell
answers apart, and what they cost.
"""

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
from opdjax.rollouts.checks import Finding
from opdjax.rollouts.judged import JudgedSource, background_judge
from opdjax.rollouts.on_policy import draw
from opdjax.rollouts.setup import initial_weights, prepare

_GROUPS = 4
_LEAST_OF_REFERENCES = (
    0.5  # below, what the teacher wrote does not meet what is asked of the student
)


def examine_judge(config: Config) -> Iterator[Finding]:
    """Findings on the first groups of the run, for which judges are really asked; nothing is kept
    of it.
    """
    setup = prepare(dataclasses.replace(config, mesh=MeshConfig(1)))
    indices = indices_at(0, min(_GROUPS, len(setup.prompts)), len(setup.prompts), config.seed)
    rollouts = to_host(draw(setup, initial_weights(setup), collate(setup.prompts, indices), 0))
    with (
        tempfile.TemporaryDirectory() as scratch,
        background_judge(config, pathlib.Path(scratch)) as background,
    ):
        source = JudgedSource(setup, pathlib.Path(scratch), 0, background)
        try:
            found = [judgement for judgements in source.judge(rollouts) for judgement in judgements]
        except ApiError as error:
            yield Finding("judge", "fault", f"it cannot be asked: {error}")
            return
        yield _replies(found)
        if not any(judgement.is_scored for judgement in found):
            return
        yield from _spread(found)
        yield _cost(config, background.record_usage(0), len(indices))


def _replies(found: list[Judgement]) -> Finding:
    problems = sum((+judgement.tally.problems for judgement in found), collections.Counter())
    failed = sum(not judgement.is_scored for judgement in found)
    told = (
        ", ".join(f"{name} {count}" for name, count in sorted(problems.items()))
        or "none that could not be used"
    )
    if failed:
        return Finding(
            "judge",
            "fault",
            f"{failed} of {len(found)} groups have no score; of the replies: {told}",
        )
    return Finding(
        "judge",
        "warning" if problems else "ok",
        f"{len(found)} groups have scores; of the replies: {told}",
    )


def _spread(found: list[Judgement]) -> Iterator[Finding]:
    """Whether rollouts are told apart, and whether the references themselves meet what is asked."""
    scored = [
        {score for score in judgement.scores if score is not None}
        for judgement in found
        if len(judgement.scores) > 1
    ]
    tied = sum(len(scores) < 2 for scores in scored)
    if scored:
        status = "warning" if tied == len(scored) else "ok"
        told = f"in {tied} of {len(scored)} groups all rollouts have one score, and nothing is learnt from them"
        yield Finding("judge_spread", status, told)
    references = [
        score for judgement in found for score in judgement.reference_scores if score is not None
    ]
    if references:
        mean = sum(references) / len(references)
        status = "warning" if mean < _LEAST_OF_REFERENCES else "ok"
        yield Finding(
            "judge_references", status, f"the teacher's own answers have a mean score of {mean:.2f}"
        )


def _cost(config: Config, usage: dict[str, float], groups: int) -> Finding:
    """What a run would cost at the rate of these groups."""
    scale = config.train.prompts_per_step * config.train.num_steps / groups
    names = ("calls", "input_tokens", "output_tokens", "dollars")
    total = {
        name: sum(value for key, value in usage.items() if key.endswith(f"/{name}"))
        for name in names
    }
    is_priced = any(
        getattr(config, role).input_price or getattr(config, role).output_price
        for role in ("rubricator", "verifier")
    )
    dollars = (
        f", {scale * total['dollars']:,.2f} dollars"
        if is_priced
        else "; no price is set, so that api.max_dollars stops nothing"
    )
    text = (
        f"a run asks about {scale * total['calls']:,.0f} times, with {scale * total['input_tokens'] / 1e6:,.2f} million tokens read and "
        f"{scale * total['output_tokens'] / 1e6:,.2f} million written{dollars}"
    )
    is_uncapped = config.api.max_dollars > 0 and not is_priced
    return Finding("judge_cost", "warning" if is_uncapped else "ok", text)
