"""The training curves of a run's page, and its KL by position in the completion."""

from __future__ import annotations

import numpy as np

from opdjax.report import measures
from opdjax.report.charts import (
    Chart,
    ChartLine,
    by_step,
    curve,
    draw,
    draw_columns,
    grid,
    legend,
    smooth,
)
from opdjax.report.markup import Html, count, number, section
from opdjax.runs.results import Run

# Recorded every log.diagnostics_every steps.
_SPARSE = ("entropy/student", "entropy/teacher", "overlap/ratio")


def training_section(run: Run) -> Html | None:
    """One chart per recorded metric; None before the first step."""
    if not run.metrics:
        return None
    figures = [_training_chart(run, key, chart) for key, chart in _charts(run).items()]
    note = measures.smoothing_note(len(run.metrics))
    return section(
        "training",
        "Training curves",
        grid([*figures, _signal_chart(run)]),
        about=f"One value per step, over the rollouts of that step.{note}",
    )


def _training_chart(run: Run, key: str, chart: Chart) -> Html | None:
    steps, values = measures.steps_of(run), run.column(key)
    if key in _SPARSE:
        known = [(step, value) for step, value in zip(steps, values) if value is not None]
        markers = len(known) < 30
        return draw(chart, [ChartLine(*zip(*known), has_markers=markers)]) if known else None
    if key == "optimizer/learning_rate" and any(values):  # without noise: not smoothed
        return draw(chart, curve(steps, values, window=1))
    return draw_columns(chart, steps, [(0, values)])


def _signal_chart(run: Run) -> Html | None:
    window = measures.smoothing_window(len(run.metrics))
    squares = (run.column(f"grad/{name}_squared") for name in ("signal", "noise"))
    signal, noise = (smooth(values, window) for values in squares)
    if not np.isfinite(noise).any():
        return None
    # The ratio of two means, not the mean of ratios: the signal of one step has either sign.
    is_known = noise > 0
    ratio = np.where(is_known, signal / np.where(is_known, noise, 1), np.nan)
    about = (
        "Squared norm of the expected gradient over the variance of one step's gradient, each a"
        f" mean over {count(window, 'step')}. Far below 1, a step is mostly noise: use a larger"
        " batch or an estimator with less variance. Measured where a step has several"
        " micro-batches."
    )
    chart = by_step("Signal to noise of the gradient", "squared norms", about)
    return draw(chart, [ChartLine(measures.steps_of(run), ratio)])


def _is_sampled(run: Run) -> bool:
    """Whether kl/student_teacher is kl/k1, the mean log-ratio of the sampled tokens."""
    estimate = run.column("kl/k1")
    if any(value is not None for value in estimate):
        return run.column("kl/student_teacher") == estimate
    recipe = measures.recipe_of(run)
    return recipe is not None and recipe.teacher == "token"


def _charts(run: Run) -> dict[str, Chart]:
    """The chart of each metric."""
    clip = run.config["optimizer"].get("max_grad_norm")
    limit = run.config["sampling"]["max_completion_length"]
    recipe = measures.recipe_of(run)
    is_rewarded = recipe is not None and recipe.is_rewarded
    kl = "estimated from the sampled tokens" if _is_sampled(run) else "exact at every position"
    clipped = (
        f"Before clipping; dashed: the clipping threshold (max_grad_norm = {number(clip)})."
        if clip
        else "Gradients are not clipped."
    )
    advantage = (
        "Over tokens: how much the scores of a prompt's answers differ. At 0 nothing is left to"
        " learn from."
        if is_rewarded
        else "Over tokens: the noise that multiplies the gradient. It should shrink in training."
    )
    above, share = {"bounds": (0, None)}, {"bounds": (0, 1)}
    return {
        "kl/student_teacher": by_step(
            "KL(student || teacher)",
            "nats a token",
            f"Distance from the teacher on the student's completions, {kl}. It should fall, then"
            " level off.",
        ),
        "loss/objective": by_step(
            "Loss",
            "nats",
            "The recipe's objective. The loss of a policy gradient has no target value: judge by KL"
            " and scores, and look here for jumps.",
        ),
        "grad/norm": by_step(
            "Gradient norm",
            "global norm",
            f"{clipped} Spikes or growth mean that the learning rate is too high.",
            reference=clip or None,
            **above,
        ),
        "advantage/std": by_step(
            "Spread of the advantage",
            "standard deviation" if is_rewarded else "standard deviation, nats",
            advantage,
            **above,
        ),
        "entropy/student": by_step(
            "Entropy of the student",
            "nats a token",
            "Of its next-token distributions on its own completions. A fall to 0 means that it has"
            " stopped exploring.",
            **above,
        ),
        "entropy/teacher": by_step(
            "Entropy of the teacher",
            "nats a token",
            "On the same contexts. Growth means that the contexts are unusual for the teacher.",
            **above,
        ),
        "overlap/ratio": by_step(
            "Overlap of the most likely tokens",
            "share",
            "Share of the student's 16 most likely tokens that are among the teacher's 16.",
            **share,
        ),
        "rollout/length_mean": by_step(
            "Completion length",
            "tokens, mean",
            f"At most {limit:,}. A collapse, or growth to the limit, is a failure.",
        ),
        "rollout/truncated_ratio": by_step(
            "Cut-off completions",
            "share",
            f"Completions that reached {limit:,} tokens without ending. It should stay near 0.",
            **share,
        ),
        "optimizer/learning_rate": by_step(
            "Learning rate",
            "step size",
            "The schedule as applied; skipped steps do not advance it.",
            **above,
        ),
    }


def positions_section(run: Run) -> Html | None:
    """KL by position in the completion, at the start and end of training."""
    length = measures.end_length(len(run.metrics))
    ends = (run.metrics[:length], run.metrics[-length:])
    early, late = map(measures.kl_by_position, ends)
    buckets = sorted(early.keys() | late.keys())
    if not buckets or len(run.metrics) < 2:
        return None
    lines = [
        ChartLine(range(len(buckets)), [*map(part.get, buckets)], slot=slot, has_markers=True)
        for slot, part in ((1, early), (0, late))
    ]
    chart = Chart(
        "KL(student || teacher) by position",
        "position in the completion, tokens",
        "nats a token",
        categories=[*map(measures.bucket_label, buckets)],
    )
    about = (
        "Where in a completion student and teacher disagree. A gap that closes at the start and"
        " stays at the end means that the student drifts into contexts that the teacher would not"
        " have written. Only long completions reach late positions."
    )
    key = legend([(f"first {count(length, 'step')}", 1), (f"last {count(length, 'step')}", 0)])
    return section("positions", "KL by position", key, grid([draw(chart, lines)]), about=about)
