"""The jitted update of the mini pair, on 64 rollouts: packed rows, and the step's diagnostics."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.core import Row, Runs, alternate, median_interval, progress, report, temp_mib
from benchmarks.vocabulary import make_arguments, read_teacher
from opdjax.config import Config
from opdjax.config.validation import from_dict
from opdjax.data.packing import answer_rows, pack, packing_metrics, to_train_batch
from opdjax.data.prompts import collate, indices_at
from opdjax.engine.step_metrics import observed
from opdjax.engine.update import init_state, make_optimizer, make_update
from opdjax.estimators import bind, estimator_of
from opdjax.models.hf import load_params
from opdjax.ops.tile import Head
from opdjax.ops.vocab import tiled_loss
from opdjax.rollouts.on_policy import draw, step_rollouts
from opdjax.rollouts.rows import scored
from opdjax.rollouts.setup import Setup, prepare, update_spec
from opdjax.types import PromptBatch, Rollouts, TrainBatch

ROWS, PARTS = 64, 8
EVERY = Config().log.diagnostics_every
OBSERVED = ("opd", "vopd", "full_kl")


def setup_of(recipe: str, max_completion_length: int) -> tuple[Setup, dict, PromptBatch]:
    """Return (setup on the mini pair, the student's parameters, the prompts of a step)."""
    settings = {
        "data": {"max_prompt_length": 32},
        "sampling": {"max_completion_length": max_completion_length},
        "estimator": {"recipe": recipe},
        "train": {"prompts_per_step": ROWS},
        "evaluation": {"source": None},
        "mesh": {"data": 1},
    }
    setup = prepare(from_dict(Config, settings))
    prompts = collate(setup.prompts, indices_at(0, ROWS, len(setup.prompts), 0))
    return setup, load_params(setup.student, "float32"), prompts


def repeatable(
    spec: Any, params: dict, diagnostics_every: int | None = None
) -> tuple[Callable, list]:
    """Return the jitted update, and a list that holds its state.

    The learning rate is so small that no parameter changes: every run is the same work.
    """
    optimizer = dataclasses.replace(Config().optimizer, learning_rate=1e-12)
    if diagnostics_every is not None:
        spec = dataclasses.replace(spec, diagnostics_every=diagnostics_every)
    return make_update(spec, optimizer, 100), [init_state(params, make_optimizer(optimizer, 100))]


def own_rollouts(setup: Setup, params: dict, prompts: PromptBatch) -> Rollouts:
    return step_rollouts(setup, params, prompts, 0)


def long_tail(setup: Setup, _: dict, prompts: PromptBatch) -> Rollouts:
    rng, most = np.random.default_rng(0), setup.config.sampling.max_completion_length
    lengths = np.clip(np.exp(rng.normal(np.log(40), 1.0, ROWS)).astype(int), 1, most)
    answers = [rng.integers(0, setup.decoding.valid_vocab, length).tolist() for length in lengths]
    return answer_rows(prompts, answers, most, 0)


CASES = {"own rollouts": (48, own_rollouts), "long tail": (240, long_tail)}


def packed_form(
    setup: Setup, params: dict, batch: TrainBatch, parts: int, pack_length: int | None
) -> tuple[Callable, Row]:
    """Return (a step without sampling, columns on its rows and the memory of its update)."""
    train = dataclasses.replace(setup.config.train, gradient_accumulation_steps=parts)
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, train=train))
    update, held = repeatable(update_spec(setup), params)

    def rows() -> TrainBatch:
        return batch if pack_length is None else pack(batch, pack_length, parts=parts)[0]

    def step() -> dict:
        held[0], metrics = update(held[0], *scored(setup, rows(), "vocabulary"))
        return jax.device_get(metrics)

    if pack_length is None:
        source = np.where(np.asarray(batch.segment_ids) > 0, 0, -1)
    else:
        source = pack(batch, pack_length, parts=parts)[1]
    metrics = packing_metrics(source)
    compiled = update.lower(held[0], *scored(setup, rows(), "vocabulary")).compile()
    return step, {
        "rows x tokens": f"{metrics['perf/packed_rows']:.0f} x {source.shape[1]}",
        "filled": float(metrics["perf/packing_efficiency"]),
        "XLA temp MiB": temp_mib(compiled),
    }


def add_clock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="clock of the ratios; cpu counts the process's CPU seconds, for a busy machine",
    )


def add_packing(parser: argparse.ArgumentParser) -> None:
    """Compare packed rows with one rollout a row: time and memory of packing, scoring and update.

    The mini pair with 64 rollouts a step, in one micro-batch and in eight. `own rollouts`: the
    student's answers of at most 48 tokens. `long tail`: random tokens with log-normal lengths
    (median 40, sigma 1) of at most 240. A packed row is as long as a padded row, or twice as long.
    Every form trains on the same tokens.
    """
    parser.set_defaults(run=packing, repeats=15)
    add_clock(parser)


def packing(options: argparse.Namespace) -> None:
    found = []
    for label, (most, make_rollouts) in CASES.items():
        setup, params, prompts = setup_of("vopd", most)
        batch = to_train_batch(make_rollouts(setup, params, prompts), prompts)
        width = batch.tokens.shape[1]
        settings = {
            "padded, 1": (1, None),
            f"padded, {PARTS}": (PARTS, None),
            f"packed, {PARTS}": (PARTS, width),
            f"packed, {PARTS}, twice as long": (PARTS, 2 * width),
        }
        forms = {name: packed_form(setup, params, batch, *each) for name, each in settings.items()}
        steps = {name: step for name, (step, _) in forms.items()}
        runs = alternate(steps, options.repeats, warm_ups=2)
        base = getattr(runs["padded, 1"], options.clock)
        for name, (_, row) in forms.items():
            ratios = [one / other for one, other in zip(getattr(runs[name], options.clock), base)]
            row = {"rollouts": label, "form": name} | row | runs[name].row()
            found.append(progress(row | {"over padded, 1": ratios}))
    report(found, options, [f"`vopd`, {ROWS} rollouts; the number is that of micro-batches."])


def mini_works(recipe: str) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Return (the updates that are compared, the other parts of a step) on the mini pair."""
    setup, params, prompts = setup_of(recipe, 24)
    needs = estimator_of(setup.config.estimator).teacher
    rollouts = jax.block_until_ready(draw(setup, params, prompts, 0))
    unscored = to_train_batch(rollouts, prompts)
    batch, head = scored(setup, unscored, needs)

    def updating(every: int, step: int) -> Callable:
        update, held = repeatable(update_spec(setup), params, every)

        def run():
            state = dataclasses.replace(held[0], step=jnp.int32(step))
            held[0], metrics = update(state, batch, head)
            return jax.device_get(metrics)

        return run

    return (
        {"off": updating(0, 0), "between": updating(EVERY, 1), "observed": updating(EVERY, 0)},
        {
            "sample": lambda: draw(setup, params, prompts, 0).tokens,
            "teacher": lambda: scored(setup, unscored, needs),
        },
    )


def vocabulary_works(recipe: str, sizes: tuple[int, int, int], tile: int) -> dict[str, Callable]:
    """Return the work on the vocabulary alone, without and with diagnostics."""
    estimator, arguments = bind(recipe), make_arguments(*sizes)

    def loss(hidden, kernel, weights, token, teacher_hidden, teacher_kernel, is_observed):
        columns, teacher = read_teacher(
            estimator, tile, weights, token, teacher_hidden, teacher_kernel
        )
        if is_observed is not None:
            flags = jnp.broadcast_to(is_observed, token.shape)
            columns = dataclasses.replace(columns, is_observed=flags)
        token_loss = observed(estimator.token_loss)
        return tiled_loss(token_loss, hidden, Head(kernel), weights, columns, teacher, tile=tile)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    flags = {"off": None, "between": jnp.bool_(False), "observed": jnp.bool_(True)}
    return {name: partial(compiled, *arguments, flag) for name, flag in flags.items()}


def shares(found: dict[str, Runs], others: dict[str, Runs], clock: str) -> Row:
    """Return the cost of diagnostics in % of the whole work without them."""
    off = getattr(found["off"], clock)
    whole = statistics.median(off)
    whole += sum(statistics.median(getattr(runs, clock)) for runs in others.values())
    costs = {
        name: [(one - without) / whole for one, without in zip(getattr(found[name], clock), off)]
        for name in ("between", "observed")
    }
    pairs = zip(costs["between"], costs["observed"])
    costs[f"one of {EVERY} observed"] = [((EVERY - 1) * a + b) / EVERY for a, b in pairs]
    row: Row = {f"{clock} ms without": 1e3 * whole}
    for name, values in costs.items():
        middle, low, high = (100 * value for value in median_interval(values))
        row[f"{name}, %"] = f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"
    return row


def add_diagnostics(parser: argparse.ArgumentParser) -> None:
    """Measure the cost of a step's diagnostics in paired, alternating runs of the same work.

    `between`: a step that skips the diagnostics. `observed`: a step that computes them. Both are
    compared with log.diagnostics_every 0. The mini pair runs the real update on 64 rows; its share
    is that of a whole step (sampling, teacher's scores, update without diagnostics). On a long
    vocabulary only the work on the vocabulary is run, in float32, and the share is that of this
    work: the share of a whole step is smaller. Intervals of 95 % are from the order statistics.
    """
    parser.set_defaults(run=diagnostics, repeats=200)
    add = parser.add_argument
    add("--long-repeats", type=int, default=12, help="runs of the work on the long vocabulary")
    add("--only", choices=("mini", "long"), help="one of the two sizes")
    add("--recipes", nargs="+", default=list(OBSERVED), help="recipes with default options")
    add("--vocab", type=int, default=151_936, help="size of the long vocabulary")
    add_clock(parser)


def diagnostics(options: argparse.Namespace) -> None:
    rows = []
    for recipe in options.recipes if options.only != "long" else ():
        compared, others = mini_works(recipe)
        found = alternate(compared, options.repeats, warm_ups=2)
        rest = alternate(others, max(options.repeats // 4, 3), warm_ups=2)
        row = {"work": f"a step of the mini pair, `{recipe}`"}
        rows.append(progress(row | shares(found, rest, options.clock)))
    for recipe in options.recipes if options.only != "mini" else ():
        works = vocabulary_works(recipe, (256, options.vocab, 1024), tile=128)
        found = alternate(works, options.long_repeats, warm_ups=2)
        row = {"work": f"V = {options.vocab:,}, `{recipe}`"}
        rows.append(progress(row | shares(found, {}, options.clock)))
    report(rows, options)
