"""Writes a run's metrics: metrics.jsonl, trackers on request, progress on the terminal."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

from tqdm import tqdm

from opdjax.config import Config
from opdjax.config.validation import MissingExtraError, to_dict
from opdjax.runs.workdir import append_lines, cut_lines
from opdjax.types import Metrics

_SECONDS_BETWEEN_LINES = 10.0
# Settings that change neither the programs of a run nor what it does before its first step.
_LEFT_OUT = ("seed", "log", "checkpoint")


class Tracker(Protocol):
    """Where a run's numbers go besides its files: a run of wandb or trackio is one."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Add the values of a step; steps do not fall."""

    def finish(self) -> None:
        """Send what is left."""


class _TensorBoard:
    """Event files as a tracker."""

    def __init__(self, workdir: pathlib.Path, last_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir), purge_step=last_step + 1)
        self.finish = self._writer.close

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name.replace("@", "_at_"), value, step)


class MetricWriter:
    """Appends `{"step": n, ...}` rows to metrics.jsonl, after dropping rows beyond `last_step`, and
    sends them to the trackers of the config.
    """

    def __init__(self, workdir: pathlib.Path, *, last_step: int, config: Config):
        self._file = workdir / "metrics.jsonl"
        cut_lines(self._file, last_step)
        open_named = partial(_open_tracker, workdir=workdir, last_step=last_step, config=config)
        self._trackers = list(map(open_named, config.log.trackers))

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the row of one step."""
        # JSON has no NaN: values that are not finite become null.
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_lines(self._file, [{"step": step} | row])
        self.send(step, metrics)

    def send(self, step: int, metrics: Metrics) -> None:
        """Send values to the trackers alone: other files of the run hold them."""
        for tracker in self._trackers:
            tracker.log(metrics, step=step)

    def close(self) -> None:
        """End the runs of the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def require_trackers(names: tuple[str, ...]) -> None:
    """MissingExtraError if the package of a tracker is not installed."""
    for name in names:
        package = "tensorboardX" if name == "tensorboard" else name
        if importlib.util.find_spec(package) is None:
            advice = f"pip install 'opdjax[{name}]'"
            raise MissingExtraError(f"log.trackers: {package} is not installed: {advice}")


def _open_tracker(name: str, workdir: pathlib.Path, last_step: int, config: Config) -> Tracker:
    """The tracker of a run; one that continues from a checkpoint continues its tracker's run."""
    if name == "tensorboard":
        return _TensorBoard(workdir, last_step)
    file = workdir / "tracker_run"
    if not last_step or not file.exists():
        file.write_text(uuid.uuid4().hex[:8])
    id = file.read_text()
    return importlib.import_module(name).init(
        project=os.environ.get(f"{name.upper()}_PROJECT", "opdjax"),
        name=f"{workdir.absolute().name}-{id}",
        config=to_dict(config),
        resume="allow",
        **({"id": id, "dir": str(workdir)} if name == "wandb" else {}),
    )


class Timer:
    """Seconds per named phase of a step, as `time/NAME`. `spans` lists the start (seconds since the
    epoch) and duration of each phase.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._spent, self.spans = clock, {}, []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to `name`."""
        began, start = time.time(), self._clock()
        yield
        seconds = self._clock() - start
        self._spent[name] = self._spent.get(name, 0.0) + seconds
        self.spans.append({"what": name, "start": began, "seconds": seconds})

    def take(self) -> Metrics:
        """Seconds of the phases since the last call, and their sum as `time/step`."""
        spent, self._spent, self.spans = self._spent, {}, []
        return {f"time/{name}": seconds for name, seconds in spent.items()} | {
            "time/step": sum(spent.values())
        }


class Progress:
    """A progress bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, first: int, total: int, stream=sys.stderr):
        self._total, self._stream, self._last_line = total, stream, 0.0
        # Set after the first step, which compiles and would distort the estimate.
        self._timed_from: tuple[float, int] | None = None
        self._bar = (
            tqdm(initial=first, total=total, unit="step", file=stream) if stream.isatty() else None
        )

    def show(self, step: int, metrics: Metrics) -> None:
        """Show the metrics of a finished step."""
        # The estimate by sampled tokens: every recipe has it, so that recipes can be compared.
        kl = f"KL {metrics['kl/k1']:.4f}  " if "kl/k1" in metrics else ""
        speed = f"{metrics['perf/tokens_per_second']:.0f} tokens/s"
        text = f"loss {metrics['loss/objective']:.4f}  {kl}{speed}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
            return
        now = time.perf_counter()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._total:
            self._last_line = now
            line = f"step {step}/{self._total}  {text}{self._time_left(now, step)}"
            print(line, file=self._stream, flush=True)
        self._timed_from = self._timed_from or (now, step)

    def _time_left(self, now: float, step: int) -> str:
        if self._timed_from is None:
            return ""
        start, first = self._timed_from
        return f"  {(now - start) / (step - first) * (self._total - step):.0f} s left"

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()


class Startup:
    """Times a run until its first step. The time is kept beside the compiled programs, and the next
    run of the same programs says it: without the programs it would be wrong.
    """

    def __init__(self, config: Config, machine: Any, programs: str | None):
        """`machine`: what programs depend on beside the config. `programs`: their directory."""
        shape = {name: part for name, part in to_dict(config).items() if name not in _LEFT_OUT}
        key = json.dumps([shape, str(machine)], sort_keys=True, default=str)
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._file = pathlib.Path(programs, "first_step", name) if programs else None
        self._begin = time.perf_counter()

    def announce(self) -> None:
        """Print that programs are compiled, and when the first step is expected."""
        expected = "the first run of these programs: large models take minutes"
        if self._file is not None:
            with suppress(ValueError, OSError):  # no such file: no run before
                seconds = float(self._file.read_text()[:32])
                expected = f"the first step of the last such run came after {seconds:.0f} s"
        print(f"compiling the programs of the run ({expected})", flush=True)

    def first_step_done(self) -> None:
        """Keep the time until now for the next run."""
        if self._file is None:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(f"{time.perf_counter() - self._begin:.1f}\n")
