"""Seconds and memory of each recipe's work on the vocabulary: teacher's scores, loss and both
gradients, from hidden states on.

    python scripts/benchmark_recipes.py                    # V = 151,936, D = 1,024, 256 tokens

What comes before (sampling, both forward passes) is the same for every recipe and is left out.
`opd` reads one log-prob a token, which still takes the teacher's whole softmax. `npd` with the
teacher's ids taken here is what annotation and one step take together, with stored ones what each
further step takes. Seconds are medians of alternating runs, float32, one row.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from benchmark_vocab import (
    argument_shapes,
    cpu_model,
    make_arguments,
    parse_options,
    temp_mib,
    time_forms,
)

from opdjax.estimators import bind
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_loss, tiled_stats
from opdjax.runs.workdir import num_cores

STORED = "npd, teacher's 10, stored"
FORMS = {
    "sft": ("sft", {}),
    "opd": ("opd", {}),
    "vopd, top 100": ("vopd", {"baseline": "student_topk", "baseline_top_k": 100}),
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
            read = lambda tile, _, row: tile.logprob(row.token)
            columns = TokenInputs(
                token,
                tiled_stats(
                    read, teacher_hidden, Head(teacher_kernel), weights > 0, columns, tile=tile
                ),
            )
        if label == STORED:
            ids = (token[..., None] + jnp.arange(estimator.top_k)) % kernel.shape[0]
            columns = dataclasses.replace(
                columns, teacher_ids=ids, teacher_top_logprob=jnp.full(ids.shape, -3, jnp.float16)
            )
        elif estimator.teacher == "top_k":
            read = lambda tile, _, row: (
                tile.top_k(estimator.top_k),
                tile.logprob(tile.top_k(estimator.top_k)),
            )
            ids, logprobs = tiled_stats(
                read, teacher_hidden, Head(teacher_kernel), weights > 0, columns, tile=tile
            )
            columns = dataclasses.replace(columns, teacher_ids=ids, teacher_top_logprob=logprobs)
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
    print(
        f"Machine: {cpu_model()}, {num_cores()} cores; jax {jax.__version__} on {jax.default_backend()}."
    )
    print(
        f"V = {options.vocab}, D = {options.width}, {options.tokens} tokens, tile {options.tile}, float32.\n"
    )
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
    print(
        "| recipe | XLA temp MiB | seconds | CPU seconds | seconds / full_kl reverse |\n|---|---|---|---|---|"
    )
    for label, (seconds, cpu_seconds, *_) in timed.items():
        print(
            f"| {label} | {temp_mib(compiled[label]):.0f} | {seconds:.2f} | {cpu_seconds:.2f} | {seconds / slowest:.2f} |"
        )


if __name__ == "__main__":
    main()
