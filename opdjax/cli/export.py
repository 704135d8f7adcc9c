"""Exports the student of a checkpoint of a run."""

import os
import pathlib

from jax.sharding import Mesh

from opdjax.config.run import Config
from opdjax.config.validation import ConfigError
from opdjax.models.hf import load_params
from opdjax.models.hf_export import export_student
from opdjax.models.lora import combine, continues
from opdjax.ops.sharding import make_mesh
from opdjax.rollouts.setup import open_student
from opdjax.rollouts.start import open_checkpoints


def export_step(
    workdir: str | os.PathLike, step: str, out: pathlib.Path, dtype: str | None
) -> pathlib.Path:
    """Write the student of one checkpoint of a run as a Hugging Face checkpoint, and return its
    directory.

    `step` is `latest`, `best` or a number; ConfigError if there is no such checkpoint.
    """
    with open_checkpoints(workdir) as run:
        config, number = run.config, run.step(step)
        mesh, student = _export_mesh(config), open_student(config)
        trained = run.state(number, student, mesh).params
        with_adapter, frozen = not continues(student, config.lora), None
        if config.lora.rank:
            frozen = load_params(student, "float32", mesh, with_adapter=with_adapter)
        params = combine(frozen, trained)
        return export_student(params, student, config.lora, config.student, out, dtype)


def _export_mesh(config: Config) -> Mesh:
    """The mesh of the run if this machine has the devices for it, else one device."""
    try:
        return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ConfigError:
        return make_mesh(1)
