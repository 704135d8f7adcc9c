"""Where numbers go: rows in metrics.jsonl, scalars in event files, seconds by phase, and lines for
a person.
"""

import dataclasses
import importlib
import io
import math
import struct
import sys
import types

import pytest

from opdjax.config import Config, LogConfig
from opdjax.runs import metrics
from opdjax.runs.metrics import MetricWriter, Progress, Startup, Timer, require_trackers
from opdjax.runs.workdir import read_lines

SHOWN = {"loss/objective": -0.12345, "kl/k1": 0.5, "perf/tokens_per_second": 1234.5}


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, now=100.0):
        self.now = now

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


# Rows


def test_one_row_a_step(tmp_path):
    writer = MetricWriter(tmp_path, last_step=0, config=Config())
    writer.write(1, {"loss/objective": 0.5, "grad/norm": 2.0})
    writer.write(2, {"loss/objective": 0.1})
    # Rows are there before the writer is closed: a killed run keeps them.
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss/objective": 0.5, "grad/norm": 2.0},
        {"step": 2, "loss/objective": 0.1},
    ]
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_continued_run_cuts_the_rows_after_its_checkpoint(tmp_path):
    first = MetricWriter(tmp_path, last_step=0, config=Config())
    for step in range(1, 6):
        first.write(step, {"loss/objective": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    second = MetricWriter(tmp_path, last_step=3, config=Config())
    second.write(4, {"loss/objective": 40.0})
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss/objective"]) for row in rows] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_a_fresh_run_starts_with_an_empty_file(tmp_path):
    MetricWriter(tmp_path, last_step=0, config=Config()).write(1, {"x": 1.0})
    MetricWriter(tmp_path, last_step=0, config=Config())
    assert read_lines(tmp_path / "metrics.jsonl") == []


# Trackers


def tracked(*names):
    return Config(log=LogConfig(trackers=names))


def events_of(workdir):
    """(step, tag, value) of every scalar in the directory's event files, in the order they were
    written.
    """
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(workdir.glob("events*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path):
    writer = MetricWriter(tmp_path, last_step=0, config=tracked("tensorboard"))
    writer.send(0, {"eval/avg@k": 0.75})
    writer.write(1, {"loss/objective": 0.5, "grad/norm": 2.0})
    writer.write(2, {"loss/objective": 0.25})
    writer.close()
    assert events_of(tmp_path) == [
        (0, "eval/avg_at_k", 0.75),
        (1, "loss/objective", 0.5),
        (1, "grad/norm", 2.0),
        (2, "loss/objective", 0.25),
    ]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


# A package of the calls that a run makes, with their signatures; it records them.
PACKAGE = """
calls = []

class Run:
    def log(self, metrics, step=None):
        calls.append((step, dict(metrics)))

    def finish(self):
        calls.append("finished")

def init(project, name=None, config=None, resume="never"{more}):
    calls.append((project, name, config["seed"], resume))
    return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a package by a name, and returns its recorded calls."""
    monkeypatch.syspath_prepend(tmp_path / "packages")
    made = []

    def make(name):
        made.append(name)
        more = ", id=None, dir=None" if name == "wandb" else ""
        file = tmp_path / "packages" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(PACKAGE.replace("{more}", more))
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return lambda: sys.modules[name].calls

    yield make
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_continued_run_continues_the_run_of_its_tracker(name, fake, tmp_path, monkeypatch):
    calls, workdir = fake(name), tmp_path / "mine"
    workdir.mkdir()
    for first in (0, 2):
        writer = MetricWriter(workdir, last_step=first, config=tracked(name))
        writer.write(first + 1, {"loss/objective": 0.5})
        writer.send(first + 1, {"eval/avg@k": 0.75})
        writer.close()
    start, row, scores, end = calls()[:4]
    assert start[:1] + start[2:] == ("opdjax", 0, "allow")
    assert start[1].startswith("mine-")
    assert (row, scores, end) == (
        (1, {"loss/objective": 0.5}),
        (1, {"eval/avg@k": 0.75}),
        "finished",
    )
    assert calls()[4] == start
    # A run that starts anew in the same directory is another one, here in another project.
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "other")
    MetricWriter(workdir, last_step=0, config=tracked(name))
    assert calls()[-1][0] == "other"
    assert calls()[-1][1] != start[1]


def test_the_real_packages_take_these_calls(tmp_path, monkeypatch):
    """Without a network: wandb offline, trackio into a directory."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("wandb", "trackio"):
        pytest.importorskip(name)
        writer = MetricWriter(tmp_path, last_step=0, config=tracked(name))
        writer.write(1, {"loss/objective": 0.5, "staleness/kl_all": math.nan})
        writer.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert list(tmp_path.glob("trackio/opdjax.db"))


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio",) * 2]
)
def test_a_tracker_without_its_package_says_what_to_install(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"log\.trackers: {package} is not installed: pip install 'opdjax\[{name}\]'"
    with pytest.raises(ImportError, match=message):
        require_trackers((name,))


# Seconds


def test_timer_sums_phases_and_starts_anew():
    clock = Clock()
    timer = Timer(clock.perf_counter)
    for name, seconds in (("sample", 2.0), ("update", 0.5), ("sample", 1.0)):
        with timer.phase(name):
            clock.now += seconds
        clock.now += 10.0  # outside of every phase
    assert timer.take() == {"time/sample": 3.0, "time/update": 0.5, "time/step": 3.5}
    assert timer.take() == {"time/step": 0}
    with timer.phase("update"):
        clock.now += 0.25
    assert timer.take() == {"time/update": 0.25, "time/step": 0.25}


# Progress


def test_plain_lines_every_ten_seconds_and_at_the_end(clock):
    stream = io.StringIO()
    progress = Progress(0, 20, stream)
    for step in range(1, 21):
        clock.now += 3.0
        progress.show(step, SHOWN)
    progress.close()
    lines = stream.getvalue().splitlines()
    # Steps end at 3, 6, 9, ... s: the first is shown, then each that is ten or more seconds later,
    # and the last.
    assert [line.split()[1] for line in lines] == [
        "1/20",
        "5/20",
        "9/20",
        "13/20",
        "17/20",
        "20/20",
    ]
    assert lines[1] == "step 5/20  loss -0.1235  KL 0.5000  1234 tokens/s  45 s left"
    assert lines[-1].endswith("  0 s left")


def test_time_left_counts_from_where_the_run_was_continued_and_not_the_step_that_compiles(clock):
    stream = io.StringIO()
    progress = Progress(90, 100, stream)
    clock.now += 50.0
    progress.show(91, SHOWN)
    assert stream.getvalue().endswith("1234 tokens/s\n")
    clock.now += 12.0
    progress.show(94, SHOWN)
    # Three steps took 12 s; six are left.
    assert stream.getvalue().endswith("  24 s left\n")


def test_a_terminal_gets_a_bar(clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(2, 4, stream)
    progress.show(3, SHOWN)
    progress.show(4, SHOWN)
    progress.close()
    last = stream.getvalue().rsplit("\r", 1)[-1]
    assert "4/4" in last
    assert "loss -0.1235  KL 0.5000  1234 tokens/s" in last
    assert "step 3/4" not in stream.getvalue()


# Before the first step


def announced(config, programs, capsys, machine="cpu"):
    startup = Startup(config, machine, programs)
    startup.announce()
    return startup, capsys.readouterr().out


def test_the_time_of_the_last_run_of_the_same_programs_is_printed(tmp_path, capsys):
    config, programs = Config(), str(tmp_path / "programs")
    startup, text = announced(config, programs, capsys)
    assert "the first run of these programs" in text
    startup.first_step_done()
    again = dataclasses.replace(config, seed=1)
    assert (
        "the first step of the last such run came after 0 s"
        in announced(again, programs, capsys)[1]
    )
    longer = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, max_completion_length=99)
    )
    for other, machine in ((longer, "cpu"), (config, "TPU v5")):
        assert "the first run" in announced(other, programs, capsys, machine)[1]


def test_a_damaged_time_and_programs_that_are_not_kept_are_no_error(tmp_path, capsys):
    startup, _ = announced(Config(), str(tmp_path), capsys)
    startup.first_step_done()
    (file,) = (tmp_path / "first_step").iterdir()
    file.write_text("soon")
    assert "the first run" in announced(Config(), str(tmp_path), capsys)[1]
    startup, text = announced(Config(), None, capsys)
    startup.first_step_done()
    assert "the first run" in text
