"""Weights for a generator in another process: one file per version in `WORKDIR/published/`, written
atomically.
"""

from __future__ import annotations

import pathlib

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.flax import load_file, save

from opdjax.models.decoder import Params
from opdjax.models.partitioning import SAMPLER_AXES, shardings_of
from opdjax.ops.multihost import on_process_zero
from opdjax.ops.sharding import to_host
from opdjax.rollouts.near_policy.shards import ShardError, write_whole


def published(workdir: pathlib.Path) -> list[int]:
    """The published versions, in ascending order."""
    return sorted(int(path.stem) for path in (workdir / "published").glob("*.safetensors"))


def publish(workdir: pathlib.Path, version: int, params: Params, keep_from: int) -> None:
    """Write the weights after `version` updates and delete those of versions before `keep_from`;
    StorageError if there is no room.
    """
    params = to_host(params)

    def write():
        directory = workdir / "published"
        write_whole(directory / f"{version:08}.safetensors", save(flatten_dict(params, sep=".")))
        for old in published(workdir):
            if old < keep_from:
                (directory / f"{old:08}.safetensors").unlink(missing_ok=True)

    on_process_zero(write)


def fetch(workdir: pathlib.Path, version: int, mesh: Mesh) -> Params:
    """The weights of a version, sharded over the mesh; FileNotFoundError if they are not stored."""
    path = workdir / "published" / f"{version:08}.safetensors"
    try:
        params = unflatten_dict(load_file(path), sep=".")
    except SafetensorError as error:
        raise ShardError(
            f"{path} is damaged: {error}; restart the learner, which publishes its weights again"
        ) from error
    return jax.device_put(params, shardings_of(params, mesh, SAMPLER_AXES))
