"""Compare opdjax with other libraries on this machine: losses, the on-policy step, generation.

    python scripts/benchmark.py                             # everything, on the CPU
    python scripts/benchmark.py --only a --peers tunix      # losses, against one peer
    python scripts/benchmark.py --device gpu --output gpu.json

(a) Value and gradient of the exact divergences, from logits and from hidden states. (b) The full
on-policy step. (c) Generation, with equal lengths and with a long tail, where some ids stop a
completion and only the tokens up to the stop count. Each peer runs in its own environment under
`.bench/`, which this script makes on first use (about three minutes). Every system runs at its
fastest number of threads. Losses and gradients of one divergence must agree, or the row says so.
What a peer cannot do, or fails at, is a row with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
from typing import Any

from benchmark_peers.checkpoints import EOS, stop_ids, write_pair
from benchmark_peers.environments import PINS, InstallationError, python_of
from benchmark_peers.settings import FORMS, SIZES, Form, cases_of, least_work
from benchmark_peers.table import to_markdown
from benchmark_peers.workers import Worker, WorkerError

ROOT = pathlib.Path(__file__).resolve().parent.parent / ".bench"
_PROBES = 2  # runs at each number of threads; the faster counts
# Relative, between losses and gradient norms of one divergence.
TOLERANCE = {"cpu": 1e-3, "gpu": 3e-2}


@dataclasses.dataclass
class Contender:
    """One form of one case, on its fastest worker."""

    form: Form
    worker: Worker
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Fleet:
    """The workers of all systems, one for each number of threads.

    `failures`: why a peer has no environment.
    """

    def __init__(self, options: argparse.Namespace):
        self.failures: dict[str, str] = {}
        self.workers: dict[str, list[Worker]] = {}
        self.fastest: dict[Form, Worker] = {}  # set by the first case of a form
        threads = [None] if options.device == "gpu" else options.threads
        given = dict(pair.split("=", 1) for pair in options.python)
        for system in ("opdjax", *options.peers):
            try:
                python = (
                    sys.executable
                    if system == "opdjax"
                    else given.get(system) or python_of(system, ROOT / "venvs", options.device)
                )
            except InstallationError as error:
                self.failures[system] = str(error)
                continue
            self.workers[system] = [Worker(system, python, count, ROOT) for count in threads]

    def versions(self) -> dict[str, dict[str, str]]:
        return {
            system: next((w.versions for w in workers if w.versions), {})
            for system, workers in self.workers.items()
        }

    def stop(self) -> None:
        for workers in self.workers.values():
            for worker in workers:
                worker.stop()


def worker_case(case: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the case with everything that a worker needs."""
    sizes = SIZES[device]
    student, teacher = (
        write_pair(ROOT / f"models-{device}", sizes)
        if case["kind"] in ("generate", "tail", "step")
        else ("", "")
    )
    is_tail = case["kind"] == "tail"
    fields = ("dtype", "matmul", "vocab", "width", "step_batch", "batch", "prompt", "new")
    return (
        case
        | {name: getattr(sizes, name) for name in fields}
        | {
            "student": str(student),
            "teacher": str(teacher),
            "student_shape": dataclasses.asdict(sizes.student),
            "prompts": sizes.tail_prompts if is_tail else sizes.batch,
            "prompts_file": str(ROOT / f"models-{device}" / "prompts.jsonl"),
            "stop_ids": stop_ids(sizes) if is_tail else [EOS],
        }
    )


def enter(form: Form, case: dict[str, Any], fleet: Fleet) -> Contender | str:
    """Prepare the form on its fastest worker; return the reason if no worker can run it."""
    if form.system in fleet.failures:
        return fleet.failures[form.system]
    if case.get("divergence") not in (None, *form.divergences) and case["kind"] != "step":
        return f"has {' and '.join(form.divergences)} KL only"
    known, tried, reason = fleet.fastest.get(form), [], ""
    for worker in [known] if known else fleet.workers[form.system]:
        try:
            worker.ask(do="prepare", case=case | {"form": form.name})
            probes = (
                []
                if known or len(fleet.workers[form.system]) == 1
                else [worker.ask(do="run")["seconds"] for _ in range(_PROBES)]
            )
            tried.append((min(probes, default=0), worker))
        except WorkerError as error:
            reason = str(error)
    if not tried:
        return reason
    tried.sort(key=lambda entry: entry[0])
    for _, worker in tried[1:]:
        with contextlib.suppress(WorkerError):
            worker.ask(do="drop")
    fleet.fastest[form] = tried[0][1]
    return Contender(form, tried[0][1])


def alternate(ours: Contender, peers: list[Contender], repeats: int) -> dict[Form, str]:
    """Run peer, opdjax, peer, opdjax ...; return the error of each form that failed."""
    failed: dict[Form, str] = {}
    for _ in range(repeats):
        for peer in peers:
            for contender in (peer, ours):
                if contender.form in failed:
                    continue
                try:
                    contender.runs.append(contender.worker.ask(do="run"))
                except WorkerError as error:
                    failed[contender.form] = str(error)
    return failed


def measure(
    case: dict[str, Any], fleet: Fleet, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows of one case, opdjax's first."""
    forms = [
        form
        for form in FORMS[case["kind"]]
        if form.system == "opdjax" or form.system in options.peers
    ]
    full_case, entered = worker_case(case, options.device), []
    # A worker process holds one job, so the forms of one system are in different rounds.
    rounds: list[list[Form]] = [[]]
    for form in forms[1:]:
        place = next(
            (group for group in rounds if form.system not in {f.system for f in group}), None
        )
        if place is None:
            rounds.append(place := [])
        place.append(form)
    ours = enter(forms[0], full_case, fleet)
    rows = []
    for group in rounds:
        entered = {form: enter(form, full_case, fleet) for form in group}
        peers = [contender for contender in entered.values() if isinstance(contender, Contender)]
        failed = {}
        if isinstance(ours, Contender):
            start = len(ours.runs)
            failed = alternate(ours, peers or [ours], options.repeats)
            if ours.form in failed:
                ours = failed[ours.form]
        for form, contender in entered.items():
            reason = contender if isinstance(contender, str) else failed.get(form)
            pairs = (
                ours.runs[start:][peers.index(contender) :: len(peers)]
                if isinstance(ours, Contender) and reason is None
                else []
            )
            rows.append(row_of(case, form, reason or contender, pairs))
    rows.insert(0, row_of(case, forms[0], ours, []))
    return rows


def row_of(
    case, form: Form, contender: Contender | str, pairs: list[dict[str, Any]]
) -> dict[str, Any]:
    row = case | {"system": form.system, "form": form.name, "remark": form.remark}
    if isinstance(contender, str):
        return row | {"error": contender}
    runs = contender.runs
    facts = runs[-1]["facts"]
    cost = [1 / speed(run) for run in runs]
    tokens = [speed(run) for run in runs] if "useful_tokens" in facts else []
    ratios = [(1 / speed(ours)) / seconds for ours, seconds in zip(pairs, cost)]
    return row | {
        "threads": contender.worker.threads,
        "seconds": [run["seconds"] for run in runs],
        "cpu_seconds": [run["cpu_seconds"] for run in runs],
        "tokens_per_second": tokens,
        "facts": facts,
        "ratio": statistics.median(ratios) if ratios else None,
    }


def speed(run: dict[str, Any]) -> float:
    """Return useful tokens a second; runs a second if no tokens are counted."""
    return run["facts"].get("useful_tokens", 1) / run["seconds"]


def compare(rows: list[dict[str, Any]], tolerance: float) -> None:
    """Add a warning to each row whose loss or gradient differs from opdjax's."""
    ours = rows[0].get("facts", {})
    for row in rows[1:]:
        if row["kind"] not in ("logits", "hidden") or "error" in row or "loss" not in ours:
            continue
        names = ("loss", *(f"gradient norm {i}" for i in range(len(ours["norms"]))))
        theirs = (row["facts"]["loss"], *row["facts"]["norms"])
        for name, mine, other in zip(names, (ours["loss"], *ours["norms"]), theirs):
            if abs(mine - other) > tolerance * abs(mine):
                row.setdefault("warnings", []).append(
                    f"DIFFERS: {name} is {other / mine:.4g} of opdjax's"
                )


def add_floors(
    rows: list[dict[str, Any]], device: str, flops_per_second: float, bytes_per_second: float
) -> None:
    """Add the seconds that the least work of each row takes at the measured rates."""
    for row in rows:
        if "error" not in row:
            flops, moved = least_work(row, device, row["facts"].get("useful_tokens", 0))
            row["floor"] = max(flops / flops_per_second, moved / bytes_per_second)


def machine(device: str) -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    found = f"{model}, {len(os.sched_getaffinity(0))} cores"
    if device == "gpu":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found += (
            ", " + subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        )
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=("a", "b", "c"), default=["a", "b", "c"], help="parts to run"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=tuple(PINS),
        default=list(PINS),
        help="systems to compare with",
    )
    parser.add_argument("--repeats", type=int, default=5)
    cores = sorted({1, len(os.sched_getaffinity(0))})
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=cores,
        help="numbers of CPU cores to try for every system",
    )
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument(
        "--python",
        nargs="*",
        default=[],
        metavar="PEER=PATH",
        help="a Python interpreter with the peer installed",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="JSON file for the figures of every run"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers too
    (ROOT / "logs").mkdir(parents=True, exist_ok=True)
    fleet, rows = Fleet(options), []
    try:
        # The step comes last because its trainers keep their workers.
        for part in ("floor", *sorted(options.only, key="acb".index)):
            for case in cases_of(part, options.device):
                print(f"measuring: {case['title']}", file=sys.stderr, flush=True)
                found = measure(case, fleet, options)
                compare(found, TOLERANCE[options.device])
                rows += found
        result = {
            "machine": machine(options.device),
            "versions": fleet.versions(),
            "repeats": options.repeats,
            "rows": rows,
        }
    finally:
        fleet.stop()
    least = min(
        min(row["seconds"]) for row in rows if row["kind"] == "matmul" and row.get("seconds")
    )
    result["flops_per_second"] = 2 * SIZES[options.device].matmul ** 3 / least
    result["bytes_per_second"] = max(
        rate for row in rows if (rate := row.get("facts", {}).get("bytes_per_second"))
    )
    add_floors(rows, options.device, result["flops_per_second"], result["bytes_per_second"])
    print(to_markdown(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
