"""Measure time and memory of each recipe's work on the vocabulary, starting from hidden states.

    python scripts/benchmark_recipes.py                    # V = 151,936, D = 1,024, 256 tokens

The work is the teacher's scores, the loss and both gradients. Sampling and both forward passes are
the same for every recipe and are left out. `opd` reads one log-prob a token, which still needs the
teacher's whole softmax. `npd` is annotation and one step together; with stored ids it is the cost
of each further step. Seconds are medians of alternating runs in float32 with one row.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from benchmark_vocab import (
    argument_shapes,
    machine,
    make_arguments,
    parse_options,
    temp_mib,
    time_forms,
    with_teacher_logprobs,
)

from opdjax.estimators import bind
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_loss, tiled_stats

STORED = "npd, teacher's 10, stored"
FORMS = {
    "sft": ("sft", {}),
    "opd": ("opd", {}),
    "vopd, top 100": ("vopd", {"baseline": "student_topk", "support_top_k": 100}),
    "vopd, full": ("vopd", {"baseline": "full"}),
    "full_kl, reverse": ("full_kl", {"divergence": "reverse"}),
    "full_kl, jsd": ("full_kl", {"divergence": "jsd"}),
    "topk_kl, student's 100, renormalised": ("topk_kl", {"support_top_k": 100}),
    "topk_kl, student's 100, tail": (
        "topk_kl",
        {"support_top_k": 100, "renormalize": "none", "outside": "tail"},
    ),
    "npd, teacher's 10": ("npd", {}),
    STORED: ("npd", {}),
}


def form(label, tile):
    name, options = FORMS[label]
    estimator = bind(name, options)

    def loss(hidden, kernel, weights, token, teacher_hidden, teacher_kernel):
        columns, teacher = TokenInputs(token), (teacher_hidden, Head(teacher_kernel))
        if estimator.teacher == "token":
            columns = with_teacher_logprobs(token, weights, teacher_hidden, teacher_kernel, tile)
        if label == STORED:
            ids = (token[..., None] + jnp.arange(estimator.top_k)) % kernel.shape[0]
            columns = dataclasses.replace(
                columns,
                teacher_top_ids=ids,
                teacher_top_logprobs=jnp.full(ids.shape, -3, jnp.float16),
            )
        elif estimator.teacher == "top_k":
            read = lambda tile, _, row: (
                tile.top_k(estimator.top_k),
                tile.logprob(tile.top_k(estimator.top_k)),
            )
            ids, logprobs = tiled_stats(
                read, teacher_hidden, Head(teacher_kernel), weights > 0, columns, tile=tile
            )
            columns = dataclasses.replace(
                columns, teacher_top_ids=ids, teacher_top_logprobs=logprobs
            )
        if estimator.teacher != "vocabulary":
            teacher = None
        return tiled_loss(
            estimator.token_loss,
            hidden,
            Head(kernel),
            weights,
            columns,
            teacher,
            tile=tile,
        )[0]

    return loss


def main():
    options = parse_options(__doc__, tokens=256).parse_args()
    sizes = f"V = {options.vocab}, D = {options.width}, {options.tokens} tokens"
    print(f"{machine()}\n{sizes}, tile {options.tile}, float32.\n")
    shapes = argument_shapes(options.tokens, options.vocab, options.width)
    compiled = {
        label: jax.jit(jax.value_and_grad(form(label, options.tile), (0, 1)))
        .lower(*shapes)
        .compile()
        for label in FORMS
    }
    timed = time_forms(
        compiled, make_arguments(options.tokens, options.vocab, options.width), options.repeats
    )
    slowest = timed["full_kl, reverse"][0]
    print("| recipe | XLA temp MiB | seconds | CPU seconds | seconds / full_kl reverse |")
    print("|---|---|---|---|---|")
    for label, (seconds, cpu_seconds, *_) in timed.items():
        cells = f"{temp_mib(compiled[label]):.0f} | {seconds:.2f} | {cpu_seconds:.2f}"
        print(f"| {label} | {cells} | {seconds / slowest:.2f} |")


if __name__ == "__main__":
    main()
