"""A virtual environment per peer, made once from pinned versions."""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys

# torch comes from the default index: the CPU build if the index has it, otherwise the CUDA build.
PINS = {
    "trl": (
        "trl==1.16.0",
        "torch==2.13.0",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
    ),
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8", "transformers==5.12.1"),
    # easydel needs pillow and torch but does not declare them.
    "easydel": (
        "easydel==0.3.0",
        "jax==0.9.2",
        "flax==0.12.3",
        "transformers==5.5.4",
        "torch==2.13.0",
        "pillow==12.3.0",
    ),
}
CUDA_PINS = {"tunix": ("jax[cuda13]==0.10.2",), "easydel": ("jax[cuda13]==0.9.2",)}


class InstallationError(RuntimeError):
    """A peer's environment could not be made; the message says why."""


def python_of(peer: str, root: pathlib.Path, device: str) -> str:
    """Return the interpreter of a peer's environment.

    The environment is made again unless its stamp names these pins.
    """
    pins = PINS[peer] + (CUDA_PINS.get(peer, ()) if device == "gpu" else ())
    directory = root / f"{peer}-{device}"
    stamp, python = directory / ".installed", directory / "bin" / "python"
    wanted = hashlib.sha256("\n".join((sys.version, *pins)).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making {directory} with {', '.join(pins)}", file=sys.stderr, flush=True)
        _run([sys.executable, "-m", "venv", "--clear", str(directory)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins])
        stamp.write_text(wanted)
    return str(python)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise InstallationError(f"not installed: {' '.join(errors[-1:])[:300]}")
