"""What a run prints before its first step: what it loads and compiles, and for how long."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import time
from typing import Any

from opdjax.config import Config
from opdjax.config.validation import to_dict

# Settings that change neither the programs of a run nor what it does before its first step.
_LEFT_OUT = ("seed", "log", "checkpoint")


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
            with contextlib.suppress(ValueError, OSError):  # no such file: no run before
                seconds = float(self._file.read_text()[:32])
                expected = f"the first step of the last such run came after {seconds:.0f} s"
        print(f"compiling the programs of the run ({expected})", flush=True)

    def first_step_done(self) -> None:
        """Keep the time until now for the next run."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(f"{time.perf_counter() - self._begin:.1f}\n")
