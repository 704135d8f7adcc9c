"""Exports the student of one checkpoint of a run."""

from __future__ import annotations

import os
import pathlib
from functools import partial

import jax
from jax.sharding import Mesh

from opdjax.config.run import Config
from opdjax.config.validation import ConfigError
from opdjax.engine.update import init_state, make_optimizer
from opdjax.models.decoder import abstract_params
from opdjax.models.hf import load_params
from opdjax.models.lora import combine, init_adapters
from opdjax.models.partitioning import shardings_of
from opdjax.ops.sharding import abstract_like, make_mesh
from opdjax.rollouts.setup import open_student
from opdjax.runs.checkpoint import Checkpointer
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.workdir import read_config
from opdjax.train import _export_student


def export_step(
    workdir: str | os.PathLike, step: str, out: pathlib.Path, dtype: str | None
) -> pathlib.Path:
    """Write the student of one checkpoint (`latest`, `best` or a step) of a run as a Hugging Face
    checkpoint.
    """
    home = read_only_workdir(workdir, lambda name: name == "config.json")
    config = read_config(home.directory)
    source, lora = open_student(config), config.lora
    keep, best_metric = config.checkpoint.keep, config.checkpoint.best_metric
    checkpointer = Checkpointer(
        home.checkpoints, keep=keep, best_metric=best_metric, is_read_only=True
    )
    named = {"latest": checkpointer.latest_step, "best": checkpointer.best_step}
    wanted = named[step] if step in named else int(step) if step.isdecimal() else None
    if wanted not in checkpointer.steps:
        raise ConfigError(
            f"{home.name} has no checkpoint {step!r}; there are {checkpointer.steps} (best: {named['best']})"
        )
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    mesh = _mesh_for_export(config)
    adapters = partial(init_adapters, source.config, lora, config.seed)
    trained = jax.eval_shape(adapters) if lora.rank else abstract_params(source.config, "float32")
    abstract = jax.eval_shape(partial(init_state, optimizer=optimizer, mesh=mesh), trained)
    like = abstract_like(abstract, shardings_of(abstract, mesh))
    found = checkpointer.restore(wanted, like).params
    return _export_student(
        config,
        source,
        combine(load_params(source, "float32", mesh) if lora.rank else None, found),
        out,
        dtype,
    )


def _mesh_for_export(config: Config) -> Mesh:
    """The run's own mesh where there are the devices for it, else one device."""
    try:
        return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ConfigError:
        return make_mesh(1)
