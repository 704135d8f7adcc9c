"""Seconds of a checkpoint: its digests, its save and its restore, with random weights."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks.core import progress, report
from benchmarks.models import MODELS, decoder_of
from opdjax.engine.update import TrainState
from opdjax.models.decoder import abstract_params
from opdjax.runs.checkpoint import Checkpointer, digests


def add_save(parser: argparse.ArgumentParser) -> None:
    """Measure the digests of a training state against the save that they belong to.

    The state has float32 parameters and two moments, all random, as those of Adam are. `digests`
    is also part of `save`, which includes the wait for the disk, and of `restore`. The first round
    compiles and is not counted.
    """
    parser.set_defaults(run=save, repeats=2)
    add = parser.add_argument
    add("--model", choices=MODELS, default="1.7B", help="shapes of the parameters")
    add("--layers", type=int, help="layers, if not those of the model")
    add("--directory", type=pathlib.Path, help="where to write; default: a temporary directory")


def random_state(options: argparse.Namespace) -> TrainState:
    """Return a state of the model's size."""
    model = decoder_of(MODELS[options.model])
    if options.layers:
        model = dataclasses.replace(model, num_layers=options.layers)
    shapes, treedef = jax.tree.flatten(abstract_params(model, "float32"))
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape), static_argnums=1)

    def random(seed: int) -> dict:
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return treedef.unflatten([draw(key, leaf.shape) for key, leaf in zip(keys, shapes)])

    zero = jnp.int32(0)
    return TrainState(zero, random(0), (random(1), random(2)), zero, zero)


def save(options: argparse.Namespace) -> None:
    state = random_state(options)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        checkpointer = Checkpointer(pathlib.Path(folder), keep=1)
        found: dict[str, list[tuple[float, float]]] = {}

        def timed(name, work, *args) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(work(*args))
            spent = time.perf_counter() - wall, time.process_time() - cpu
            found.setdefault(name, []).append(spent)

        def write(step: int) -> None:
            timed("of it, until the run goes on", checkpointer.save, step, state)
            checkpointer.wait()

        for step in range(options.repeats + 1):
            timed("digests", digests, state)
            timed("save", write, step)
            timed("restore", checkpointer.restore, step, state)
        checkpointer.close()
    rows, saves = [], found["save"][1:]
    for name, spent in found.items():
        wall, cpu = (list(column) for column in zip(*spent[1:]))
        row = {"part": name, "seconds": wall, "CPU seconds": cpu}
        shares = [100 * own[0] / whole[0] for own, whole in zip(spent[1:], saves)]
        row["% of a save's seconds"] = shares
        row["% of its CPU seconds"] = [100 * a[1] / b[1] for a, b in zip(spent[1:], saves)]
        rows.append(progress(row))
    report(rows, options, [f"State: {size / 1e9:.2f} GB in {len(jax.tree.leaves(state))} arrays."])
