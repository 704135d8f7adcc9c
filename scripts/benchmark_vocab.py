"""Compare the tiled vocabulary pass with plain logits: time and memory of the reverse KL.

    python scripts/benchmark_vocab.py                      # T = 512 timed, T = 8192 only compiled
    python scripts/benchmark_vocab.py --vocab 32000 --width 256 --repeats 5

Everything is float32 with one row (B = 1). The teacher is given as hidden states and a head of the
student's size. Both forms take the same arguments and return KL(student || teacher) and its
gradients with respect to the student's hidden states and head. Temporary memory is XLA's own figure
(without arguments and results); seconds are medians of alternating runs. CPU seconds of the process
are printed too: they are more reliable on a busy machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_loss, tiled_stats
from opdjax.runs.workdir import num_cores

TARGETS = {"temp": 0.8, "seconds": 0.9, "long temp": 0.1}


def reverse_kl(student, teacher, row):
    return student.expect(student.logprobs - teacher.logprobs), None


def tiled_form(tile):
    def loss(hidden, kernel, weights, token, teacher_hidden, teacher_kernel):
        teacher = (teacher_hidden, Head(teacher_kernel))
        return tiled_loss(
            reverse_kl, hidden, Head(kernel), weights, TokenInputs(token), teacher, tile=tile
        )[0]

    return loss


def dense_form(hidden, kernel, weights, token, teacher_hidden, teacher_kernel):
    """Return the loss without the tiled pass: all logits, two log-softmaxes, a sum over V."""
    student = jax.nn.log_softmax(hidden[:, :-1] @ kernel.T)
    teacher = jax.nn.log_softmax(teacher_hidden[:, :-1] @ teacher_kernel.T)
    return jnp.sum(weights[:, 1:] * jnp.sum(jnp.exp(student) * (student - teacher), axis=-1))


def argument_shapes(tokens, vocab, width):
    hidden = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    kernel = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    token = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return hidden, kernel, weights, token, hidden, kernel


def make_arguments(tokens, vocab, width):
    keys = jax.random.split(jax.random.key(0), 5)
    kernel = jax.random.normal(keys[0], (vocab, width)) / width**0.5
    teacher_kernel = kernel + 0.3 * jax.random.normal(keys[1], (vocab, width)) / width**0.5
    hidden = 2 * jax.random.normal(keys[2], (1, tokens, width))
    teacher_hidden = hidden + 0.3 * jax.random.normal(keys[3], (1, tokens, width))
    weights = jnp.full((1, tokens), 1 / (tokens - 1)).at[:, 0].set(0)
    return (
        hidden,
        kernel,
        weights,
        jax.random.randint(keys[4], (1, tokens), 0, vocab),
        teacher_hidden,
        teacher_kernel,
    )


def with_teacher_logprobs(token, weights, teacher_hidden, teacher_kernel, tile):
    """Return the tokens as columns, with their log-probs under the teacher."""
    read = lambda tile, _, row: tile.logprob(row.tokens)
    operands = teacher_hidden, Head(teacher_kernel), weights > 0, TokenInputs(token)
    return TokenInputs(token, tiled_stats(read, *operands, tile=tile))


def compile_forms(options, tokens):
    """Return both forms, compiled for `tokens` tokens, by name."""
    shapes = argument_shapes(tokens, options.vocab, options.width)
    forms = {"dense": dense_form, f"tiled ({options.tile})": tiled_form(options.tile)}
    return {
        name: jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
        for name, loss in forms.items()
    }


def temp_mib(compiled):
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def run_once(compiled, arguments):
    """Return (seconds, CPU seconds, loss, gradient norms), not the gradients."""
    start, cpu_start = time.perf_counter(), time.process_time()
    loss, gradients = jax.block_until_ready(compiled(*arguments))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return seconds, cpu_seconds, float(loss), [float(jnp.linalg.norm(g)) for g in gradients]


def time_forms(forms, arguments, repeats):
    """Return each form's median seconds (wall and CPU) and its last result.

    The first run of each is not counted.
    """
    runs = {name: [] for name in forms}
    for _ in range(repeats + 1):
        for name, compiled in forms.items():
            runs[name].append(run_once(compiled, arguments))
    median = lambda kept, i: statistics.median(run[i] for run in kept[1:])
    return {name: (median(kept, 0), median(kept, 1), *kept[-1][2:]) for name, kept in runs.items()}


def cpu_model():
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")),
                platform.processor(),
            )
    except FileNotFoundError:
        return platform.processor()


def machine():
    """Return a line with CPU, cores, jax and backend."""
    found = f"{cpu_model()}, {num_cores()} cores; jax {jax.__version__}"
    return f"Machine: {found} on {jax.default_backend()}."


def verdict(what, tiled, dense):
    outcome = "met" if tiled <= TARGETS[what] * dense else "MISSED"
    return f"{tiled / dense:.3f} (target <= {TARGETS[what]}: {outcome})"


def parse_options(description=__doc__, tokens=512):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens of the timed comparison")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=128, help="tokens per tile")
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def main():
    parser = parse_options()
    parser.add_argument(
        "--long-tokens",
        type=int,
        default=8192,
        help="tokens of the comparison that is compiled but not run",
    )
    options = parser.parse_args()
    sizes = f"V = {options.vocab}, D = {options.width}, B = 1"
    print(
        f"{machine()}\n{sizes}, float32, value and gradients of reverse KL, tile {options.tile}.\n"
    )

    forms = compile_forms(options, options.tokens)
    timed = time_forms(
        forms, make_arguments(options.tokens, options.vocab, options.width), options.repeats
    )
    columns = ("T", "form", "XLA temp MiB", "seconds", "CPU seconds", "loss")
    columns += ("norm of d hidden", "norm of d head")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    temps = {}
    for name, (seconds, cpu_seconds, loss, (dhidden, dhead)) in timed.items():
        temps[name] = temp_mib(forms[name])
        cost = f"{temps[name]:.0f} | {seconds:.2f} | {cpu_seconds:.2f}"
        print(f"| {options.tokens} | {name} | {cost} | {loss:.6f} | {dhidden:.6e} | {dhead:.6e} |")
    del forms

    long_temps = {
        name: temp_mib(compiled)
        for name, compiled in compile_forms(options, options.long_tokens).items()
    }
    for name, temp in long_temps.items():
        print(f"| {options.long_tokens} | {name} | {temp:.0f} | compiled only | | | | |")

    dense, tiled = timed
    memory = verdict("temp", temps[tiled], temps[dense])
    seconds = verdict("seconds", timed[tiled][0], timed[dense][0])
    long_memory = verdict("long temp", long_temps[tiled], long_temps[dense])
    print(f"\nTemporary memory, tiled / dense, T = {options.tokens}: {memory}")
    print(f"Seconds, tiled / dense, T = {options.tokens}: {seconds}")
    print(f"Temporary memory, tiled / dense, T = {options.long_tokens}: {long_memory}")


if __name__ == "__main__":
    main()
