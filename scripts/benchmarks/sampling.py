"""Generated tokens a second of the sampler, on a random model."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from benchmarks.core import Row, alternate, progress, report
from benchmarks.models import MODELS, decoder_of
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import sample
from opdjax.models.decoder import DecoderConfig, init_params
from opdjax.types import PromptBatch

FILTERS = {"plain": {}, "top-p 0.95": {"top_p": 0.95}, "greedy": {"temperature": 0.0}}
STOP_SHARE = 1 / 25  # of a vocabulary that a random model draws from nearly evenly


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """Measure generated tokens a second, with equal lengths and with a long tail.

    A random model of 3.4 M parameters beside its embedding, float32. `equal`: one row a slot, no
    stop token, with several filters; the model's distribution is nearly flat, which is the hardest
    for top-p. `tail`: eight rows a slot, and stop tokens that make lengths geometric up to the
    limit. `refilled` gives the slot of a finished row to the next one; `batches` samples one batch
    after another, each as long as its longest row. Only tokens up to the stop token count.
    """
    parser.set_defaults(run=sampler, repeats=5)
    add = parser.add_argument
    add("--vocab", type=int, nargs="+", default=[4096, 151_936], help="sizes of the vocabulary")
    add("--slots", type=int, default=16, help="rows that are decoded at a time")
    add("--prompt", type=int, default=32, help="tokens of a prompt")
    add("--length", type=int, default=128, help="most tokens of a completion")


def form(
    model: DecoderConfig, params: dict, options: argparse.Namespace, rows: int, stop: tuple, **how
) -> dict[str, Callable]:
    """Return the ways to sample `rows` completions; each run draws with another seed."""
    slots, numbers, seeds = options.slots, np.arange(rows, dtype=np.int32), itertools.count()
    shape = (rows, options.prompt)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape).astype(np.int32)
    prompts = PromptBatch(tokens, np.ones(shape, bool), numbers)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + slots], prompts) for i in range(0, rows, slots)]
    draw = partial(sample, params, config=model, decoding=Decoding(options.length, stop, **how))
    refilled = lambda: [draw(prompts, next(seeds), 0, slots=slots).mask]
    batches = lambda: [draw(part, next(seeds), 0).mask for part in parts]
    return {"batches": batches} | ({"refilled": refilled} if rows > slots else {})


def measure(model, works, options: argparse.Namespace, label: str) -> list[Row]:
    rows = []
    lengths_of = lambda masks: np.concatenate([np.asarray(mask).sum(axis=1) for mask in masks])
    for name, runs in alternate(works, options.repeats, lengths_of).items():
        counts = [int(lengths.sum()) for lengths in runs.results]
        lengths = np.concatenate(runs.results)
        row = {
            "V": model.vocab_size,
            "lengths": label,
            "form": name,
            "mean of longest": f"{lengths.mean():.0f} of {lengths.max()}",
            "tokens/s": [count / seconds for count, seconds in zip(counts, runs.wall)],
            "tokens per CPU second": [count / seconds for count, seconds in zip(counts, runs.cpu)],
        }
        rows.append(progress(row))
    return rows


def sampler(options: argparse.Namespace) -> None:
    rows = []
    for vocab in options.vocab:
        model = decoder_of(MODELS["3.4M"] | {"vocab_size": vocab})
        params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
        sampled = partial(form, model, params, options)
        equal = {name: sampled(options.slots, (vocab,), **how) for name, how in FILTERS.items()}
        works = {name: ways["batches"] for name, ways in equal.items()}
        rows += measure(model, works, options, "equal")
        tail = sampled(8 * options.slots, tuple(range(round(vocab * STOP_SHARE))))
        rows += measure(model, tail, options, "tail")
    report(rows, options)
