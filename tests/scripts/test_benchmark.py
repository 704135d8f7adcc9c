"""The benchmarks: workers that fail, ratios of neighbouring runs, counted work, the command."""

import argparse
import json
import pathlib
import subprocess
import sys
import textwrap

import pytest

SCRIPTS = str(pathlib.Path(__file__).parents[2] / "scripts")
WORKER = """
    import os, time
    from benchmarks.peers.protocol import Job, Stepper, serve

    def result(value):
        return {"result": value}

    def broken(case):
        raise ValueError("no such divergence")

    def loop(pause):
        print("training")  # must not reach the channel
        for tokens in (0, 0, 10, 20):  # two runs to warm up
            pause({"useful_tokens": tokens})

    serve({
        "sleep": lambda case: Job(lambda: time.sleep(case["seconds"]) or 7, result),
        "steps": lambda case: Job(Stepper(loop)),
        "broken": broken,
        "dies": lambda case: os._exit(3),
    }, fake="1.0")
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


@pytest.fixture
def worker(scripts, monkeypatch, tmp_path):
    from benchmarks.peers import worker

    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    monkeypatch.setattr(worker, "_command", lambda *_: command)
    worker = worker.Worker("fake", sys.executable, 1, tmp_path)
    yield worker
    worker.stop()


def test_a_worker_times_its_work_and_reports_failures(worker):
    ask = worker.ask
    ask(do="prepare", form="sleep", case={"seconds": 0.02})
    ask(do="prepare", form="steps", case={})
    answer = ask(do="run", form="sleep")
    assert worker.versions == {"fake": "1.0"}
    assert 0.02 <= answer["seconds"] < 2
    assert answer["cpu_seconds"] < answer["seconds"]
    assert answer["facts"]["result"] == 7
    assert 0 < answer["facts"]["peak GB"] < 10
    assert ask(do="prepare", form="broken", case={})["error"] == "ValueError: no such divergence"
    assert [ask(do="run", form="steps")["facts"]["useful_tokens"] for _ in range(2)] == [10, 20]
    assert "the training loop ended by itself" in ask(do="run", form="steps")["error"]
    ask(do="drop")
    assert "KeyError: 'sleep'" in ask(do="run", form="sleep")["error"]
    assert "ended with status 3" in ask(do="prepare", form="dies", case={})["error"]
    again = ask(do="prepare", form="sleep", case={"seconds": 0})
    assert "ended with status 3" in again["error"]  # and stays dead


class Clock:
    """A worker with given seconds; it fails after its last run."""

    def __init__(self, threads, seconds, tokens):
        self.threads = threads
        self._runs = [
            {"seconds": s, "cpu_seconds": s, "facts": {"useful_tokens": t}}
            for s, t in zip(seconds, tokens)
        ]

    def ask(self, **command):
        if command["do"] != "run":
            return {}
        return self._runs.pop(0) if self._runs else {"error": "no more"}


def test_ratios_are_of_neighbouring_runs_in_seconds_a_useful_token(scripts, monkeypatch):
    from benchmarks.peers import compare

    forms = [compare.Form(system, "generate") for system in ("opdjax", "good", "bad", "absent")]
    monkeypatch.setattr(compare, "FORMS", {"tail": forms})
    workers = {
        "opdjax": [Clock(1, [9, 9], [100] * 2), Clock(2, [1, 2], [100] * 2)],
        "good": [Clock(2, [4, 16], [100, 200])],
        "bad": [Clock(2, [1], [100])],
    }
    options = argparse.Namespace(peers=["good", "bad", "absent"], repeats=2)
    case = {"kind": "tail", "title": "t"}
    rows = compare.measure(case, workers, {"absent": "not installed"}, options)
    assert [row["system"] for row in rows] == ["opdjax", "good", "bad", "absent"]
    # The fastest number of cores counts: 1 s against 4 s, then 2 s against 16 s for twice as many.
    assert rows[0]["cores"] == 2
    assert rows[0]["seconds"] == [1, 2]
    assert rows[1]["ratio"] == pytest.approx((1 / 4 + 2 / 8) / 2)
    assert rows[2]["error"] == "no more"
    assert rows[3]["error"] == "not installed"


def test_losses_that_disagree_are_named(scripts):
    from benchmarks.peers import compare

    row = lambda loss: {"kind": "loss", "facts": {"loss": loss, "gradient norm": 1.0}}
    failed = {"kind": "loss", "error": "no such form"}
    rows = [row(2.0), row(2.0001), row(1.0), failed]
    compare.warn_of_differences(rows)
    warning = "DIFFERS: loss is 0.5 of opdjax's"
    assert [found.get("warning") for found in rows] == [None, None, warning, None]


def test_runs_alternate_and_the_first_ones_are_not_counted(scripts):
    from benchmarks.core import alternate, cell, to_markdown

    order = []
    works = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    found = alternate(works, 2, describe=lambda result: result)
    assert "".join(order) == "abbaab"
    assert found["a"].results == [4, 5]
    assert len(found["b"].wall) == len(found["b"].cpu) == 2
    assert [cell(value) for value in (0.12345, 12345, [3.0, 1.0, 2.0], None)] == [
        "0.1235",
        "12,345",
        "2 (1 to 3)",
        "",
    ]
    assert to_markdown([{"a": 1}, {"b": "x|y"}]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| 1 |  |",
        r"|  | x\|y |",
    ]


def test_points_that_do_the_same_work_are_timed_once(scripts):
    from benchmarks.steps import settings_of, shortened

    sweeps = pathlib.Path(SCRIPTS).parent / "experiments" / "sweeps"
    found = settings_of(sweeps / "near_policy.py")
    assert list(found)[:5] == ["sft, teacher", "opd", "vopd", "npd_fresh", "npd, 256"]
    assert len(found) == 15  # of 69 points
    config = shortened(found["npd, 256"], 40)
    assert (config.train.num_steps, config.steps_per_epoch) == (40, 10)
    assert config.refresh_steps == (0, 20)
    assert config.evaluation.source is None
    found = settings_of(sweeps / "step_costs.py")
    assert len(found) == 22
    assert shortened(found["rows_48_packed_8_twice"], 40).train.pack_length == 160
    assert list(settings_of(sweeps.parent / "mini_opd.py")) == ["mini_opd"]


def run(*words):
    command = [sys.executable, f"{SCRIPTS}/benchmark.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_a_table_and_writes_every_run(tmp_path):
    output = tmp_path / "found.json"
    sizes = ("--tokens", 16, "--compiled-tokens", 32, "--vocab", 100, "--width", 16)
    done = run("vocab", *sizes, "--repeats", 2, "--output", output)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["command"] == "vocab"
    assert [(row["form"], row["T"]) for row in found["rows"]] == [
        ("dense", 16),
        ("tiled", 16),
        ("dense", 32),
        ("tiled", 32),
    ]
    dense, tiled = found["rows"][:2]
    assert len(tiled["seconds"]) == 2
    assert tiled["loss"] == pytest.approx(dense["loss"], rel=1e-4)
    assert f"| 16 | 100 | tiled | {tiled['XLA temp MiB']:.4g} |" in done.stdout


def test_a_missing_subcommand_lists_what_there_is():
    done = run("speed")
    assert done.returncode == 2
    assert "sampler" in done.stdout
    assert "peers" in done.stdout
