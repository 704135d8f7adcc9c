"""Generated tokens a second of the sampler, on a random model."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from benchmarks.core import Row, alternate, progress, report
from benchmarks.models import MODELS, decoder_of, forward_flops, product_rate
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
    after another, each as long as its longest row. Only tokens up to the stop token count. `x
    floor` is the time relative to that of the matrix products of these tokens at the rate of a
    large product on this machine.
    """
    parser.set_defaults(run=sampler, repeats=5)
    add = parser.add_argument
    add("--only", choices=("equal", "tail"), help="one of the two")
    add("--vocab", type=int, nargs="+", default=[4096, 151_936], help="sizes of the vocabulary")
    add("--slots", type=int, default=16, help="rows that are decoded at a time")
    add("--prompt", type=int, default=32, help="tokens of a prompt")
    add("--length", type=int, default=128, help="most tokens of a completion")


def prompts_of(rows: int, width: int, vocab: int) -> PromptBatch:
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, width)).astype(np.int32)
    return PromptBatch(tokens, np.ones((rows, width), bool), np.arange(rows, dtype=np.int32))


def form(
    model: DecoderConfig, params: dict, options: argparse.Namespace, rows: int, stop: tuple, **how
) -> dict[str, Callable]:
    """Return the ways to sample `rows` completions; each run draws with another seed."""
    decoding, slots = Decoding(options.length, stop, **how), options.slots
    prompts = prompts_of(rows, options.prompt, model.vocab_size)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + slots], prompts) for i in range(0, rows, slots)]
    draw = partial(sample, config=model, decoding=decoding)
    seeds = iter(range(10**6))

    def batches():
        seed = next(seeds)
        return [draw(params, part, seed, 0).mask for part in parts]

    def refilled():
        return [draw(params, prompts, next(seeds), 0, slots=slots).mask]

    return {"batches": batches} | ({"refilled": refilled} if rows > slots else {})


def lengths_of(masks: list[jax.Array]) -> np.ndarray:
    return np.concatenate([np.asarray(mask).sum(axis=1) for mask in masks])


def measure(model, works, options: argparse.Namespace, label: str, rate: float) -> list[Row]:
    rows = []
    for name, runs in alternate(works, options.repeats, lengths_of).items():
        floors = []
        for lengths in runs.results:
            # A sampled token attends to the prompt and, on average, to half of its completion.
            contexts = np.sum((options.prompt + lengths) ** 2) / 2
            tokens = np.sum(options.prompt + lengths)
            floors.append(forward_flops(model, tokens, contexts, np.sum(lengths)) / rate)
        counts = [int(lengths.sum()) for lengths in runs.results]
        lengths = np.concatenate(runs.results)
        row = {
            "V": model.vocab_size,
            "lengths": label,
            "form": name,
            "mean of longest": f"{lengths.mean():.0f} of {lengths.max()}",
            "tokens/s": [count / seconds for count, seconds in zip(counts, runs.wall)],
            "tokens per CPU second": [count / seconds for count, seconds in zip(counts, runs.cpu)],
            "x floor": statistics.median(a / b for a, b in zip(runs.wall, floors)),
        }
        rows.append(progress(row))
    return rows


def sampler(options: argparse.Namespace) -> None:
    rows, rate = [], product_rate()
    for vocab in options.vocab:
        model = decoder_of(MODELS["3.4M"] | {"vocab_size": vocab})
        params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
        sampled = partial(form, model, params, options)
        if options.only != "tail":
            works = {
                name: sampled(options.slots, (vocab,), **how)["batches"]
                for name, how in FILTERS.items()
            }
            rows += measure(model, works, options, "equal", rate)
        if options.only != "equal":
            stop = tuple(range(round(vocab * STOP_SHARE)))
            works = sampled(8 * options.slots, stop)
            rows += measure(model, works, options, "tail", rate)
    note = f"The floor is at {rate / 1e9:.0f} GFLOP/s, the rate of a large matrix product."
    report(rows, options, [note], flops_per_second=rate)
