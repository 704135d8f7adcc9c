"""The work on the vocabulary from hidden states: the teacher's scores, the loss, both gradients.

Float32, one row; the teacher is hidden states and a head of the student's size.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.core import Row, alternate, progress, report
from opdjax.engine.scorer import token_scores
from opdjax.engine.step_metrics import observed
from opdjax.estimators import bind
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_loss
from opdjax.types import TrainBatch

BASE, SUPPORT = "full_kl, reverse", {"support_top_k": 100}
RECIPES = {
    "sft": bind("sft"),
    "opd": bind("opd"),
    "vopd, top 100": bind("vopd", {"baseline": "student_topk"} | SUPPORT),
    "vopd, full": bind("vopd", {"baseline": "full"}),
    BASE: bind("full_kl", {"divergence": "reverse"}),
    "full_kl, jsd": bind("full_kl", {"divergence": "jsd"}),
    "topk_kl, student's 100": bind("topk_kl", SUPPORT),
    "npd, teacher's 10": bind("npd"),
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


def recipe_form(label: str, tile: int, is_observed: bool) -> Callable:
    """Return the loss of a recipe as a function of `make_arguments`, also with diagnostics."""
    estimator = RECIPES[label]
    token_loss = observed(estimator.token_loss) if is_observed else estimator.token_loss

    def loss(hidden, kernel, weights, token, teacher_hidden, teacher_kernel):
        columns, teacher = TokenInputs(token), (teacher_hidden, Head(teacher_kernel))
        if estimator.teacher in ("token", "top_k"):  # XLA leaves out what the recipe does not read
            top_k = estimator.top_k if estimator.teacher == "top_k" else 0
            batch = TrainBatch(token, weights > 0, jnp.ones_like(token), None)
            found = token_scores(*teacher, batch, tile=tile, top_k=top_k)
            scores = {name: value for name, value in vars(found).items() if name != "hidden"}
            columns = dataclasses.replace(columns, **scores)
        if is_observed:
            columns = dataclasses.replace(columns, is_observed=jnp.ones(token.shape, bool))
        given = teacher if estimator.teacher == "vocabulary" else None
        return tiled_loss(token_loss, hidden, Head(kernel), weights, columns, given, tile=tile)

    return loss


def dense_form(hidden, kernel, weights, token, teacher_hidden, teacher_kernel):
    """Return the reverse KL with all logits, two log-softmaxes and a sum over the vocabulary."""
    student = jax.nn.log_softmax(hidden[:, :-1] @ kernel.T)
    teacher = jax.nn.log_softmax(teacher_hidden[:, :-1] @ teacher_kernel.T)
    each = jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)
    return jnp.sum(weights[:, 1:] * each), None


def measure(forms: dict[str, Callable], base: str, sizes: tuple, repeats: int) -> list[Row]:
    """Return a row per form; memory and seconds are also given relative to `base`.

    Without repeats, the programs are compiled and not run.
    """
    shapes = jax.eval_shape(partial(make_arguments, *sizes))
    lower = lambda loss: jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*shapes)
    compiled = {name: lower(loss).compile() for name, loss in forms.items()}
    norms_of = lambda result: [float(jnp.linalg.norm(gradient)) for gradient in result[1]]
    describe = lambda result: (float(result[0][0]), norms_of(result))
    timed, rows = {}, []
    if repeats:
        arguments = make_arguments(*sizes)
        works = {name: partial(program, *arguments) for name, program in compiled.items()}
        timed = alternate(works, repeats, describe)
    # Temporary memory, without arguments and results.
    size_of = lambda name: compiled[name].memory_analysis().temp_size_in_bytes / 2**20
    for name in compiled:
        row = {"T": sizes[0], "V": sizes[1], "form": name, "XLA temp MiB": size_of(name)}
        row[f"temp / {base}"] = size_of(name) / size_of(base)
        if name in timed:
            loss, norms = timed[name].results[-1]
            pairs = zip(timed[name].wall, timed[base].wall)
            row |= {"seconds": timed[name].wall, "CPU seconds": timed[name].cpu}
            row[f"seconds / {base}"] = [one / other for one, other in pairs]
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
    more, sizes = "tokens of the comparisons that are compiled but not run", [8192]
    parser.add_argument("--compiled-tokens", type=int, nargs="*", default=sizes, help=more)


def vocab(options: argparse.Namespace) -> None:
    rows = []
    for size in options.vocab:
        for tokens in (options.tokens, *options.compiled_tokens):
            forms = {"dense": dense_form, "tiled": recipe_form(BASE, options.tile, False)}
            repeats = options.repeats if tokens == options.tokens else 0
            rows += measure(forms, "dense", (tokens, size, options.width), repeats)
    note = "Both forms sum the head's gradient in float32; its [V, D] array is part of both."
    report(rows, options, [note])


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """Measure time and memory of each recipe's work on the vocabulary.

    Sampling and both forward passes are the same for every recipe and are left out. `opd` reads one
    log-prob a token, which still needs the teacher's whole softmax. `npd` is annotation and one
    step together.
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
