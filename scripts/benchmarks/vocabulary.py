"""The work on the vocabulary from hidden states: the teacher's scores, the loss, both gradients.

Float32, one row; the teacher is hidden states and a head of the student's size.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.core import Row, alternate, progress, report, temp_mib
from opdjax.engine.step_metrics import observed
from opdjax.estimators import Estimator, bind
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_loss, tiled_stats

DENSE_LIMIT = 2**37  # bytes of a [T, V] array: above, the dense form is not compiled
STORED, BASE = "npd, teacher's 10, stored", "full_kl, reverse"
SUPPORT = {"support_top_k": 100}
RECIPES = {
    "sft": bind("sft"),
    "opd": bind("opd"),
    "vopd, top 100": bind("vopd", {"baseline": "student_topk", "support_top_k": 100}),
    "vopd, full": bind("vopd", {"baseline": "full"}),
    BASE: bind("full_kl", {"divergence": "reverse"}),
    "full_kl, jsd": bind("full_kl", {"divergence": "jsd"}),
    "topk_kl, student's 100, renormalised": bind("topk_kl", SUPPORT),
    "topk_kl, student's 100, tail": bind(
        "topk_kl", SUPPORT | {"renormalize": "none", "outside": "tail"}
    ),
    "npd, teacher's 10": bind("npd"),
    STORED: bind("npd"),
}


def make_arguments(tokens: int, vocab: int, width: int) -> tuple[jax.Array, ...]:
    """Return hidden states, head, weights and tokens of a student; states and head of a teacher."""
    keys = jax.random.split(jax.random.key(0), 5)
    kernel = jax.random.normal(keys[0], (vocab, width)) / width**0.5
    teacher_kernel = kernel + 0.3 * jax.random.normal(keys[1], (vocab, width)) / width**0.5
    hidden = 2 * jax.random.normal(keys[2], (1, tokens, width))
    teacher_hidden = hidden + 0.3 * jax.random.normal(keys[3], (1, tokens, width))
    weights = jnp.full((1, tokens), 1 / (tokens - 1)).at[:, 0].set(0)
    token = jax.random.randint(keys[4], (1, tokens), 0, vocab)
    return hidden, kernel, weights, token, teacher_hidden, teacher_kernel


def read_teacher(
    estimator: Estimator, tile: int, weights, token, hidden, kernel
) -> tuple[TokenInputs, tuple[Any, Head] | None]:
    """Return what the recipe reads of the teacher: columns per token, or its states and head."""
    columns, teacher = TokenInputs(token), (hidden, Head(kernel))
    if estimator.teacher == "vocabulary":
        return columns, teacher
    read = lambda stat: tiled_stats(stat, *teacher, weights > 0, columns, tile=tile)
    if estimator.teacher == "token":
        logprobs = read(lambda tile, _, row: tile.logprob(row.tokens))
        columns = TokenInputs(token, logprobs)
    elif estimator.teacher == "top_k":

        def top_k(tile, _, row):
            ids = tile.top_k(estimator.top_k)
            return ids, tile.logprob(ids)

        ids, logprobs = read(top_k)
        columns = dataclasses.replace(columns, teacher_top_ids=ids, teacher_top_logprobs=logprobs)
    return columns, None


def recipe_form(label: str, tile: int, is_observed: bool) -> Callable:
    """Return the loss of a recipe as a function of `make_arguments`, also with diagnostics."""
    estimator = RECIPES[label]
    token_loss = observed(estimator.token_loss) if is_observed else estimator.token_loss

    def loss(hidden, kernel, weights, token, *teacher):
        if label == STORED:
            ids = (token[..., None] + jnp.arange(estimator.top_k)) % kernel.shape[0]
            logprobs = jnp.full(ids.shape, -3, jnp.float16)
            columns = TokenInputs(token, teacher_top_ids=ids, teacher_top_logprobs=logprobs)
            given = None
        else:
            columns, given = read_teacher(estimator, tile, weights, token, *teacher)
        if is_observed:
            columns = dataclasses.replace(columns, is_observed=jnp.ones(token.shape, bool))
        return tiled_loss(token_loss, hidden, Head(kernel), weights, columns, given, tile=tile)

    return loss


def dense_form(hidden, kernel, weights, token, teacher_hidden, teacher_kernel):
    """Return the reverse KL with all logits, two log-softmaxes and a sum over the vocabulary."""
    student = jax.nn.log_softmax(hidden[:, :-1] @ kernel.T)
    teacher = jax.nn.log_softmax(teacher_hidden[:, :-1] @ teacher_kernel.T)
    each = jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)
    return jnp.sum(weights[:, 1:] * each), None


def compile_form(loss: Callable, *sizes: int) -> Any:
    """Return the program of loss and gradients for `sizes`, those of `make_arguments`."""
    shapes = jax.eval_shape(partial(make_arguments, *sizes))
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*shapes).compile()


def measure(forms: dict[str, Callable], base: str, sizes: tuple, repeats: int) -> list[Row]:
    """Return a row per form; memory and seconds are also given relative to `base`.

    Without repeats, the programs are compiled and not run.
    """
    compiled = {name: compile_form(loss, *sizes) for name, loss in forms.items()}
    describe = lambda result: (
        float(result[0][0]),
        [float(jnp.linalg.norm(gradient)) for gradient in result[1]],
    )
    timed = {}
    if repeats:
        arguments = make_arguments(*sizes)
        works = {name: partial(program, *arguments) for name, program in compiled.items()}
        timed = alternate(works, repeats, describe)
    rows = []
    for name, program in compiled.items():
        row = {"T": sizes[0], "V": sizes[1], "form": name, "XLA temp MiB": temp_mib(program)}
        if base in compiled:
            row[f"temp / {base}"] = temp_mib(program) / temp_mib(compiled[base])
        if name in timed:
            loss, norms = timed[name].results[-1]
            pairs = zip(timed[name].wall, timed[base].wall)
            row |= timed[name].row() | {f"seconds / {base}": [one / other for one, other in pairs]}
            row |= {"loss": loss, "gradient norms": " ".join(f"{norm:.6e}" for norm in norms)}
        rows.append(progress(row))
    return rows


def add_sizes(parser: argparse.ArgumentParser, tokens: int) -> None:
    add = parser.add_argument
    add("--tokens", type=int, default=tokens, help="tokens of the timed comparison")
    add("--vocab", type=int, nargs="+", default=[151_936], help="sizes of the vocabulary")
    add("--width", type=int, default=1024, help="width of the hidden states")
    add("--tile", type=int, default=128, help="tokens per tile")


def add_vocab(parser: argparse.ArgumentParser) -> None:
    """Compare the tiled vocabulary pass with plain logits: time and memory of the reverse KL."""
    parser.set_defaults(run=vocab, repeats=3)
    add_sizes(parser, tokens=512)
    parser.add_argument(
        "--compiled-tokens",
        type=int,
        nargs="*",
        default=[8192],
        help="tokens of the comparisons that are compiled but not run",
    )


def vocab(options: argparse.Namespace) -> None:
    rows = []
    for size in options.vocab:
        for tokens in (options.tokens, *options.compiled_tokens):
            forms = {"dense": dense_form, "tiled": recipe_form(BASE, options.tile, False)}
            if 4 * tokens * size > DENSE_LIMIT:
                del forms["dense"]
            is_timed = tokens == options.tokens and "dense" in forms
            repeats = options.repeats if is_timed else 0
            rows += measure(forms, "dense", (tokens, size, options.width), repeats)
    note = "Both forms sum the head's gradient in float32; its [V, D] array is part of both."
    report(rows, options, [note])


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """Measure time and memory of each recipe's work on the vocabulary.

    Sampling and both forward passes are the same for every recipe and are left out. `opd` reads one
    log-prob a token, which still needs the teacher's whole softmax. `npd` is annotation and one
    step together; with stored ids it is the cost of each further step.
    """
    parser.set_defaults(run=recipes, repeats=3)
    add_sizes(parser, tokens=256)
    more = "also measure each recipe with the diagnostics that a step computes now and then"
    parser.add_argument("--diagnostics", action="store_true", help=more)


def recipes(options: argparse.Namespace) -> None:
    rows = []
    for size in options.vocab:
        forms = {label: recipe_form(label, options.tile, False) for label in RECIPES}
        if options.diagnostics:
            for label in RECIPES:
                forms[f"{label}, observed"] = recipe_form(label, options.tile, True)
        sizes = (options.tokens, size, options.width)
        rows += measure(forms, BASE, sizes, options.repeats)
    report(rows, options)
