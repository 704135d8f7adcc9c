"""Exports the student of a checkpoint of a run."""

import os
import pathlib

import huggingface_hub
from jax.sharding import Mesh

from opdjax.config.run import Config
from opdjax.config.validation import ConfigError
from opdjax.models.hf import load_params
from opdjax.models.lora import combine, continues
from opdjax.ops.sharding import make_mesh
from opdjax.rollouts.export import export_student
from opdjax.rollouts.setup import compute_dtype, open_student
from opdjax.rollouts.start import open_checkpoints


def export_step(
    workdir: str | os.PathLike, step: str, out: pathlib.Path, dtype: str | None
) -> pathlib.Path:
    """Write the student of one checkpoint of a run as a Hugging Face checkpoint, and return its
    directory.

    `step` is `latest`, `best` or a number; ConfigError if there is no such checkpoint. `dtype`:
    None: that of the run's forward pass.
    """
    with open_checkpoints(workdir) as run:
        config, number = run.config, run.step(step)
        backend = "cpu" if "cpu" in run.environment.get("devices", []) else "an accelerator"
        dtype = dtype or compute_dtype(config.train.dtype, backend)
        mesh, student = _export_mesh(config), open_student(config)
        trained = run.state(number, student, mesh).params
        with_adapter, frozen = not continues(student, config.lora), None
        if config.lora.rank:
            frozen = load_params(student, "float32", mesh, with_adapter=with_adapter)
        params = combine(frozen, trained)
        return export_student(params, student, config, run.directory, out, dtype, number)


def require_token() -> None:
    """ConfigError without a token of the hub, before anything is exported."""
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            "--push-to-hub needs a token of the hub, and there is none; run `hf auth login`, or "
            "set the environment variable HF_TOKEN"
        )


def push(directory: pathlib.Path, repository: str) -> str:
    """Upload an exported student to a repository of the hub, by default private; its address."""
    api = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=directory)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{directory} was written, but not uploaded to {repository}: {reason}; try again with "
            f"hf upload {repository} {directory}"
        ) from error
    return str(made)


def _export_mesh(config: Config) -> Mesh:
    """The mesh of the run if this machine has the devices for it, else one device."""
    try:
        return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ConfigError:
        return make_mesh(1)
