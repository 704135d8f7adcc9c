"""Measure how cost grows with size: the vocabulary pass over T x V, and the update.

    python scripts/scaling.py --out runs/scaling               # compiles for 8 simulated devices
    python scripts/scaling.py --out runs/scaling --parts vocabulary
    python scripts/scaling.py --out runs/scaling --mesh 1x1x1 1x8x1 2x2x2 --timed
    python scripts/scaling.py --out runs/scaling --devices 0 --mesh 1x4x2      # on this machine's

Temporary memory is XLA's own figure for one device, without arguments and results. Nothing is run
without `--timed`, so sizes may exceed this machine's memory. Collectives are read from the compiled
program; one in a loop counts once a round if the compiler knows the trip count, otherwise once. A
mesh is data x fsdp x tensor. Writes `vocabulary.csv`, `update.csv`, `README.md` with both tables
and, if matplotlib is installed (the `report` extra), plots.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import pathlib
import re
import statistics
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from benchmark_peers.settings import SIZES, Model
from jax.sharding import Mesh

from opdjax.config import OptimizerConfig
from opdjax.engine.update import UpdateSpec, init_state, make_optimizer, make_update
from opdjax.estimators import bind
from opdjax.estimators.divergence import reverse_kl
from opdjax.models.decoder import DecoderConfig, head_of, init_params
from opdjax.models.partitioning import shardings_of
from opdjax.models.rope import Rope
from opdjax.ops.sharding import abstract_like, by_row, make_mesh
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_loss
from opdjax.types import TeacherScores, TrainBatch

MODELS = {
    "3.4M": SIZES["cpu"].student,
    "0.6B": Model(1024, 28, 16, 8, 128, 3072, 151_936),
    "1.7B": SIZES["gpu"].student,
    "4B": SIZES["gpu"].teacher,
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_DENSE_LIMIT = 2**37  # bytes of a [T, V] array: above, the dense form is not compiled


def vocabulary_rows(options) -> list[dict[str, Any]]:
    """Return the temporary memory of the reverse KL's value and gradients, tiled and dense."""
    rows = []
    for vocab in options.vocab:
        for tokens in options.tokens:
            row = {"tokens": tokens, "vocab": vocab, "width": options.width, "tile": options.tile}
            sizes, is_too_large = (tokens, vocab, options.width), 4 * tokens * vocab > _DENSE_LIMIT
            row["tiled_mib"] = _temp_mib(_lower_loss(_tiled(options.tile), *sizes))
            row["dense_mib"] = None if is_too_large else _temp_mib(_lower_loss(_dense, *sizes))
            row["head_gradient_mib"] = 4 * vocab * options.width / 2**20
            rows.append(row)
            print(row, flush=True)
    return rows


def _tiled(tile):
    def token_loss(student, teacher, row):
        return reverse_kl(student, teacher), None

    def loss(hidden, kernel, weights, token, teacher_hidden, teacher_kernel):
        teacher = (teacher_hidden, Head(teacher_kernel))
        return tiled_loss(
            token_loss, hidden, Head(kernel), weights, TokenInputs(token), teacher, tile=tile
        )[0]

    return loss


def _dense(hidden, kernel, weights, token, teacher_hidden, teacher_kernel):
    student = jax.nn.log_softmax(hidden[:, :-1] @ kernel.T)
    teacher = jax.nn.log_softmax(teacher_hidden[:, :-1] @ teacher_kernel.T)
    return jnp.sum(weights[:, 1:] * jnp.sum(jnp.exp(student) * (student - teacher), axis=-1))


def _lower_loss(loss, tokens, vocab, width):
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    hidden, kernel, weights = shape(1, tokens, width), shape(vocab, width), shape(1, tokens)
    token = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(
        hidden, kernel, weights, token, hidden, kernel
    )


def _temp_mib(lowered) -> float:
    return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20


def update_rows(options) -> list[dict[str, Any]]:
    """Return the cost of an update of full-vocabulary distillation for all combinations."""
    rows = []
    settings = (options.models, options.batch, options.length, options.mesh)
    for name, batch, length, sizes in itertools.product(*settings):
        row = {"model": name, "mesh": "x".join(map(str, sizes)), "batch": batch, "length": length}
        row |= _update_row(MODELS[name], make_mesh(*sizes), batch, length, options)
        rows.append(row)
        print(row, flush=True)
    return rows


def _update_row(model: Model, mesh: Mesh, batch: int, length: int, options) -> dict[str, Any]:
    config, optimizer_config = _decoder_config(model), OptimizerConfig()
    spec = UpdateSpec(
        model=config,
        estimator=bind("full_kl", tile=options.tile),
        dtype=options.dtype,
        max_completion_length=length,
        remat=options.remat,
        mesh=mesh,
    )
    update = make_update(spec, optimizer_config, num_steps=1000)

    def start():
        params = init_params(config, jax.random.key(0))
        head = jax.tree.map(lambda x: x.astype(options.dtype), head_of(params).kernel)
        return (
            init_state(params, make_optimizer(optimizer_config, 1000), mesh),
            _batch(config, batch, length, options.dtype),
            head,
        )

    state, rows, head = jax.eval_shape(start)
    place = lambda tree: abstract_like(tree, shardings_of(tree, mesh))
    state, head = place(state), place({"head": head})["head"]
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row(mesh)), rows
    )
    began = time.perf_counter()
    compiled = update.lower(state, rows, Head(head)).compile()
    memory = compiled.memory_analysis()
    row = {
        "compile_s": time.perf_counter() - began,
        "temp_mib": memory.temp_size_in_bytes / 2**20,
        "arguments_mib": memory.argument_size_in_bytes / 2**20,
    }
    row |= collectives(compiled.as_text())
    if options.timed:
        row["step_s"] = _seconds(compiled, start, (state, rows, head))
    return row


def _decoder_config(model: Model) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        num_layers=model.layers,
        num_heads=model.heads,
        num_kv_heads=model.kv_heads,
        head_size=model.head,
        intermediate_size=model.mlp,
        rope=Rope(theta=1e6),
        norm_epsilon=1e-6,
        ties_embeddings=True,
        has_qk_norm=True,
        has_qkv_bias=False,
        has_output_bias=False,
    )


def _batch(config: DecoderConfig, batch: int, length: int, dtype: str) -> TrainBatch:
    """Return rows whose second half was sampled; the teacher has the student's width."""
    tokens = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length) % config.vocab_size
    mask = jnp.broadcast_to(jnp.arange(length) >= length // 2, tokens.shape)
    hidden = jnp.ones((batch, length, config.hidden_size), dtype)
    logprobs = jnp.zeros(tokens.shape)
    return TrainBatch(
        tokens, mask, jnp.ones_like(tokens), logprobs, teacher=TeacherScores(hidden=hidden)
    )


def _seconds(compiled, start, abstract) -> float:
    """Return the median seconds of three steps after one uncounted step."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state, rows, head = jax.jit(start, out_shardings=shardings)()
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, rows, Head(head)))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def collectives(text: str) -> dict[str, Any]:
    """Return how many collectives of each kind a program runs on a device, and their MiB."""
    bodies, called = _computations(text)
    counts, sent = Counter(), 0
    found = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
    for name, body in bodies.items():
        for result, kind in found.findall(body):
            counts[kind] += called[name]
            sent += called[name] * _bytes(result)
    return {kind.replace("-", "_"): counts[kind] for kind in COLLECTIVES} | {
        "collective_mib": sent / 2**20
    }


def _computations(text: str) -> tuple[dict[str, str], dict[str, int]]:
    """Return the text of each computation, and how often it runs within its loops."""
    heads = list(re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", text, re.MULTILINE))
    bodies = {
        m[1]: text[m.end() : after]
        for m, after in zip(heads, [*(m.start() for m in heads[1:]), len(text)])
    }
    entry = next(m[1] for m in heads if m[0].startswith("ENTRY"))
    times: dict[str, int] = Counter()

    def visit(name, count):
        times[name] += count
        for line in bodies[name].splitlines():
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            inside = count * (int(trips[1]) if trips and " while(" in line else 1)
            for other in re.findall(
                r"(?:body|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line
            ):
                if other in bodies:
                    visit(other, inside)

    visit(entry, 1)
    return bodies, times


def _bytes(shapes: str) -> int:
    """Return the bytes of an HLO shape or tuple of shapes."""
    widths = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2}
    widths |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(
        widths.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in found
    )


def write_table(rows: list[dict[str, Any]], name: str, out: pathlib.Path) -> str:
    """Write the rows to OUT/NAME.csv and return them as Markdown."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)

    def cell(value):
        if isinstance(value, float):
            return f"{value:.1f}" if value >= 10 else f"{value:.3g}"
        return "" if value is None else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        lines
        + ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    )


def plot(rows: dict[str, list[dict[str, Any]]], out: pathlib.Path) -> None:
    """Plot memory over T x V, and memory and collectives of the update by mesh."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if rows.get("vocabulary"):
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for form, marker in (("dense_mib", "o"), ("tiled_mib", "s"), ("head_gradient_mib", "_")):
            points = [
                (row["tokens"] * row["vocab"], row[form])
                for row in rows["vocabulary"]
                if row[form] is not None
            ]
            axes.loglog(
                *zip(*sorted(points)), marker, label=form.removesuffix("_mib").replace("_", " ")
            )
        axes.set(
            xlabel="T x V",
            ylabel="temporary MiB",
            title="value and gradients of reverse KL from hidden states",
        )
        axes.legend()
        figure.savefig(out / "vocabulary.svg", bbox_inches="tight")
    if rows.get("update"):
        names = [
            f"{row['model']} {row['batch']}x{row['length']}\n{row['mesh']}"
            for row in rows["update"]
        ]
        measures = [
            name
            for name in ("temp_mib", "arguments_mib", "collective_mib", "step_s")
            if name in rows["update"][0]
        ]
        figure, panels = pyplot.subplots(
            len(measures),
            figsize=(1 + 0.8 * len(names), 2.5 * len(measures)),
            sharex=True,
            squeeze=False,
        )
        for panel, measure in zip(panels[:, 0], measures):
            panel.bar(names, [row[measure] for row in rows["update"]])
            panel.set(ylabel=measure.replace("_", " "))
        panels[-1, 0].tick_params(axis="x", labelsize=6)
        figure.savefig(out / "update.svg", bbox_inches="tight")


def _mesh_sizes(text: str) -> tuple[int, int, int]:
    sizes = tuple(map(int, text.split("x")))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no mesh; expected DATAxFSDPxTENSOR such as 2x2x2"
        )
    return sizes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="directory for tables and plots"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=("vocabulary", "update"), default=["vocabulary", "update"]
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=8,
        help="simulated CPU devices; 0: this machine's devices",
    )
    parser.add_argument(
        "--mesh", nargs="+", type=_mesh_sizes, default=[(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]
    )
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["3.4M"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 32], help="rows of an update")
    parser.add_argument(
        "--length",
        nargs="+",
        type=int,
        default=[256, 1024],
        help="tokens of a row, prompt and completion",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[512, 2048, 8192, 32768],
        help="T of the vocabulary pass",
    )
    parser.add_argument(
        "--vocab", nargs="+", type=int, default=[32_000, 151_936], help="V of the vocabulary pass"
    )
    parser.add_argument(
        "--width", type=int, default=1024, help="width of the vocabulary pass's hidden states"
    )
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the forward pass",
    )
    parser.add_argument(
        "--remat",
        choices=("none", "dots", "layer"),
        default="none",
        help="what the backward pass recomputes",
    )
    parser.add_argument("--timed", action="store_true", help="run the updates too")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = {
        part: {"vocabulary": vocabulary_rows, "update": update_rows}[part](options)
        for part in options.parts
    }
    devices = f"{len(jax.devices())} {jax.devices()[0].platform} devices"
    tables = [f"jax {jax.__version__}, {devices}, {options.dtype}\n"]
    tables += [
        f"## {part}\n\n{write_table(found, part, options.out)}\n" for part, found in rows.items()
    ]
    (options.out / "README.md").write_text("\n".join(tables))
    print("\n".join(tables))
    try:
        plot(rows, options.out)
    except ModuleNotFoundError:
        print("matplotlib is not installed: no plots")


if __name__ == "__main__":
    main()
