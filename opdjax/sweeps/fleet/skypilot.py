"""A sweep as managed jobs of SkyPilot, which finds machines, replaces preempted ones, and ends
them.
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


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as block scalars."""

    yaml_representers = yaml.SafeDumper.yaml_representers | {str: _represent}


def tasks(fleet: Fleet) -> dict[str, str]:
    """The SkyPilot task of each shard as YAML, by job name."""
    return {
        shard.name: yaml.dump(_task(shard, fleet), Dumper=_Dumper, sort_keys=False, width=1000)
        for shard in fleet.shards
    }


def launch(fleet: Fleet, log: Callable[[str], None], *, is_dry: bool) -> int:
    """Submit the shards and return their number; a dry run only prints the tasks."""
    texts = tasks(fleet)
    if is_dry:
        for name, text in texts.items():
            command = _command(fleet, name, pathlib.Path(f"{name}.yaml"))
            log(f"# {name}.yaml\n{text}\n# {' '.join(command)}\n")
        return 0
    require_program("sky", "skypilot[gcp]")
    with tempfile.TemporaryDirectory() as directory:
        commands = []
        for name, text in texts.items():
            file = pathlib.Path(directory) / f"{name}.yaml"
            file.write_text(text, "utf-8")
            commands.append((name, _command(fleet, name, file)))
        return submit_all(commands, _running(log), log)


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
    # The Python 3.10 of the images is too old; uv installs its own.
    requirements = "--requirement tpu/requirements.txt " if fleet.machine.backend == "tpu" else ""
    extras = ",".join((*fleet.extras, *(() if fleet.machine.backend == "tpu" else ("cuda", "gcs"))))
    return (
        "set -e\npython3 -m pip install --quiet --user uv\n"
        "test -x .venv/bin/python || ~/.local/bin/uv venv --quiet --python 3.11 .venv\n"
        f"~/.local/bin/uv pip install --quiet --python .venv/bin/python {requirements}"
        f"--editable '.[{extras}]'\n"
    )


def _command(fleet: Fleet, name: str, file: pathlib.Path) -> list[str]:
    secrets = [word for secret in fleet.secrets for word in ("--secret", secret)]
    return ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", name, *secrets, str(file)]


def _running(log: Callable[[str], None]) -> set[str]:
    """Names of the jobs that have not ended; empty, with a note, if SkyPilot cannot list them."""
    command = ["sky", "jobs", "queue", "--skip-finished", "--all", "--output", "json"]
    queue = subprocess.run(command, capture_output=True, text=True)
    try:
        queue.check_returncode()
        return {str(job["job_name"]) for job in json.loads(queue.stdout or "[]")}
    except (subprocess.CalledProcessError, ValueError, LookupError, TypeError):
        log(
            "note: sky jobs queue could not list the running jobs; a shard that is submitted twice "
            "shares its points with its copy"
        )
        return set()
