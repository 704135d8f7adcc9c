"""Exports the student of a checkpoint of a run."""

import os
import pathlib
from functools import partial

import jax
from jax.sharding import Mesh

from opdjax.config.run import Config
from opdjax.config.validation import ConfigError
from opdjax.engine.update import TrainState, init_state, make_optimizer
from opdjax.models.decoder import abstract_params
from opdjax.models.hf import Checkpoint, load_params
from opdjax.models.hf_export import export_student
from opdjax.models.lora import combine, continues, init_adapters
from opdjax.models.partitioning import shardings_of
from opdjax.ops.sharding import abstract_like, make_mesh
from opdjax.rollouts.setup import open_student
from opdjax.runs.checkpoint import Checkpointer
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.workdir import read_config


def export_step(
    workdir: str | os.PathLike, step: str, out: pathlib.Path, dtype: str | None
) -> pathlib.Path:
    """Write the student of one checkpoint of a run as a Hugging Face checkpoint, and return its
    directory.

    `step` is `latest`, `best` or a number; ConfigError if there is no such checkpoint.
    """
    with read_only_workdir(workdir, lambda name: name == "config.json") as mirror:
        config = read_config(mirror.directory)
        kept = config.checkpoint.keep
        checkpointer = Checkpointer(mirror.checkpoints, keep=kept, is_read_only=True)
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
        with_adapter, frozen = not continues(student, config.lora), None
        if config.lora.rank:
            frozen = load_params(student, "float32", mesh, with_adapter=with_adapter)
        params = combine(frozen, trained)
        return export_student(params, student, config.lora, config.student, out, dtype)


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
