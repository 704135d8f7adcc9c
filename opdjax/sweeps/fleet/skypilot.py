"""A sweep as managed jobs of SkyPilot, which finds machines, recovers those that are taken away,
and ends them.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import yaml

from opdjax.sweeps.fleet.shards import Fleet, SweepShard, require_program, submit_all

_GPUS = {"a100": "A100-80GB", "h100": "H100", "h200": "H200"}


def _as_typed(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


class _Dumper(yaml.SafeDumper):
    """Scripts as they would be typed."""

    yaml_representers = yaml.SafeDumper.yaml_representers | {str: _as_typed}


def tasks(fleet: Fleet) -> dict[str, str]:
    """Each shard's task as YAML, by its name."""
    return {
        shard.name: yaml.dump(_task(shard, fleet), Dumper=_Dumper, sort_keys=False, width=1000)
        for shard in fleet.shards
    }


def launch(fleet: Fleet, say: Callable[[str], None], *, is_dry: bool) -> int:
    """Submit the shards, or, dry, print what would be; how many were submitted."""
    made = tasks(fleet)
    if is_dry:
        for name, text in made.items():
            say(
                f"# {name}.yaml\n{text}\n# {' '.join(_command(fleet, name, pathlib.Path(f'{name}.yaml')))}\n"
            )
        return 0
    require_program("sky", "skypilot[gcp]")
    with tempfile.TemporaryDirectory() as directory:
        files = {name: pathlib.Path(directory) / f"{name}.yaml" for name in made}
        for name, file in files.items():
            file.write_text(made[name])
        return submit_all(
            ((name, _command(fleet, name, file)) for name, file in files.items()),
            _running(say),
            say,
        )


def _task(shard: SweepShard, fleet: Fleet) -> dict[str, Any]:
    config, machine = fleet.config, fleet.machine
    resources: dict[str, Any] = {"infra": f"gcp/*/{config.zone}" if config.zone else "gcp"}
    if machine.backend == "tpu":
        resources["accelerators"] = f"tpu-{machine.accelerator_type}"
        resources["accelerator_args"] = {
            "tpu_vm": True,
            "runtime_version": machine.chip.runtime_version,
        }
    else:
        resources["accelerators"] = f"{_GPUS[machine.name.rpartition('-')[0]]}:{machine.chips}"
    resources |= {
        "use_spot": config.spot,
        "job_recovery": {"max_restarts_on_errors": config.max_restarts},
    }
    task = {"name": shard.name, "workdir": ".", "resources": resources}
    if fleet.secrets:
        task["secrets"] = dict.fromkeys(fleet.secrets)
    return task | {"setup": _setup(fleet), "run": f'PATH="$PWD/.venv/bin:$PATH"\n{shard.command}\n'}


def _setup(fleet: Fleet) -> str:
    # The images have Python 3.10, which is too old; uv brings its own.
    requirements = "--requirement tpu/requirements.txt " if fleet.machine.backend == "tpu" else ""
    extras = ",".join((*fleet.extras, *(() if fleet.machine.backend == "tpu" else ("cuda", "gcs"))))
    return (
        "set -e\npython3 -m pip install --quiet --user uv\n"
        "test -x .venv/bin/python || ~/.local/bin/uv venv --quiet --python 3.11 .venv\n"
        f"~/.local/bin/uv pip install --quiet --python .venv/bin/python {requirements}--editable '.[{extras}]'\n"
    )


def _command(fleet: Fleet, name: str, file: pathlib.Path) -> list[str]:
    secrets = [word for secret in fleet.secrets for word in ("--secret", secret)]
    return ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", name, *secrets, str(file)]


def _running(say: Callable[[str], None]) -> set[str]:
    """Names of the jobs that have not ended; none, with a note, where SkyPilot could not tell."""
    asked = subprocess.run(
        ["sky", "jobs", "queue", "--skip-finished", "--all", "--output", "json"],
        capture_output=True,
        text=True,
    )
    try:
        asked.check_returncode()
        return {str(job["job_name"]) for job in json.loads(asked.stdout or "[]")}
    except (subprocess.CalledProcessError, ValueError, LookupError, TypeError):
        say(
            "note: sky jobs queue did not tell which jobs run already; a shard that is submitted twice shares its points with itself"
        )
        return set()
