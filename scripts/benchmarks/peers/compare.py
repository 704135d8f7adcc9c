"""Compare opdjax with other libraries on this machine: a loss, generation, the on-policy step."""

from __future__ import annotations

import argparse
import pathlib
import signal
import statistics
import sys
from collections.abc import Callable
from functools import partial

import jax

from benchmarks.core import Row, alternate, num_cores, progress, report
from benchmarks.peers.cases import (
    FORMS,
    SIZES,
    TINY,
    Form,
    cases_of,
    pretrained_inputs,
    write_inputs,
)
from benchmarks.peers.worker import PINS, Worker, python_of

ROOT = pathlib.Path(__file__).resolve().parents[3] / ".bench"
PAIR = "directories of SmolLM2 for generate and step, with --peers trl; default: random models"
TOLERANCE = 1e-3  # relative, between losses and between gradient norms


def add_peers(parser: argparse.ArgumentParser) -> None:
    """Compare opdjax with other libraries on the CPU of this machine.

    `loss`: value and gradient of the forward KL from logits. `generate`: completions of equal
    lengths. `step`: the full on-policy step. Each peer runs in its own environment under `.bench/`,
    which the first use makes (about three minutes). Every form runs on one core and on all, and the
    faster one is shown. Losses and gradients must agree, or the row says so. What a peer fails at
    is a row with the reason. Ratios are medians over neighbouring runs; below 1, opdjax is faster.
    """
    parser.set_defaults(run=peers, repeats=5)
    add = parser.add_argument
    # The step comes last: its trainers keep their threads.
    add("--only", nargs="+", choices=tuple(FORMS), default=tuple(FORMS), help="kinds of work")
    add("--peers", nargs="*", choices=tuple(PINS), default=list(PINS), help="systems to compare")
    add("--pair", nargs=2, type=pathlib.Path, metavar=("STUDENT", "TEACHER"), help=PAIR)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --pair")
    add("--tiny", action="store_true", help="tiny sizes, to try the command")


def peers(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers too
    jax.config.update("jax_platforms", "cpu")  # this process only writes the inputs
    sizes = TINY if options.tiny else SIZES
    if options.pair:
        sizes = sizes | {"new": 48, "batch": 8, "dtype": options.dtype}
        inputs = pretrained_inputs(ROOT / "pair", *options.pair, sizes["prompt"])
    elif options.dtype != "float32":
        raise ValueError(f"--dtype {options.dtype} needs --pair; expected float32 without it")
    else:
        inputs = write_inputs(ROOT / "models")
    workers: dict[str, list[Worker]] = {}
    failures: dict[str, str] = {}
    rows: list[Row] = []
    try:
        for system in ("opdjax", *options.peers):
            try:
                python = sys.executable if system == "opdjax" else python_of(system, ROOT)
                counts = sorted({1, num_cores()})
                workers[system] = [Worker(system, python, count, ROOT) for count in counts]
            except OSError as error:
                failures[system] = str(error)
        for kind in (kind for kind in FORMS if kind in options.only):
            for case in cases_of(kind, sizes, inputs):
                found = measure(case, workers, failures, options)
                warn_of_differences(found)
                rows += found
        versions = {system: group[0].versions for system, group in workers.items()}
    finally:
        for worker in (worker for group in workers.values() for worker in group):
            worker.stop()
    shown = [progress(shown_row(row)) for row in rows]
    words = lambda of: " ".join(f"{name} {value}" for name, value in of.items())
    notes = [f"{system}: {words(of)}." for system, of in versions.items()]
    report(shown, options, notes, versions=versions, runs=rows)


def measure(
    case: Row, workers: dict[str, list[Worker]], failures: dict[str, str], options
) -> list[Row]:
    """Return the rows of one case, opdjax's first: each form on its fastest worker."""
    print(f"measuring: {case['title']}", file=sys.stderr, flush=True)
    errors: dict[Form, str] = {}
    works: dict[tuple[Form, Worker], Callable] = {}
    wanted = [form for form in FORMS[case["kind"]] if form.system in ("opdjax", *options.peers)]
    for form in wanted:
        errors |= {form: failures[form.system]} if form.system in failures else {}
        for worker in workers.get(form.system, ()):
            answer = worker.ask(do="prepare", form=form.name, case=case)
            if "error" in answer:
                errors[form] = answer["error"]
            else:
                works[form, worker] = partial(worker.ask, do="run", form=form.name)
    timed = alternate(works, options.repeats, describe=lambda answer: answer, warm_ups=0)
    for _, worker in works:
        worker.ask(do="drop")
    found = []
    for form in wanted:
        row = {"kind": case["kind"], "title": case["title"], "system": form.system}
        row |= {"form": form.name, "remark": form.remark}
        runs = {worker.threads: of.results for (one, worker), of in timed.items() if one == form}
        found.append(row | fastest(runs, errors.get(form, "")))
    ours = found[0].get("cost", ())
    for row in found[1:]:
        ratios = [mine / theirs for mine, theirs in zip(ours, row.get("cost", ()))]
        row["ratio"] = statistics.median(ratios) if ratios else None
    return found


def fastest(runs: dict[int, list[Row]], error: str) -> Row:
    """Return the figures of the number of cores that takes the least time, or the error.

    `cost`: seconds of each run, per useful token if tokens are counted.
    """
    found = []
    for cores, answers in runs.items():
        if failed := [answer["error"] for answer in answers if "error" in answer]:
            error = failed[0]
            continue
        counts = [answer["facts"].get("useful_tokens") for answer in answers]
        row = {name: [answer[name] for answer in answers] for name in ("seconds", "cpu_seconds")}
        row |= {"cores": cores, "facts": answers[-1]["facts"]}
        row["cost"] = [s / (count or 1) for s, count in zip(row["seconds"], counts)]
        row["tokens_per_second"] = [1 / cost for cost in row["cost"]] if any(counts) else None
        found.append(row)
    return min(found, key=lambda row: statistics.median(row["cost"]), default={"error": error})


def warn_of_differences(rows: list[Row]) -> None:
    """Add a warning to each row whose loss or gradient norm differs from opdjax's."""
    for row in rows[1:]:
        for name in ("loss", "gradient norm"):
            mine, other = (each.get("facts", {}).get(name) for each in (rows[0], row))
            if None not in (mine, other) and abs(mine - other) > TOLERANCE * abs(mine):
                row["warning"] = f"DIFFERS: {name} is {other / mine:.4g} of opdjax's"


def shown_row(row: Row) -> Row:
    """Return the columns of the table."""
    shown = {"work": row["title"], "system": row["system"], "form": row["form"]}
    if "error" in row:
        return shown | {"remark": row["error"]}
    facts = row["facts"]
    return shown | {
        "cores": row["cores"],
        "seconds": row["seconds"],
        "CPU seconds": row["cpu_seconds"],
        "useful tokens/s": row["tokens_per_second"],
        "peak GB": facts.get("peak GB"),
        "opdjax / peer": row.get("ratio"),
        "loss": facts.get("loss"),
        "gradient norm": facts.get("gradient norm"),
        "remark": "; ".join(filter(None, [row["remark"], row.get("warning")])),
    }
