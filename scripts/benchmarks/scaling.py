"""Memory, collectives and seconds of an update by model, size and mesh."""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.core import Row, progress, report
from benchmarks.models import MODELS
from opdjax.config import OptimizerConfig
from opdjax.diagnose.plan.hlo import collectives
from opdjax.engine.update import UpdateSpec, init_state, make_optimizer, make_update
from opdjax.estimators import bind
from opdjax.models.decoder import DecoderConfig, head_of, init_params
from opdjax.models.partitioning import shardings_of
from opdjax.ops.sharding import abstract_like, by_row, make_mesh
from opdjax.ops.tile import Head
from opdjax.types import TeacherScores, TrainBatch

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def add_scaling(parser: argparse.ArgumentParser) -> None:
    """Measure how the cost of an update of full-vocabulary distillation grows with size and mesh.

    Temporary memory is XLA's own figure for one device, without arguments and results. Nothing is
    run without `--timed`, so sizes may exceed this machine's memory. Collectives are read from the
    compiled program; one in a loop of unknown trip count counts once. A mesh is data x fsdp x
    tensor.
    """
    parser.set_defaults(run=scaling, repeats=3)
    add = parser.add_argument
    add("--timed", action="store_true", help="run the updates too")
    add("--devices", type=int, default=8, help="simulated CPU devices; 0: this machine's devices")
    meshes = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]
    add("--mesh", nargs="+", type=mesh_sizes, default=meshes, help="such as 2x2x2")
    add("--models", nargs="+", choices=tuple(MODELS), default=["3.4M"])
    add("--batch", nargs="+", type=int, default=[8, 32], help="rows of an update")
    add("--length", nargs="+", type=int, default=[256, 1024], help="tokens of a row")
    add("--tile", type=int, default=512, help="tokens per tile of the vocabulary pass")
    dtypes = ("float32", "bfloat16")
    add("--dtype", choices=dtypes, default="float32", help="type of the forward pass")
    remats = ("none", "dots", "layer")
    add("--remat", choices=remats, default="none", help="what the backward pass recomputes")


def mesh_sizes(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        message = f"{text!r} is no mesh; expected DATAxFSDPxTENSOR such as 2x2x2"
        raise argparse.ArgumentTypeError(message)
    return tuple(map(int, sizes))


def scaling(options: argparse.Namespace) -> None:
    # A program that is read from the cache has no compile time.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    settings = itertools.product(options.models, options.batch, options.length, options.mesh)
    rows = []
    for name, batch, length, sizes in settings:
        row = {"model": name, "mesh": "x".join(map(str, sizes)), "batch": batch, "length": length}
        row |= update_row(MODELS[name], make_mesh(*sizes), batch, length, options)
        rows.append(progress(row))
    report(rows, options)


def update_row(
    model: DecoderConfig, mesh: Mesh, batch: int, length: int, options: argparse.Namespace
) -> Row:
    optimizer = OptimizerConfig()
    spec = UpdateSpec(
        model=model,
        estimator=bind("full_kl", tile=options.tile),
        dtype=options.dtype,
        max_completion_length=length,
        remat=options.remat,
        mesh=mesh,
    )
    update = make_update(spec, optimizer, num_steps=1000)

    def start():
        params = init_params(model, jax.random.key(0))
        head = head_of(params).kernel.astype(options.dtype)
        state = init_state(params, make_optimizer(optimizer, 1000), mesh)
        return state, batch_of(model, batch, length, options.dtype), head

    state, rows, head = jax.eval_shape(start)
    place = lambda tree: abstract_like(tree, shardings_of(tree, mesh))
    on_mesh = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row(mesh))
    abstract = place(state), jax.tree.map(on_mesh, rows), place({"head": head})["head"]
    began = time.perf_counter()
    compiled = update.lower(*abstract[:2], Head(abstract[2])).compile()
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    row = {
        "compile s": seconds,
        "temp MiB": memory.temp_size_in_bytes / 2**20,
        "arguments MiB": memory.argument_size_in_bytes / 2**20,
    } | traffic_of(compiled.as_text())
    if options.timed:
        row["seconds"] = step_seconds(compiled, start, abstract, options.repeats)
    return row


def batch_of(model: DecoderConfig, batch: int, length: int, dtype: str) -> TrainBatch:
    """Return rows whose second half was sampled; the teacher has the student's width."""
    tokens = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length) % model.vocab_size
    mask = jnp.broadcast_to(jnp.arange(length) >= length // 2, tokens.shape)
    teacher = TeacherScores(hidden=jnp.ones((batch, length, model.hidden_size), dtype))
    segments, logprobs = jnp.ones_like(tokens), jnp.zeros(tokens.shape)
    return TrainBatch(tokens, mask, segments, logprobs, teacher=teacher)


def traffic_of(text: str) -> Row:
    """Return how many collectives of each kind a program runs on a device, and their MiB."""
    counts, found = Counter(), collectives(text)
    for each in found:
        counts[each.kind] += each.times
    sent = sum(each.num_bytes * each.times for each in found)
    return {kind: counts[kind] for kind in KINDS} | {"collectives MiB": sent / 2**20}


def step_seconds(compiled: Any, start: Any, abstract: tuple, repeats: int) -> list[float]:
    """Return the seconds of each step after one uncounted step."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state, rows, head = jax.jit(start, out_shardings=shardings)()
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, rows, Head(head)))
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
