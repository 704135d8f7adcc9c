"""Tokens per second of the sampler: equal lengths, a long tail with and without refilled slots,
filters, a small and a real vocabulary.

    python scripts/benchmark_sampler.py                    # about five minutes on two quiet cores
    python scripts/benchmark_sampler.py --only tail --repeats 3

A random Qwen3-like model of 3.4 M parameters beside its embedding of V rows (4 layers, width 256),
float32, 16 slots, prompts of 32 tokens, completions of up to 128. `equal`: one row a slot and no
stop token. `tail`: 8 rows a slot; the stop tokens are as many of the vocabulary as a random model
gives one chance in 25 to, so that lengths are geometric, cut at the limit (the table says what they
came to). A random model's distribution is nearly flat: the hardest for top-p, whose kept set is
then large. `refilled` decodes 16 rows at a time and gives a finished one's slot to the next;
`batches` calls the sampler for 16 rows after another, each batch as long as its longest row. Rows
of a table are run in turn, medians are over the turns, only tokens that were kept count, and CPU
seconds are those of the process: on a machine that does other work they say more than the wall.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from benchmark_vocab import cpu_model

from opdjax.engine import sampler
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import sample
from opdjax.models.decoder import DecoderConfig, init_params
from opdjax.models.rope import Rope
from opdjax.runs.workdir import num_cores
from opdjax.types import PromptBatch

SLOTS, WIDTH, LENGTH, ROWS_PER_SLOT, STOP_CHANCE = 16, 32, 128, 8, 1 / 25
FILTERS = {"plain": {}, "top-p 0.95": {"top_p": 0.95}, "greedy": {"temperature": 0.0}}
VOCABULARIES = {"small": 4096, "real": 151_936}


def model(vocab: int) -> tuple[DecoderConfig, dict]:
    config = DecoderConfig(
        vocab_size=vocab,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_size=32,
        intermediate_size=768,
        rope=Rope(1e6),
        norm_epsilon=1e-6,
        ties_embeddings=True,
        has_qk_norm=True,
        has_qkv_bias=False,
        has_output_bias=False,
    )
    return config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


def prompts_of(rows: int, vocab: int) -> PromptBatch:
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, WIDTH)).astype(np.int32)
    return PromptBatch(tokens, np.ones((rows, WIDTH), bool), np.arange(rows, dtype=np.int32))


def part_of(prompts: PromptBatch, start: int) -> PromptBatch:
    return jax.tree.map(lambda x: x[start : start + SLOTS], prompts)


def runs_of(
    config: DecoderConfig, params: dict, rows: int, stop: tuple[int, ...], **options
) -> dict[str, Callable]:
    """name -> seed -> (tokens that were kept, mean length, longest)."""
    decoding, prompts = Decoding(LENGTH, stop, **options), prompts_of(rows, config.vocab_size)

    def counted(*rollouts) -> tuple[int, float, int]:
        lengths = np.concatenate([np.asarray(part.mask).sum(1) for part in rollouts])
        return int(lengths.sum()), float(lengths.mean()), int(lengths.max())

    def draw(prompts: PromptBatch, seed: int, slots: int | None = None):
        return sample(params, prompts, seed, 0, config=config, decoding=decoding, slots=slots)

    batches = {
        "batches": lambda seed: counted(
            *(draw(part_of(prompts, i), seed) for i in range(0, rows, SLOTS))
        )
    }
    return batches | (
        {"refilled": lambda seed: counted(draw(prompts, seed, SLOTS))} if rows > SLOTS else {}
    )


def measure(runs: dict[str, Callable], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of alternating runs, after one that is not counted."""
    found: dict[str, list] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            tokens, mean, longest = run(turn)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            found[name].append(
                {
                    "wall": tokens / seconds,
                    "cpu": tokens / cpu_seconds,
                    "mean": mean,
                    "longest": longest,
                }
            )
    return {
        name: {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
        for name, rows in found.items()
    }


def print_rows(label: str, vocab: int, runs: dict[str, Callable], repeats: int) -> None:
    for name, row in measure(runs, repeats).items():
        lengths = f"{row['mean']:.0f} of {row['longest']:.0f}"
        print(
            f"| {vocab:,} | {label} | {name} | {lengths} | {row['wall']:,.0f} | {row['cpu']:,.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("equal", "tail"))
    parser.add_argument("--vocabulary", choices=tuple(VOCABULARIES), help="one of the two")
    parser.add_argument(
        "--free-share",
        type=int,
        nargs="+",
        help="of the tail: refill once one slot in so many is free",
    )
    options = parser.parse_args()
    print(
        f"Machine: {cpu_model()}, {num_cores()} cores; jax {jax.__version__} on {jax.default_backend()}.\n"
    )
    print(
        "| V | lengths | form | mean of longest | tokens/s | tokens per CPU second |\n|---|---|---|---|---|---|"
    )
    for name in [options.vocabulary] if options.vocabulary else VOCABULARIES:
        vocab = VOCABULARIES[name]
        config, params = model(vocab)
        repeats = options.repeats if name == "small" else max(options.repeats // 2, 1)
        if options.only != "tail":
            runs = {
                label: runs_of(config, params, SLOTS, (vocab,), **filters)["batches"]
                for label, filters in FILTERS.items()
            }
            print_rows("equal", vocab, runs, repeats)
        if options.only != "equal" and name == "small":
            stop = tuple(range(round(vocab * STOP_CHANCE)))
            runs = runs_of(config, params, SLOTS * ROWS_PER_SLOT, stop)
            for share in options.free_share or ():
                refill = runs_of(config, params, SLOTS * ROWS_PER_SLOT, stop)["refilled"]
                runs[f"refilled, 1 of {share} free"] = lambda seed, share=share, refill=refill: (
                    with_share(share, refill, seed)
                )
            print_rows("tail", vocab, runs, repeats)


def with_share(share: int, run: Callable, seed: int) -> tuple[int, float, int]:
    usual, sampler._FREE_SHARE = sampler._FREE_SHARE, share
    try:
        return run(seed)
    finally:
        sampler._FREE_SHARE = usual


if __name__ == "__main__":
    main()
