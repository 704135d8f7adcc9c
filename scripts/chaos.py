"""Disturb short runs, start them again, and compare what they leave with an undisturbed run.

    python scripts/chaos.py --runs 300 --seed 0 --out runs/chaos    # again: goes on where it ended
    python scripts/chaos.py --runs 20 --mode thread,process --fault kill --out runs/chaos
    python scripts/chaos.py --list

Each trial takes one mode and one fault, which strikes at a random write to a file of the run. Then
the same command starts the run again, without the fault. A trial ends in one of these:

    identical    metrics, samples, evaluations, judgements, rollouts and weights, bit for bit
    stated loss  they differ, and the run says what it lost
    clear stop   the run ends with one line that says why; only where files or data were damaged
    VIOLATION    anything else: a silent difference, a traceback, a hang, a slow answer to SIGTERM

Processes are forked from this one, which has imported the package: a trial takes seconds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator

from benchmarks.core import to_markdown
from chaos_faults import FAULTS, KINDS, POISON, Moment
from chaos_runs import BASE, LONGEST, MODES, UNREADABLE, Run, judge_server, last_line
from fake_gcs import FakeGcs

from opdjax.runs.workdir import append_lines, read_lines

# Of the process that is struck: done, a stop in one line, a lost lease, signals.
ALLOWED = (0, 2, 75, 130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
PEER_LOST = -signal.SIGABRT  # jax ends a process whose peer has vanished
ANSWER = 10.0  # seconds in which SIGTERM is to be answered


class Trial:
    """One run that one fault strikes. The seed determines the moment and the damage."""

    def __init__(self, seed: str, mode: str, fault: str, directory: pathlib.Path, judge: str):
        self.draw = random.Random(f"{seed} {mode} {fault}")
        self.seed, self.mode, self.name, self.fault = seed, mode, fault, FAULTS[fault]
        self.directory, self._judge, self.where = directory, judge, ""
        self.answered = math.nan  # seconds from the fault to the end of its process

    def play(self, expected: dict, touched: dict[str, list[str]], store) -> tuple[str, str]:
        """(outcome, details), given the outcome and the writes of an undisturbed run."""
        judge, draw = self._judge, self.draw
        with contextlib.ExitStack() as stack:
            if is_judge := self.fault.scene.startswith("--"):
                options = self.fault.scene.format(draw.randint(1, 12)).split()
                judge = stack.enter_context(judge_server(*options, "--seed", self.seed.split()[1]))
            run = Run(self.mode, self.directory, judge, store, **self._poisoned())
            stack.callback(run.end)
            role = draw.choice([*run.words])
            moment = self._moment(touched[role], f"{run.directory}/files")
            self.where = f"{role}, write {moment.count} of {moment.kind or 'any file'}"
            statuses, problem = self._disturb(run, role, moment)
            if problem:
                return "VIOLATION", problem
            if self.fault.damage:
                self._damage(run)
            if self.fault.damage or any(statuses.values()):
                if is_judge:
                    run.configure(self._judge)
                run.start(scratch=draw.choice("ab"))
                if not run.wait():
                    return "VIOLATION", f"hangs after the restart, for {LONGEST:.0f} s"
                statuses = run.end()
            elif run.running:  # the process that was to be struck has ended well before the other
                if not run.wait():
                    return "VIOLATION", f"hangs for {LONGEST:.0f} s, though its generator has ended"
                statuses |= run.end()
            return self._verdict(run, statuses, expected)

    def _poisoned(self) -> dict:
        """Data with a row that is none, if that is the fault."""
        if self.fault.scene != "poison":
            return {}
        rows = [json.dumps({"prompt": f"{n}+{n}=", "answer": str(2 * n)}) for n in range(20, 26)]
        rows.insert(self.draw.randrange(len(rows)), self.draw.choice(POISON))
        source = self.directory.parent / "rows.jsonl"
        source.write_text("\n".join(rows) + "\n")
        return {"data": BASE["data"] | {"source": str(source)}}

    def _moment(self, touched: list[str], root: str) -> Moment:
        """When the fault strikes: before damage late enough for files to be there."""
        kind, pattern, is_late = "", "", self.fault.damage is not None
        if self.fault.kinds and not is_late:
            kinds = {k: p for k, p in KINDS.items() if any(re.search(p, path) for path in touched)}
            kind, pattern = self.draw.choice([*kinds.items()])
        number = sum(bool(re.search(pattern, path)) for path in touched)
        count = self.draw.randint(number // 2 if is_late else 1, number)
        return Moment(root, kind, count, f"{self.directory}/struck", self.draw)

    def _disturb(self, run: Run, role: str, moment: Moment) -> tuple[dict[str, int], str | None]:
        """Start the run with its fault, until the process that it strikes has ended; the statuses
        of what has ended, and a violation that is seen so far.
        """
        scene, struck = self.fault.scene, lambda: os.path.exists(moment.mark)
        if scene == "storage":
            run.store.fault_rate = 0.05
        run.start({role: lambda: (self.fault.arm or Moment.strike)(moment)})
        process = run.running[role]
        if scene in ("second", "lease", "takeover"):
            if not run.wait(struck):
                return {}, "hangs before the fault"
            problem = run.steal_lease() if scene == "lease" else run.beside()
            if scene == "takeover" and process.is_alive():
                os.kill(process.pid, signal.SIGCONT)
            if problem:
                return {}, problem
        if not run.wait(lambda: not process.is_alive()):
            return {}, f"hangs {'after' if struck() else 'before'} the fault"
        if struck():
            self.answered = time.monotonic() - float(pathlib.Path(moment.mark).read_text() or "nan")
        run.wait(lambda: "other" not in run.words)
        if run.store:
            run.store.fault_rate = 0.0
        is_alone = "generator" in run.words and not self.fault.damage and self.draw.random() < 0.5
        statuses, said = run.end(*([role] if is_alone else [])), run.said()
        if self.name == "SIGTERM" and self.answered > ANSWER:
            return statuses, f"SIGTERM is answered after {self.answered:.1f} s"
        if scene == "takeover" and struck() and statuses[role] == 0:
            return statuses, "a run whose lease was taken over ends as if it had it"
        allowed = (*ALLOWED, PEER_LOST) if "other" in statuses else ALLOWED
        if wrong := {role: status for role, status in statuses.items() if status not in allowed}:
            return statuses, f"ends with {wrong}: {last_line(said)}"
        if 2 in statuses.values() and "opdjax: " not in said:
            return statuses, f"ends with 2 and does not say why: {last_line(said)}"
        return statuses, None

    def _damage(self, run: Run) -> None:
        """Change one file, of a kind that is drawn first."""
        files = run.files()
        found = {k: [f for f in files if re.search(p, f"/{f}")] for k, p in KINDS.items()}
        kinds = [k for k, own in found.items() if own and re.search(self.fault.kinds, k)]
        if kinds:
            self.where = self.draw.choice(found[self.draw.choice(kinds)])
            run.damage(self.where, lambda data: self.fault.damage(data, self.draw))

    def _verdict(self, run: Run, statuses: dict[str, int], expected: dict) -> tuple[str, str]:
        said = run.said()
        if "Traceback (most recent call last)" in said:
            return "VIOLATION", f"traceback: {last_line(said)}"
        if any(statuses.values()):
            reasons = [line for line in said.splitlines() if line.startswith("opdjax: ")]
            if self.fault.may_stop and reasons:
                return "clear stop", reasons[-1]
            return "VIOLATION", f"does not go on, {statuses}: {(reasons or [last_line(said)])[-1]}"
        try:
            found = run.outcome()
        except (OSError, ValueError) as error:
            return "VIOLATION", f"what it left cannot be read: {error}"
        differs = [name for name in expected if found.get(name) != expected[name]]
        if not differs:
            return "identical", ""
        says = re.search(r"(left out|made again|lacks|damaged|skipped|are lost|were lost).*", said)
        stated = [says[0]] if says else []
        stated += [f"skipped steps: {count}" for count in found["steps"][1:] if count]
        if differs == ["rollouts"]:
            stated += [line for line in found["rollouts"] if line.startswith(UNREADABLE)]
        judgements = read_lines(run.workdir / "rubrics.jsonl")
        stated += ["problems of replies" for row in judgements if row["problems"]]
        if self.fault.may_lose and stated:
            return "stated loss", stated[0]
        return "VIOLATION", f"differs in silence: {', '.join(differs)}"


def undisturbed(mode: str, directory: pathlib.Path, judge: str, store) -> tuple[dict, dict]:
    """The outcome of an undisturbed run, and by role the paths that it wrote, in order."""
    run, root = Run(mode, directory, judge, store), str(directory / "files")

    def record(file: pathlib.Path) -> None:
        def note(path: str) -> None:
            with file.open("a") as out:
                out.write(f"{path}\n")

        Moment(root, "", 1, os.devnull, random.Random()).strike(note, once=False)

    files = {role: directory / f"{role}.touched" for role in run.words}
    run.start({role: functools.partial(record, file) for role, file in files.items()})
    is_ended, statuses = run.wait(), run.end()
    if not is_ended or any(statuses.values()):
        raise RuntimeError(f"{mode} does not run undisturbed: {statuses} {run.said()}")
    return run.outcome(), {role: file.read_text().splitlines() for role, file in files.items()}


class Study:
    """Trials, whose rows are appended to a file: a later study goes on from there."""

    def __init__(self, out: pathlib.Path, judge: str):
        out.mkdir(parents=True, exist_ok=True)
        self._out, self._judge, self._file = out.resolve(), judge, out / "trials.jsonl"
        self.rows, self._references = read_lines(self._file), {}

    def trial(self, seed: str, mode: str, fault: str) -> dict:
        """The row of a trial, which is made unless it is there."""
        key = {"seed": seed, "mode": mode, "fault": fault}
        if found := [row for row in self.rows if row.items() >= key.items()]:
            return found[0]
        began, directory = time.monotonic(), self._out / "trial"
        trial = Trial(**key, directory=directory, judge=self._judge)
        with self._storage(mode) as store:
            if mode not in self._references:
                place = self._out / "reference"
                self._references[mode] = undisturbed(mode, place, self._judge, store)
                if store:
                    store.objects.clear()
            outcome, details = trial.play(*self._references[mode], store)
        row = key | {"where": trial.where, "outcome": outcome, "details": details}
        row |= {"answered": None if math.isnan(trial.answered) else round(trial.answered, 2)}
        row |= {"seconds": round(time.monotonic() - began, 1)}
        if outcome == "VIOLATION":
            kept = self._out / "violations" / re.sub(r"\W+", "-", " ".join(key.values()))
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(directory, kept)
        append_lines(self._file, [row])
        self.rows.append(row)
        print(*row.values(), sep=" | ", file=sys.stderr, flush=True)
        return row

    @contextlib.contextmanager
    def _storage(self, mode: str) -> Iterator:
        if not mode.startswith("gs"):
            yield None
            return
        with FakeGcs() as server:
            os.environ |= server.environment
            yield server.store


def table(rows: list[dict]) -> str:
    """Trials of each fault by outcome, and the violations."""
    outcomes = ("identical", "stated loss", "clear stop", "VIOLATION")
    lines = []
    for fault in FAULTS:
        own = [row for row in rows if row["fault"] == fault]
        counts = collections.Counter(row["outcome"] for row in own)
        answered = [row["answered"] for row in own if row["answered"] is not None]
        slowest = f"{max(answered):.1f}" if fault == "SIGTERM" and answered else ""
        modes = ", ".join(sorted({row["mode"] for row in own}))
        line = {"fault": fault, "trials": len(own)} | {name: counts[name] for name in outcomes}
        lines += [line | {"slowest answer, s": slowest, "modes": modes}] if own else []
    wrong = [row for row in rows if row["outcome"] == "VIOLATION"]
    shown = ("seed", "mode", "fault", "where", "details")
    text = to_markdown(lines)
    return text + (
        "\n\n" + to_markdown([{n: row[n] for n in shown} for row in wrong]) if wrong else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/chaos"))
    parser.add_argument("--runs", type=int, default=0, help="trials; 0: only print the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--mode", default="", help="modes, separated by semicolons; default: all")
    parser.add_argument("--fault", default="", help="faults, likewise")
    parser.add_argument("--list", action="store_true", help="print modes and faults")
    options = parser.parse_args()
    if options.list:
        print(f"modes: {'; '.join(MODES)}\nfaults: {'; '.join(FAULTS)}")
        return
    chosen = {}
    for name, known in (("mode", MODES), ("fault", FAULTS)):
        chosen[name] = [word for word in getattr(options, name).split(";") if word] or [*known]
        if unknown := set(chosen[name]) - set(known):
            parser.error(f"--{name} is {unknown}; expected some of {'; '.join(known)}")
    pairs = [
        (mode, fault)
        for mode in chosen["mode"]
        for fault in chosen["fault"]
        if re.search(FAULTS[fault].modes, mode)
    ]
    random.Random(options.seed).shuffle(pairs)
    with judge_server() as judge:
        study, rows = Study(options.out, judge), []
        for number in range(options.first, options.first + options.runs):
            rows.append(study.trial(f"{options.seed} {number}", *pairs[number % len(pairs)]))
    print(table(study.rows))
    sys.exit(any(row["outcome"] == "VIOLATION" for row in rows))


if __name__ == "__main__":
    main()
