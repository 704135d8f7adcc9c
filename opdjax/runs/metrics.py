"""Writes a run's metrics: metrics.jsonl, TensorBoard on request, progress on the terminal."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from opdjax.config import Config
from opdjax.config.validation import MissingExtraError, to_dict
from opdjax.runs.workdir import append_lines, cut_lines
from opdjax.types import Metrics

_SECONDS_BETWEEN_LINES = 10.0
# Settings that change neither the programs of a run nor what it does before its first step.
_LEFT_OUT = ("seed", "log", "checkpoint")


class MetricWriter:
    """Appends `{"step": n, ...}` rows to metrics.jsonl, after dropping rows beyond `last_step`."""

    def __init__(self, workdir: pathlib.Path, *, last_step: int, tensorboard: bool):
        self._file = workdir / "metrics.jsonl"
        cut_lines(self._file, last_step)
        self._events = _event_writer(workdir, last_step) if tensorboard else None

    def write(self, step: int, metrics: Metrics) -> None:
        """Write the row of one step."""
        # JSON has no NaN: values that are not finite become null.
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        append_lines(self._file, [{"step": step} | row])
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the TensorBoard files."""
        if self._events is not None:
            self._events.close()


def _event_writer(workdir: pathlib.Path, last_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            "log.tensorboard needs tensorboardX: pip install 'opdjax[tensorboard]'"
        ) from error
    return SummaryWriter(str(workdir), purge_step=last_step + 1)


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
        kl = f"KL {metrics['kl/student_teacher']:.4f}  " if "kl/student_teacher" in metrics else ""
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
