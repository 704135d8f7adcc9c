"""Measure the cost of a step's diagnostics in paired, alternating runs of the same work.

    python scripts/benchmark_diagnostics.py                # both sizes, about five minutes

`off`: log.diagnostics_every 0. `between`: a step that skips the diagnostics. `observed`: a step
that computes them. The mini pair runs the real jitted update on 64 rows; its share is that of a
whole step (sampling, teacher's scores, update without diagnostics). At V = 151,936 and width 1,024
only the work on the vocabulary is run (teacher's scores, loss, both gradients) in float32; the
share is that of this work, so the share of a whole step is smaller. Shares are medians of the
paired differences with a 95 % interval from the order statistics. `--clock cpu` counts the
process's CPU seconds, which are more reliable on a busy machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from benchmark_vocab import machine, make_arguments, with_teacher_logprobs

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    MeshConfig,
    SamplingConfig,
)
from opdjax.data.packing import to_train_batch
from opdjax.data.prompts import collate, indices_at
from opdjax.engine.step_metrics import observed
from opdjax.engine.update import init_state, make_optimizer, make_update
from opdjax.estimators import estimator_of
from opdjax.models.hf import load_params
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_loss
from opdjax.rollouts.on_policy import draw
from opdjax.rollouts.scoring import scored
from opdjax.rollouts.setup import prepare, update_spec

FORMS = {
    "opd": EstimatorConfig(recipe="opd"),
    "vopd": EstimatorConfig(recipe="vopd"),
    "full_kl": EstimatorConfig(recipe="full_kl"),
}
EVERY = Config().log.diagnostics_every
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_of(run: Callable, clock: Callable) -> float:
    start = clock()
    jax.block_until_ready(run())
    return clock() - start


def alternate(runs: dict[str, Callable], repeats: int, clock: Callable) -> dict[str, list[float]]:
    """Return the seconds of alternating runs, in reversed order every other round.

    The first two rounds are left out.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            found[name].append(seconds_of(runs[name], clock))
    return {name: values[2:] for name, values in found.items()}


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return (median, lower, upper): the 95 % interval from the order statistics."""
    ordered, count = sorted(values), len(values)
    reach = math.ceil(0.98 * math.sqrt(count))
    middle = (count - 1) / 2
    return (
        statistics.median(values),
        ordered[max(0, math.floor(middle - reach))],
        ordered[min(count - 1, math.ceil(middle + reach))],
    )


def mini_runs(estimator: EstimatorConfig) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Return (the updates that are compared, the other parts of a step)."""
    config = Config(
        data=DataConfig(max_prompt_length=32),
        sampling=SamplingConfig(max_completion_length=24),
        estimator=estimator,
        evaluation=EvaluationConfig(source=None),
        mesh=MeshConfig(1),
    )
    setup = prepare(config)
    needs = estimator_of(estimator).teacher
    params = load_params(setup.student, "float32")
    prompts = collate(setup.prompts, indices_at(0, 64, len(setup.prompts), 0))
    rollouts = jax.block_until_ready(draw(setup, params, prompts, 0))
    unscored = to_train_batch(rollouts, prompts)
    batch, head = scored(setup, unscored, needs)
    # So small that no parameter changes: every run is the same work.
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-12)

    def updating(every: int, step: int) -> Callable:
        update = make_update(
            dataclasses.replace(update_spec(setup), diagnostics_every=every), optimizer, 100
        )
        held = [init_state(params, make_optimizer(optimizer, 100))]

        def run():
            held[0], metrics = update(
                dataclasses.replace(held[0], step=jnp.int32(step)), batch, head
            )
            return jax.tree.map(float, jax.device_get(metrics))

        return run

    compared = {
        "off": updating(0, 0),
        "between": updating(EVERY, 1),
        "observed": updating(EVERY, 0),
    }
    return compared, {
        "sample": lambda: draw(setup, params, prompts, 0).tokens,
        "teacher": lambda: scored(setup, unscored, needs),
    }


def vocabulary_runs(
    estimator: EstimatorConfig, tokens: int, vocab: int, width: int, tile: int
) -> tuple[dict[str, Callable], dict]:
    bound = estimator_of(estimator)
    arguments = make_arguments(tokens, vocab, width)

    def loss(hidden, kernel, weights, token, teacher_hidden, teacher_kernel, is_observed):
        columns, teacher = TokenInputs(token), (teacher_hidden, Head(teacher_kernel))
        if bound.teacher == "token":
            columns = with_teacher_logprobs(token, weights, teacher_hidden, teacher_kernel, tile)
            teacher = None
        if is_observed is not None:
            columns = dataclasses.replace(
                columns, is_observed=jnp.broadcast_to(is_observed, token.shape)
            )
        return tiled_loss(
            observed(bound.token_loss),
            hidden,
            Head(kernel),
            weights,
            columns,
            teacher,
            tile=tile,
        )

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    taken = {"off": None, "between": jnp.bool_(False), "observed": jnp.bool_(True)}
    return {name: lambda flag=flag: compiled(*arguments, flag) for name, flag in taken.items()}, {}


def row(
    label: str, runs: tuple[dict[str, Callable], dict[str, Callable]], repeats: int, clock: Callable
) -> str:
    compared, others = runs
    found = alternate(compared, repeats, clock)
    rest = (
        sum(
            statistics.median(values)
            for values in alternate(others, max(repeats // 4, 3), clock).values()
        )
        if others
        else 0.0
    )
    whole = rest + statistics.median(found["off"])
    cells = [f"{1e3 * whole:.1f}"]
    shares = {
        name: [(with_it - off) / whole for with_it, off in zip(found[name], found["off"])]
        for name in ("between", "observed")
    }
    shares[f"1 of {EVERY}"] = [
        ((EVERY - 1) * one + other) / EVERY
        for one, other in zip(shares["between"], shares["observed"])
    ]
    for values in shares.values():
        middle, low, high = (100 * value for value in median_interval(values))
        cells.append(f"{middle:+.1f} ({low:+.1f} to {high:+.1f})")
    gc.collect()
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=200, help="runs of the mini pair's update")
    parser.add_argument(
        "--long-repeats", type=int, default=12, help="runs of the work on the long vocabulary"
    )
    parser.add_argument("--only", choices=("mini", "long"))
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    print(machine() + "\n")
    print(
        f"| work | {options.clock} ms without | between, % | observed, % "
        f"| one of {EVERY} observed, % |\n|---|---|---|---|---|"
    )
    for label, estimator in FORMS.items() if options.only != "long" else ():
        print(
            row(f"mini pair, `{label}`, a step", mini_runs(estimator), options.repeats, clock),
            flush=True,
        )
    for label, estimator in FORMS.items() if options.only != "mini" else ():
        print(
            row(
                f"V = 151,936, `{label}`",
                vocabulary_runs(estimator, 256, 151936, 1024, 128),
                options.long_repeats,
                clock,
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
