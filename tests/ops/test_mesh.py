"""A run on eight simulated devices equals the run on one, for every mesh."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_pair import assert_same_run, make_pair, mesh_config, weights

from opdjax.cli.export import export_step
from opdjax.config import MeshConfig, TrainConfig
from opdjax.config.validation import ConfigError
from opdjax.models.decoder import forward
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.sharding import make_mesh
from opdjax.rollouts.setup import prepare
from opdjax.train import train

MESHES = {"8x1x1": MeshConfig(8), "2x4x1": MeshConfig(2, 4), "2x2x2": MeshConfig(2, 2, 2)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    make_pair(directory)
    return directory


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """The run on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    train(mesh_config(pair, MeshConfig(1)), workdir)
    return workdir


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_are_one_and_their_checkpoint_is_continued_on_one_and_back(
    mesh, alone, pair, tmp_path
):
    train(mesh_config(pair, MESHES[mesh]), tmp_path / "eight")
    assert_same_run(tmp_path / "eight", alone)
    if mesh == "2x2x2":
        for source, target in ((tmp_path / "eight", MeshConfig(1)), (alone, MESHES[mesh])):
            assert_same_run(continued(source, pair, target, tmp_path / f"on{target.tensor}"), alone)


def continued(workdir_before, pair, mesh, workdir):
    """The run of `workdir_before`, killed after its first step, continued on another mesh."""
    shutil.copytree(workdir_before, workdir)
    for gone in ("checkpoints/2", "student"):
        shutil.rmtree(workdir / gone)
    (workdir / "result.json").unlink()
    train(mesh_config(pair, mesh), workdir)
    return workdir


def test_a_model_that_the_mesh_does_not_divide_is_refused_by_the_axis(pair):
    with pytest.raises(
        ConfigError,
        match="mesh.tensor is 4, which does not divide num_key_value_heads 2, vocab_size 214 of "
        "the student",
    ):
        prepare(mesh_config(pair, MeshConfig(1, 1, 4)))
    with pytest.raises(
        ConfigError, match="mesh.fsdp is 3, which does not divide hidden_size 16 of the student"
    ):
        prepare(mesh_config(pair, MeshConfig(1, 3, 1), train=TrainConfig(prompts_per_step=12)))


def test_gathered_weights_are_not_kept_for_the_backward_pass(pair):
    """Residuals of the trunk on 1x8x1 hold sharded kernels only."""
    checkpoint = open_checkpoint(pair / "student")
    mesh = make_mesh(1, 8)
    params = load_params(checkpoint, "float32", mesh)
    tokens = jnp.zeros((8, 5), jnp.int32)

    def kept(remat):
        trunk = lambda params: forward(
            params, checkpoint.config, tokens, jnp.ones_like(tokens), remat=remat, mesh=mesh
        )
        leaves = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(trunk, params)[1], params))
        return [leaf.shape for leaf in leaves].count(params["layers"]["gate_kernel"].shape)

    assert kept("none") == kept("layer") == 3  # the sharded kernels of q, gate and up


def test_export_of_a_sharded_checkpoint(pair, tmp_path):
    config = mesh_config(
        pair, MeshConfig(2, 2, 2), train=TrainConfig(num_steps=1, prompts_per_step=8)
    )
    train(config, tmp_path / "run")
    out = export_step(tmp_path / "run", "latest", tmp_path / "out", None)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(open_checkpoint(out), "float32"),
        weights(tmp_path / "run"),
    )
