"""Weights in 8 bits against those in the dtype of the forward pass: memory, error, seconds."""

from __future__ import annotations

import argparse
from functools import partial
from typing import get_args

import jax
import numpy as np

from benchmarks.core import Row, alternate, progress, report
from opdjax.config import DataConfig, FrozenWeights
from opdjax.data.packing import to_train_batch
from opdjax.data.prompts import collate, encode_prompts, load_rows
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import sample
from opdjax.engine.scorer import score
from opdjax.estimators.divergence import reverse_kl
from opdjax.models.decoder import head_of
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.vocab import TILE, TokenInputs, tiled_stats


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Measure a model whose weights are held in 8 bits against the same model without rounding.

    The model samples answers to prompts at T = 1, and both score them: the mean and the 99 %
    quantile of |difference of log-probs| of the sampled tokens, the mean of KL(unrounded ||
    rounded) and the share of tokens with the same most likely id, in float32 or `--dtype`.
    """
    parser.set_defaults(run=weights, repeats=5)
    add = parser.add_argument
    add("--model", default="@mini_teacher", help="default: %(default)s")
    add("--source", default="arithmetic:test[:64]", help="of the prompts; default: %(default)s")
    add("--length", type=int, default=48, help="most tokens of an answer")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")


def weights(options: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(options.model)
    tokenizer, data = load_tokenizer(checkpoint.path), DataConfig(options.source)
    rows = load_rows(data, tokenizer, checkpoint.stop_token_ids, ())
    prompts = encode_prompts(rows, data, tokenizer, tokenizer)
    models = {
        kind: load_params(checkpoint, options.dtype, weights=kind)
        for kind in get_args(FrozenWeights)
    }
    prompt_batch = collate(prompts, np.arange(len(prompts)))
    decoding = Decoding(options.length, checkpoint.stop_token_ids)
    exact = models["dtype"]
    rollouts = sample(exact, prompt_batch, 0, 0, config=checkpoint.config, decoding=decoding)
    batch = jax.device_get(to_train_batch(rollouts, prompt_batch))
    run = partial(score, batch=batch, config=checkpoint.config)
    works = {
        kind: partial(run, params, head_of(params), needs="token")
        for kind, params in models.items()
    }
    timed = alternate(works, options.repeats, describe=lambda scores: scores.teacher_logprobs)
    reference = run(exact, head_of(exact), needs="vocabulary").hidden
    table = []
    for kind, params in models.items():
        hidden = run(params, head_of(params), needs="vocabulary").hidden
        kl, agrees = compare(reference, head_of(exact), hidden, head_of(params), batch)
        gap = np.abs(timed[kind].results[0] - timed["dtype"].results[0])[batch.mask]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        row: Row = {"weights": kind, "MB": size / 1e6, "seconds": timed[kind].wall}
        row |= {"mean |Δ log-prob|": float(gap.mean()), "99 %": float(np.quantile(gap, 0.99))}
        table.append(progress(row | {"KL": kl, "same most likely id": agrees}))
    report(table, options, [f"{int(batch.mask.sum())} tokens of {len(prompts)} answers."])


def compare(hidden, head, other_hidden, other_head, batch) -> tuple[float, float]:
    """Return the mean of KL(model || other) over the batch's tokens, and the share of tokens with
    the same most likely id.
    """

    def of_token(model, other, row):
        return reverse_kl(model, other), model.top_k(1)[:, 0] == other.top_k(1)[:, 0]

    other, inputs = (other_hidden, other_head), TokenInputs(batch.tokens)
    found = tiled_stats(of_token, hidden, head, batch.mask, inputs, other, tile=TILE)
    return tuple(float(np.mean(np.asarray(values)[batch.mask])) for values in found)
