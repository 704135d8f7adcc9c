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
import atexit
import collections
import contextlib
import copy
import fcntl
import functools
import importlib
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # the fake gs://
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "OPDJAX_LEASE_SECONDS": "6",
    # Compiles three times as fast.
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
}

import fsspec  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from benchmarks.core import to_markdown  # noqa: E402
from chaos_faults import FAULTS, KINDS, POISON, Moment  # noqa: E402
from fake_gcs import FakeGcs  # noqa: E402

from opdjax.cli.main import main as opdjax_main  # noqa: E402
from opdjax.config import Config  # noqa: E402
from opdjax.config.validation import from_dict, to_dict  # noqa: E402
from opdjax.rollouts.near_policy import shards  # noqa: E402
from opdjax.runs.workdir import append_lines, read_lines  # noqa: E402

for _name in ("refresh", "continuous"):  # forked processes find them imported
    importlib.import_module(f"opdjax.rollouts.near_policy.{_name}")
LONGEST = float(os.environ.get("CHAOS_LONGEST", 120))  # seconds after which a process hangs
COMPILED = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
# Of the process that is struck: done, a stop in one line, a lost lease, signals.
ALLOWED = (0, 2, 75, 130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
ANSWER = 10.0  # seconds in which SIGTERM is to be answered
URL = "gs://bucket/run"
BASE = {
    "data": {"max_prompt_length": 32},
    "sampling": {"max_completion_length": 6, "num_generations": 2},
    "estimator": {"recipe": "opd"},
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 1},
    "train": {"num_steps": 4, "prompts_per_step": 2},
    "evaluation": {"num_prompts": 2, "num_samples": 1, "max_completion_length": 6, "every": 2},
    "checkpoint": {"every": 2},
    "log": {"samples_every": 1, "diagnostics_every": 2},
    "mesh": {"data": 1},
}
REFRESH = {"schedule": "refresh", "num_epochs": 2, "refresh_epochs": [1]}
LAG = {"schedule": "continuous", "max_staleness": 2}
FILTERED = LAG | {"filter": "ifd", "ifd_min": None, "ifd_quantile": 0.7}
JUDGE = {"model": "rules"}
JUDGED = {"estimator": {"recipe": "ropd"}, "rubricator": JUDGE, "verifier": JUDGE}


def near(**given) -> dict:
    return {"near_policy": given, "estimator": {"recipe": "npd"}, "evaluation": {"source": None}}


MODES = {
    "on-policy": {},
    "two processes": {"mesh": {"data": 2, "processes": 2}},
    "refresh": near(**REFRESH),
    "refresh, process": near(**REFRESH, generator="process"),
    "inline": near(**FILTERED),
    "thread": near(**FILTERED, generator="thread"),
    "process": near(**FILTERED, generator="process"),
    "free lag, thread": near(**LAG, lag="free", generator="thread"),
    "free lag, process": near(**LAG, lag="free", generator="process"),
    "judged": JUDGED,
    "judged, evolving": JUDGED | {"rubrics": {"refresh": "evolving"}},
    "gs": {},
    "gs, thread": near(**FILTERED, generator="thread"),
}


class Process:
    """A forked process that runs `opdjax` with these words."""

    def __init__(self, words: list[str], environment: dict[str, str], arm: Callable[[], None]):
        self._reader, writer = os.pipe()
        fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, 1 << 20)  # holds all that a run prints
        os.set_blocking(self._reader, False)
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _work(words, environment, arm, writer)
        os.close(writer)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs. One that has stopped itself
        goes on after a while, unless it is to stay stopped.
        """
        if self.status is None:
            pid, found = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(found):
                self.on_stop()
                os.kill(self.pid, signal.SIGCONT)
            elif pid:
                self.status = os.waitstatus_to_exitcode(found)
        return self.status

    on_stop = staticmethod(lambda: time.sleep(0.5))

    def end(self) -> str:
        """Kill it if it runs; what it printed."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with open(self._reader, "rb", closefd=False) as file:
            return (file.read() or b"").decode(errors="replace")


def _work(words: list[str], environment: dict[str, str], arm: Callable, output: int) -> None:
    """The life of a forked process."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= environment
        for name in ("num_cpu_devices", "compilation_cache_dir"):
            value = environment[f"JAX_{name.upper()}"]
            jax.config.update(f"jax_{name}", int(value) if value.isdigit() else value)
        fsspec.config.set_conf_env(fsspec.config.conf)
        sys.argv = ["opdjax", *words]
        arm()
        opdjax_main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)


@contextlib.contextmanager
def judge_server(*options: str) -> Iterator[str]:
    """The address of a rule-based judge."""
    command = [sys.executable, str(ROOT / "scripts" / "serve_rule_judge.py"), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([*command, *options], **pipes) as server:
        try:
            yield re.search(r"http://\S+", server.stdout.readline())[0]
        finally:
            server.terminate()


class Run:
    """A run of a mode in a directory of its own, on a local disk or gs://."""

    def __init__(self, mode: str, directory: pathlib.Path, judge: str, store, **changes):
        self.mode, self.directory, self.store = mode, directory, store
        self.is_remote = mode.startswith("gs")
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "files").mkdir(parents=True)
        self.workdir, saved = directory / "files" / "run", directory / "config.json"
        sections = {**BASE, **MODES[mode], **changes}
        self._sections = sections
        self.configure(judge)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self._port = free.getsockname()[1]
        place = URL if self.is_remote else str(self.workdir)
        self.words = {"learner": ["train", str(saved), "--workdir", place]}
        if self.config.near_policy.generator == "process":
            self.words["generator"] = ["sample", str(saved), "--store", place]
        if self.config.mesh.processes == 2:
            self.words["other"] = self.words["learner"]
        self.running: dict[str, Process] = {}
        self.printed: list[str] = []

    def configure(self, judge: str) -> None:
        """Write the config, with the address of a judge."""
        api = (
            {"api": {"base_url": judge, "max_retries": 1}} if "rubricator" in self._sections else {}
        )
        self.config = from_dict(Config, self._sections | api)
        saved = json.dumps({"config": to_dict(self.config)})
        (self.directory / "config.json").write_text(saved)

    def beside(self) -> str | None:
        """Start the same run on another machine, or in another process, until it ends; a violation.
        It may wait for the lease of this one, take it over, or find a finished run.
        """
        other = copy.copy(self)
        other.running, other.printed = {}, []
        other.words = {"learner": self.words["learner"]}
        other.start(scratch="b")
        is_ended, status = other.wait(lambda: False), other.end()["learner"]
        said = other.said()
        self.printed.append(said)
        is_refused = status == 2 and "is being written by another" in said
        return (
            None if is_ended and (is_refused or status == 0) else f"the second: {last_line(said)}"
        )

    def steal_lease(self) -> None:
        """Another machine has taken the lease."""
        held = max(name for _, name in self.store.objects if "/.lease/" in name)
        about = json.loads(self.store.objects["bucket", held]["data"])
        name = f"run/.lease/{int(held.rpartition('/')[2]) + 1:06}"
        taken = about | {"owner": "another", "processes": []}
        self.store.put("bucket", name, json.dumps(taken).encode(), {})

    def said(self) -> str:
        """What all processes printed so far."""
        return "\n".join(self.printed)

    def start(self, arms: dict[str, Callable] | None = None, scratch: str = "a", **given) -> None:
        """Start the processes that do not run."""
        is_threaded = self.config.near_policy.generator == "thread"
        environment = {
            "OPDJAX_SCRATCH": str(self.directory / "files" / scratch),
            "JAX_NUM_CPU_DEVICES": "2" if is_threaded else "1",
            "JAX_COMPILATION_CACHE_DIR": COMPILED or str(self.directory.parent / "compiled"),
            **given,
        }
        for role in self.words.keys() - self.running.keys():
            group = {"JAX_COORDINATOR_ADDRESS": f"localhost:{self._port}"}
            group["JAX_PROCESS_ID"] = str(int(role == "other"))
            own = environment | (group if "other" in self.words else {})
            arm = (arms or {}).get(role, lambda: None)
            self.running[role] = Process(self.words[role], own, arm)

    def wait(self, is_over: Callable[[], bool]) -> bool:
        """Wait until then, or for the end of all processes; False if that takes too long. One that
        has failed takes the others of its group along, as launchers do.
        """
        deadline = time.monotonic() + LONGEST
        while not is_over() and None in [each.poll() for each in self.running.values()]:
            if time.monotonic() > deadline:
                return False
            if "other" in self.words and any(each.status for each in self.running.values()):
                deadline = min(deadline, time.monotonic() + 20)
            time.sleep(0.01)
        return True

    def end(self, *roles: str) -> dict[str, int]:
        """End these processes, or all; their statuses."""
        statuses = {}
        for role in roles or list(self.running):
            process = self.running.pop(role)
            self.printed.append(process.end())
            statuses[role] = process.status
        return statuses

    def files(self) -> dict[str, pathlib.Path | tuple[str, str]]:
        """Every file or object of the run, by its path."""
        if self.is_remote:
            return {f"/{name}": (bucket, name) for bucket, name in self.store.objects}
        found = (path for path in self.workdir.rglob("*") if path.is_file())
        return {f"/{path.relative_to(self.workdir.parent)}": path for path in found}

    def change(self, place, change: Callable[[bytearray], bytearray | None]) -> None:
        """Replace the content of a file or an object; None removes it."""
        is_local = isinstance(place, pathlib.Path)
        data = place.read_bytes() if is_local else self.store.objects[place]["data"]
        new = change(bytearray(data)) if data else bytearray(b"\0")
        if is_local:
            place.unlink() if new is None else place.write_bytes(new)
        elif new is None:
            del self.store.objects[place]
        else:
            self.store.put(*place, bytes(new), {})

    def outcome(self) -> dict:
        """What the run computed, without times and costs."""
        if self.is_remote:
            for path, place in self.files().items():
                copy = self.workdir.parent / path[1:]
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(self.store.objects[place]["data"])
        result = json.loads((self.workdir / "result.json").read_text())
        found = {"steps": (result["num_steps"], result["skipped_steps"])}
        if self.config.near_policy.schedule != "none":
            found["rollouts"] = account(self.config, self.workdir)
        if self.config.near_policy.lag == "free":
            return found
        unequal = ("time/", "perf/tokens_per_second", "api/", "problems", "rubric/retried")
        for name in ("metrics", "samples", "eval", "rubrics"):
            rows = read_lines(self.workdir / f"{name}.jsonl")
            found[name] = [
                {key: value for key, value in row.items() if not key.startswith(unequal)}
                for row in rows
            ]
        found["shards"] = sorted(path.name for path in self.workdir.glob("rollouts/*/*.parquet"))
        return found | {"weights": (self.workdir / "student" / "model.safetensors").read_bytes()}


def account(config: Config, workdir: pathlib.Path) -> list[str]:
    """What is wrong with the stored rollouts: lost, repeated, damaged, of a wrong age."""
    near, found, problems = config.near_policy, collections.Counter(), []
    for version in shards.versions(workdir):
        directory = shards.version_directory(workdir, version)
        problems += [f"left behind: {path.name}" for path in directory.glob("*.partial*")]
        samples, read = (shards.shard_paths(directory, s) for s in ("samples", "annotations"))
        if samples.keys() != read.keys():
            problems.append(f"version {version}: samples {[*samples]}, annotations {[*read]}")
        for number in samples.keys() & read.keys():
            columns, other = (shards.read_shard(paths[number]).columns for paths in (samples, read))
            if not np.array_equal(columns["prompt_id"], other["prompt_id"]):
                problems.append(f"{samples[number].name}: another annotation")
            names = ("step", "prompt_id", "sample_id", "policy_version")
            for step, prompt, sample, policy in zip(*(columns[name].tolist() for name in names)):
                found[step, prompt, sample] += 1
                oldest = near.max_staleness
                ages = range(oldest + 1) if near.lag == "free" else [min(oldest, step)]
                if policy != version or step - policy not in ages:
                    problems.append(f"step {step} sampled by version {policy}")
    steps = config.refresh_steps or range(config.train.num_steps)
    per_step = config.rows_per_step * (config.steps_per_epoch if config.refresh_steps else 1)
    wanted, counted = dict.fromkeys(steps, per_step), collections.Counter(key[0] for key in found)
    for step in wanted | counted:
        if counted[step] != wanted.get(step):
            problems.append(f"step {step}: {counted[step]} of {wanted.get(step, 0)} rollouts")
    return problems + [f"repeated: {key}" for key, count in found.items() if count > 1]


class Trial:
    """One run that one fault strikes. The seed determines the moment and the damage."""

    def __init__(self, seed: str, mode: str, fault: str, directory: pathlib.Path, judge: str):
        self.draw = random.Random(f"{seed} {mode} {fault}")
        self.seed, self.mode, self.name, self.fault = seed, mode, fault, FAULTS[fault]
        self.directory, self._judge = directory, judge
        self.where, self.answered = "", math.nan  # seconds from the fault to the end of its process

    def play(self, reference: tuple[dict, dict], store) -> tuple[str, str]:
        """(outcome, details)."""
        undisturbed_outcome, touched = reference
        with contextlib.ExitStack() as stack:
            judge = self._judge
            if self.fault.scene.startswith("--"):
                options = self.fault.scene.format(self.draw.randint(1, 12)).split()
                judge = stack.enter_context(judge_server(*options, "--seed", self.seed.split()[1]))
            run = Run(self.mode, self.directory, judge, store, **self._poisoned())
            stack.callback(run.end)
            role = self.draw.choice([*run.words])
            moment = self._moment(touched[role], f"{run.directory}/files")
            self.where = f"{role}, write {moment.count} of {moment.kind or 'any file'}"
            if problem := self._disturb(run, role, moment):
                return "VIOLATION", problem
            if self.fault.damage:
                self._damage(run)
            if self.fault.scene.startswith("--"):
                run.configure(self._judge)
            run.start(scratch=self.draw.choice("ab"))
            if not run.wait(lambda: False):
                return "VIOLATION", f"hangs after {LONGEST:.0f} s"
            return self._verdict(run, run.end(), undisturbed_outcome)

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
        kind, pattern = "", ""
        if self.fault.kinds and not self.fault.damage:
            kinds = {k: p for k, p in KINDS.items() if any(re.search(p, path) for path in touched)}
            kind, pattern = self.draw.choice([*kinds.items()])
        number = sum(bool(re.search(pattern, path)) for path in touched)
        count = self.draw.randint(number // 2 if self.fault.damage else 1, number)
        return Moment(root, kind, count, f"{self.directory}/struck", self.draw)

    def _disturb(self, run: Run, role: str, moment: Moment) -> str | None:
        """Start the run with its fault, until the process that it strikes has ended; a violation
        that is seen so far.
        """
        arm = self.fault.arm or (lambda moment: moment.strike(lambda path: None))
        struck = lambda: os.path.exists(moment.mark)
        if self.fault.scene == "storage":
            run.store.fault_rate = 0.05
        run.start({role: lambda: arm(moment)})
        process = run.running[role]
        if self.fault.scene == "takeover":
            process.on_stop = lambda: run.beside()
        elif self.fault.scene in ("second", "lease"):
            if not run.wait(struck):
                return "hangs before the fault"
            if self.fault.scene == "lease":
                run.steal_lease()
            elif problem := run.beside():
                return problem
        if not run.wait(lambda: process.status is not None):
            return f"hangs {'after' if struck() else 'before'} the fault"
        if struck():
            self.answered = time.monotonic() - float(pathlib.Path(moment.mark).read_text() or "nan")
        run.wait(lambda: "other" not in run.words)
        if run.store:
            run.store.fault_rate = 0.0
        is_alone = "generator" in run.words and self.draw.random() < 0.5 and not self.fault.damage
        statuses = run.end(*([role] if is_alone else []))
        said = run.said()
        if self.name == "SIGTERM" and self.answered > ANSWER:
            return f"SIGTERM is answered after {self.answered:.1f} s"
        if wrong := {role: status for role, status in statuses.items() if status not in ALLOWED}:
            return f"ends with {wrong}: {last_line(said)}"
        if 2 in statuses.values() and "opdjax: " not in said:
            return f"ends with 2 and does not say why: {last_line(said)}"
        return None

    def _damage(self, run: Run) -> None:
        """Change one file, of a kind that is drawn first."""
        found, draw = run.files(), self.draw
        by_kind = {
            kind: sorted(path for path in found if re.search(pattern, path))
            for kind, pattern in KINDS.items()
            if re.search(self.fault.kinds, kind)
        }
        if kinds := [kind for kind, paths in by_kind.items() if paths]:
            path = draw.choice(by_kind[draw.choice(kinds)])
            self.where = path
            run.change(found[path], lambda data: self.fault.damage(data, draw))

    def _verdict(self, run: Run, statuses: dict[str, int], expected: dict) -> tuple[str, str]:
        said = run.said()
        if "Traceback (most recent call last)" in said:
            return "VIOLATION", f"traceback: {last_line(said)}"
        if any(statuses.values()):
            reasons = [line for line in said.splitlines() if line.startswith("opdjax: ")]
            if self.fault.may_stop and reasons:
                return "clear stop", reasons[-1]
            return "VIOLATION", f"does not go on, {statuses}: {(reasons or [last_line(said)])[-1]}"
        found = run.outcome()
        differs = [name for name in expected if found.get(name) != expected[name]]
        if not differs:
            return "identical", ""
        says = re.search(r"(left out|made again|lacks|damaged|skipped|were lost).*", said)
        stated = [says[0]] if says else []
        stated += [f"skipped steps: {count}" for count in found["steps"][1:] if count]
        judgements = read_lines(run.workdir / "rubrics.jsonl")
        stated += ["problems of replies" for row in judgements if row["problems"]]
        if self.fault.may_lose and stated:
            return "stated loss", stated[0]
        return "VIOLATION", f"differs in silence: {', '.join(differs)}"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(nothing)"])[-1][:300]


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
    is_ended, statuses = run.wait(lambda: False), run.end()
    if not is_ended or any(statuses.values()):
        raise RuntimeError(f"{mode} does not run undisturbed: {statuses} {run.printed}")
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
            outcome, details = trial.play(self._references[mode], store)
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
