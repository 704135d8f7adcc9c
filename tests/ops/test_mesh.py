"""A run on eight simulated devices equals the run on one, for every mesh."""

import jax
import jax.numpy as jnp
import pytest
from mesh_pair import make_pair, mesh_config
from tiny_runs import assert_close_run, assert_equal_trees, final_weights, rewound

from opdjax.cli.export import export_step
from opdjax.config import MeshConfig, TrainConfig
from opdjax.config.validation import ConfigError
from opdjax.models.decoder import forward
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.sharding import make_mesh
from opdjax.rollouts.setup import prepare
from opdjax.train import train

pytestmark = pytest.mark.usefixtures("shared_programs")

MESHES = {"2x2x2": MeshConfig(2, 2, 2), "8x1x1": MeshConfig(8), "2x4x1": MeshConfig(2, 4)}


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """The run on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    train(mesh_config(pair, MeshConfig(1)), workdir)
    return workdir


@pytest.fixture(scope="module")
def split(pair, tmp_path_factory):
    """The run on 2x2x2 devices."""
    workdir = tmp_path_factory.mktemp("split")
    train(mesh_config(pair, MESHES["2x2x2"]), workdir)
    return workdir


@pytest.mark.long
def test_a_run_on_eight_devices_equals_the_run_on_one(split, alone):
    assert_close_run(split, alone)


@pytest.mark.long
@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_every_mesh_equals_one_device(mesh, alone, pair, tmp_path):
    train(mesh_config(pair, MESHES[mesh]), tmp_path / "eight")
    assert_close_run(tmp_path / "eight", alone)


@pytest.mark.long
def test_experts_on_eight_devices_equal_those_on_one(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    fields = {"architectures": ["Qwen3MoeForCausalLM"], "layer_types": None, **experts}
    make_pair(tmp_path, **fields)
    for name, mesh in {"one": MeshConfig(1), "eight": MESHES["2x2x2"]}.items():
        train(mesh_config(tmp_path, mesh), tmp_path / name)
    # A token's experts are added in another order.
    assert_close_run(tmp_path / "eight", tmp_path / "one", rtol=3e-5)


def continued(workdir_before, pair, mesh, workdir):
    """The run of `workdir_before`, killed after its first step, continued on another mesh."""
    rewound(workdir_before, workdir, 1)
    train(mesh_config(pair, mesh), workdir)
    return workdir


@pytest.mark.long
def test_a_run_on_eight_devices_continues_on_one(split, alone, pair, tmp_path):
    assert_close_run(continued(split, pair, MeshConfig(1), tmp_path / "run"), alone)


@pytest.mark.long
def test_a_run_on_one_device_continues_on_eight(alone, pair, tmp_path):
    assert_close_run(continued(alone, pair, MESHES["2x2x2"], tmp_path / "run"), alone)


@pytest.mark.long
def test_export_of_a_sharded_checkpoint(split, tmp_path):
    out = export_step(split, "latest", tmp_path / "out", None)
    assert_equal_trees(load_params(open_checkpoint(out), "float32"), final_weights(split))


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
