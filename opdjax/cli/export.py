"""Exports the student of a checkpoint of a run."""

from __future__ import annotations

import os
import pathlib
from functools import partial

import huggingface_hub
import jax
from jax.sharding import Mesh

from opdjax.config.run import Config
from opdjax.config.validation import ConfigError
from opdjax.engine.update import TrainState, init_state, make_optimizer
from opdjax.models.decoder import abstract_params
from opdjax.models.hf import Checkpoint, load_params
from opdjax.models.lora import combine, init_adapters
from opdjax.models.partitioning import shardings_of
from opdjax.ops.sharding import abstract_like, make_mesh
from opdjax.rollouts.export import export_student
from opdjax.rollouts.setup import compute_dtype, open_student
from opdjax.runs.checkpoint import Checkpointer
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.workdir import read_config, read_run_config


def export_step(
    workdir: str | os.PathLike, step: str, out: pathlib.Path, dtype: str | None
) -> pathlib.Path:
    """Write the student of one checkpoint of a run as a Hugging Face checkpoint, and return its
    directory.

    `step` is `latest`, `best` or a number; ConfigError if there is no such checkpoint. `dtype`:
    None: that of the run's forward pass.
    """
    with read_only_workdir(workdir, {"config.json", "eval.jsonl"}.__contains__) as mirror:
        config = read_config(mirror.directory)
        devices = read_run_config(mirror.directory)["environment"].get("devices", [])
        backend = "cpu" if "cpu" in devices else "an accelerator"
        dtype = dtype or compute_dtype(config.train.dtype, backend)
        checkpointer = Checkpointer(
            mirror.checkpoints,
            keep=config.checkpoint.keep,
            is_read_only=True,
        )
        best = checkpointer.best_step
        named = {"latest": checkpointer.latest_step, "best": best}
        wanted = named.get(step, int(step) if step.isdecimal() else None)
        if wanted not in checkpointer.steps:
            raise ConfigError(
                f"{mirror.name} has no checkpoint {step!r}; there are {checkpointer.steps} (best: "
                f"{best})"
            )
        mesh, student = _export_mesh(config), open_student(config)
        trained = checkpointer.restore(wanted, _abstract_state(config, student, mesh)).params
        frozen = load_params(student, "float32", mesh) if config.lora.rank else None
        params = combine(frozen, trained)
        return export_student(params, student, config, mirror.directory, out, dtype, wanted)


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


def _abstract_state(config: Config, student: Checkpoint, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the run's training state."""
    adapters = partial(init_adapters, student.config, config.lora, config.seed)
    is_lora = config.lora.rank > 0
    trained = jax.eval_shape(adapters) if is_lora else abstract_params(student.config, "float32")
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer, mesh=mesh), trained)
    return abstract_like(state, shardings_of(state, mesh))


def _export_mesh(config: Config) -> Mesh:
    """The mesh of the run if this machine has the devices for it, else one device."""
    try:
        return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ConfigError:
        return make_mesh(1)
