"""Seconds and memory of loading a checkpoint, beside a plain read of its files."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import resource
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks.core import Row, progress, report
from benchmarks.models import MODELS
from opdjax.models.decoder import abstract_params
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.models.hf_export import export


def add_load(parser: argparse.ArgumentParser) -> None:
    """Measure `load_params` against a plain read of the same files into memory.

    Each runs in a process of its own, whose peak memory is read, and after a read that leaves the
    files in the system's cache.
    """
    parser.set_defaults(run=load, repeats=3)
    add = parser.add_argument
    add("--model", choices=MODELS, default="1.7B", help="shapes of a bfloat16 checkpoint to write")
    add("--checkpoint", type=pathlib.Path, help="an own checkpoint in place of it")


def load(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or write_ones(options.model, pathlib.Path(folder))
        kinds = ("plain read", "bfloat16", "float32")
        jobs = [(path, kind) for _ in range(options.repeats) for kind in kinds]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            found = pool.starmap(measure, jobs, chunksize=1)
    by_kind = {kind: found[number :: len(kinds)] for number, kind in enumerate(kinds)}
    rows = []
    for kind, runs in by_kind.items():
        row = {"kind": kind, **{name: [run[name] for run in runs] for name in runs[0]}}
        pairs = zip(row["seconds"], (run["seconds"] for run in by_kind["plain read"]))
        rows.append(progress(row | {"of a plain read": [own / plain for own, plain in pairs]}))
    report(rows, options)


def write_ones(model: str, folder: pathlib.Path) -> pathlib.Path:
    """Write a checkpoint of these shapes without a tokenizer; all weights are 1."""
    (folder / "config.json").write_text(json.dumps(MODELS[model]))
    source = open_checkpoint(folder)
    shapes = abstract_params(source.config, "bfloat16")
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    return export(params, source, folder / "model", "bfloat16")


def measure(path: pathlib.Path, kind: str) -> Row:
    """Return the seconds of a read, or of a load to a dtype, and the growth of the peak memory."""
    files, checkpoint = list(path.glob("*.safetensors")), open_checkpoint(path)
    for file in files:
        with file.open("rb") as weights:
            while weights.read(2**24):
                pass
    jax.devices()
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes
    before, cpu, begin = peak(), time.process_time(), time.perf_counter()
    if kind == "plain read":
        size = sum(map(len, [file.read_bytes() for file in files]))
    else:
        params = jax.block_until_ready(load_params(checkpoint, kind))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    grown = (peak() - before) / size
    return {"GB": size / 1e9, "seconds": seconds, "CPU seconds": cpu, "peak / weights": grown}
