"""Compare packed rows with one rollout a row: time and memory of packing, scoring and update.

    python scripts/benchmark_packing.py                    # about three minutes

The mini pair with 64 rollouts a step, in one micro-batch and in eight. `own rollouts`: the
student's answers of at most 48 tokens. `long tail`: random tokens with log-normal lengths (median
40, sigma 1) of at most 240. A packed row is as long as a padded row, or twice as long. Every form
trains on the same tokens. Seconds are medians of alternating runs; temporary memory is XLA's own
figure for the update, without arguments and results.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import jax
import numpy as np
from benchmark_diagnostics import CLOCKS, alternate
from benchmark_vocab import machine, temp_mib

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    MeshConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.data.packing import answer_rows, pack, packing_metrics, to_train_batch
from opdjax.data.prompts import collate, indices_at
from opdjax.engine.update import init_state, make_optimizer, make_update
from opdjax.models.hf import load_params
from opdjax.rollouts.on_policy import step_rollouts
from opdjax.rollouts.scoring import scored
from opdjax.rollouts.setup import Setup, prepare, update_spec
from opdjax.types import PromptBatch, Rollouts, TrainBatch

_ROWS, _PARTS = 64, 8


def setup_of(max_completion_length: int) -> Setup:
    return prepare(
        Config(
            data=DataConfig(max_prompt_length=32),
            sampling=SamplingConfig(max_completion_length=max_completion_length),
            estimator=EstimatorConfig("vopd"),
            train=TrainConfig(prompts_per_step=_ROWS),
            evaluation=EvaluationConfig(source=None),
            mesh=MeshConfig(1),
        )
    )


def own_rollouts(setup: Setup, prompts: PromptBatch) -> Rollouts:
    return step_rollouts(setup, load_params(setup.student, "float32"), prompts, 0)


def long_tail(setup: Setup, prompts: PromptBatch) -> Rollouts:
    rng, most = np.random.default_rng(0), setup.config.sampling.max_completion_length
    lengths = np.clip(np.exp(rng.normal(np.log(40), 1.0, _ROWS)).astype(int), 1, most)
    answers = [rng.integers(0, setup.decoding.valid_vocab, length).tolist() for length in lengths]
    return answer_rows(prompts, answers, most, 0)


CASES = {"own rollouts": (48, own_rollouts), "long tail": (240, long_tail)}


def form(
    setup: Setup, batch: TrainBatch, parts: int, pack_length: int | None
) -> tuple[Callable, str, float]:
    """Return (a step without sampling, how full its rows are, temporary MiB of the update)."""
    train = dataclasses.replace(setup.config.train, gradient_accumulation_steps=parts)
    # So small that no parameter changes: every run is the same work.
    optimizer = dataclasses.replace(setup.config.optimizer, learning_rate=1e-12)
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, train=train))
    update = make_update(update_spec(setup), optimizer, 100)
    held = [init_state(load_params(setup.student, "float32"), make_optimizer(optimizer, 100))]

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
    size = f"{metrics['perf/packed_rows']:.0f} x {source.shape[1]}"
    memory = temp_mib(update.lower(held[0], *scored(setup, rows(), "vocabulary")).compile())
    return step, f"{size} | {metrics['perf/packing_efficiency']:.2f}", memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu counts the process's CPU seconds, for a busy machine",
    )
    options = parser.parse_args()
    print(f"{machine()} `vopd`, {_ROWS} rollouts.\n")
    print(
        "| rollouts | form | rows x tokens | filled | update, XLA temp MiB "
        f"| {options.clock} s | over padded, 1 |"
    )
    print("|---|---|---|---|---|---|---|")
    for label, (most, draw) in CASES.items():
        setup = setup_of(most)
        prompts = collate(setup.prompts, indices_at(0, _ROWS, len(setup.prompts), 0))
        batch = to_train_batch(draw(setup, prompts), prompts)
        width = batch.tokens.shape[1]
        settings = {
            "padded, 1": (1, None),
            f"padded, {_PARTS}": (_PARTS, None),
            f"packed, {_PARTS}": (_PARTS, width),
            f"packed, {_PARTS}, twice as long": (_PARTS, 2 * width),
        }
        forms = {name: form(setup, batch, *each) for name, each in settings.items()}
        found = alternate(
            {name: step for name, (step, *_) in forms.items()},
            options.repeats,
            CLOCKS[options.clock],
        )
        seconds = {name: statistics.median(values) for name, values in found.items()}
        for name, (_, filled, memory) in forms.items():
            print(
                f"| {label} | {name} | {filled} | {memory:.1f} | {seconds[name]:.4f} "
                f"| {seconds[name] / seconds['padded, 1']:.2f} |"
            )


if __name__ == "__main__":
    main()
