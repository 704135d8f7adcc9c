"""A virtual environment per peer, made once from pinned versions."""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys

# torch comes from the default index: the CPU build on a machine whose index offers it, else the one
# with CUDA.
PINS = {
    "trl": (
        "trl==1.16.0",
        "torch==2.13.0",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
    ),
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8", "transformers==5.12.1"),
    # pillow and torch are needed and not declared.
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
    """The interpreter of a peer's environment, which is made or remade unless its stamp says that
    it holds these pins.
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
        said = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        raise InstallationError(f"not installed: {' '.join(said[-1:])[:300]}")
