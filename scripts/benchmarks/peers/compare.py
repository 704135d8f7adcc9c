"""Compare opdjax with other libraries on this machine: losses, generation, the on-policy step."""

from __future__ import annotations

import argparse
import pathlib
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from functools import partial

import jax

from benchmarks.core import Row, alternate, num_cores, progress, report
from benchmarks.peers.cases import FORMS, PARTS, SIZES, Form, cases_of, write_inputs
from benchmarks.peers.worker import PINS, Worker, python_of

ROOT = pathlib.Path(__file__).resolve().parents[3] / ".bench"
# Relative, between losses and gradient norms of one divergence.
TOLERANCE = {"cpu": 1e-3, "gpu": 3e-2}


def add_peers(parser: argparse.ArgumentParser) -> None:
    """Compare opdjax with other libraries on this machine.

    `losses`: value and gradient of the exact divergences, from logits and from hidden states.
    `generation`: equal lengths, and a long tail where some ids stop a completion and only the
    tokens up to the stop count. `step`: the full on-policy step. Each peer runs in its own
    environment under `.bench/`, which the first use makes (about three minutes). Every form runs on
    each number of cores, and the fastest one is shown. Losses and gradients of one divergence must
    agree, or the row says so. What a peer cannot do, or fails at, is a row with the reason. Ratios
    are medians over neighbouring runs; below 1, opdjax is faster.
    """
    parser.set_defaults(run=peers, repeats=5)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    add("--peers", nargs="*", choices=tuple(PINS), default=list(PINS), help="systems to compare")
    add("--device", choices=tuple(TOLERANCE), default="cpu")
    add("--tiny", action="store_true", help="tiny sizes, to try the command")
    cores = sorted({1, num_cores()})
    add("--cores", nargs="+", type=int, default=cores, help="numbers of CPU cores of a worker")
    python = "a Python interpreter with the peer installed, in place of an own environment"
    add("--python", nargs="*", type=interpreter, default=[], metavar="PEER=PATH", help=python)


def interpreter(text: str) -> tuple[str, str]:
    peer, _, path = text.partition("=")
    if peer not in PINS or not path:
        message = f"{text!r} is no PEER=PATH; expected a peer of {', '.join(PINS)}"
        raise argparse.ArgumentTypeError(message)
    return peer, str(pathlib.Path(shutil.which(path) or path).absolute())


def peers(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers too
    jax.config.update("jax_platforms", "cpu")  # this process only writes the inputs
    sizes = SIZES["tiny" if options.tiny else options.device]
    inputs = write_inputs(ROOT / f"models-{'tiny' if options.tiny else options.device}", sizes)
    workers: dict[str, list[Worker]] = {}
    failures: dict[str, str] = {}
    rows: list[Row] = []
    try:
        for system in ("opdjax", *options.peers):
            try:
                workers[system] = started(system, options)
            except OSError as error:
                failures[system] = str(error)
        for part in (part for part in PARTS if part in options.only):
            for case in cases_of(part, sizes, inputs):
                found = measure(case, workers, failures, options)
                warn_of_differences(found, TOLERANCE[options.device])
                rows += found
        versions = {system: group[0].versions for system, group in workers.items()}
    finally:
        for worker in (worker for group in workers.values() for worker in group):
            worker.stop()
    shown = [progress(shown_row(row)) for row in rows]
    words = lambda of: " ".join(f"{name} {value}" for name, value in of.items())
    notes = [f"{system}: {words(of)}." for system, of in versions.items()]
    report(shown, options, notes, versions=versions, runs=rows)


def started(system: str, options: argparse.Namespace) -> list[Worker]:
    """Return a worker per number of cores; OSError if the system has no environment."""
    python = sys.executable if system == "opdjax" else dict(options.python).get(system)
    python = python or python_of(system, ROOT, options.device)
    counts = [None] if options.device == "gpu" else options.cores
    return [Worker(system, python, count, ROOT) for count in counts]


def measure(
    case: Row,
    workers: dict[str, list[Worker]],
    failures: dict[str, str],
    options: argparse.Namespace,
) -> list[Row]:
    """Return the rows of one case, opdjax's first: each form on its fastest worker."""
    print(f"measuring: {case['title']}", file=sys.stderr, flush=True)
    errors: dict[Form, str] = {}
    works: dict[tuple[Form, Worker], Callable] = {}
    wanted = [form for form in FORMS[case["kind"]] if form.system in ("opdjax", *options.peers)]
    for form in wanted:
        divergence = None if case["kind"] == "step" else case.get("divergence")
        if form.system in failures:
            errors[form] = failures[form.system]
        elif divergence not in (None, *form.divergences):
            errors[form] = f"has {' and '.join(form.divergences)} KL only"
        for worker in () if form in errors else workers[form.system]:
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


def fastest(runs: dict[int | None, list[Row]], error: str) -> Row:
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


def warn_of_differences(rows: list[Row], tolerance: float) -> None:
    """Add a warning to each row whose loss or gradient differs from opdjax's."""

    def values(row: Row) -> list[float]:
        facts = row.get("facts", {})
        return [facts["loss"], *facts["norms"]] if "loss" in facts else []

    for row in rows[1:]:
        for number, (mine, other) in enumerate(zip(values(rows[0]), values(row))):
            if abs(mine - other) > tolerance * abs(mine):
                name = f"gradient norm {number - 1}" if number else "loss"
                text = f"DIFFERS: {name} is {other / mine:.4g} of opdjax's"
                row.setdefault("warnings", []).append(text)


def shown_row(row: Row) -> Row:
    """Return the columns of the table."""
    shown = {"work": row["title"], "system": row["system"], "form": row["form"]}
    if "error" in row:
        return shown | {"remark": row["error"]}
    facts, remarks = row["facts"], [row["remark"]] if row["remark"] else []
    if "mean_length" in facts:
        remarks.append(f"lengths: mean {facts['mean_length']:.0f}, longest {facts['max_length']}")
    return shown | {
        "cores": row["cores"] or "gpu",
        "seconds": row["seconds"],
        "CPU seconds": row["cpu_seconds"],
        "useful tokens/s": row["tokens_per_second"],
        "opdjax / peer": row.get("ratio"),
        "loss": facts.get("loss"),
        "gradient norms": " ".join(f"{norm:.4e}" for norm in facts.get("norms", ())),
        "remark": "; ".join([*remarks, *row.get("warnings", [])]),
    }
