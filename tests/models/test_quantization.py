"""Weights in 8 bits: rounding by hand, and a decoder that computes as with the rounded weights."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MODEL, in_tiles, make_batch, make_models, scored
from tiny_runs import SHORT, TINY, assert_equal_trees, final_weights, vary

from opdjax.config import EstimatorConfig, LoraConfig
from opdjax.config.validation import ConfigError
from opdjax.engine.scorer import score
from opdjax.engine.update import UpdateSpec, loss_and_grad
from opdjax.models import decoder, kv_cache
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.models.lora import combine, init_adapters
from opdjax.models.partitioning import shardings_of
from opdjax.models.quantization import in_8_bits, quantize
from opdjax.ops.sharding import make_mesh
from opdjax.train import train

VOPD, KINDS = EstimatorConfig("vopd", baseline="full"), ("int8", "int8_head")


def rounded(tree):
    """The weights in a wide dtype that the 8 bits stand for."""
    found = {}
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            found[name] = rounded(leaf)
        elif not name.endswith("_scale"):
            scale = tree.get(f"{name}_scale")
            found[name] = leaf if scale is None else leaf * scale[..., None].astype(float)
    return found


def test_rounding_by_hand():
    # Scale 2/127; 1 is 63.5 of these, which rounds to the even 64, and 0.5 is 31.75.
    values, scale = quantize(jnp.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(values, [[64, -127, 32], [0, 0, 0]])
    np.testing.assert_allclose(scale, [2 / 127, 1])
    assert values.dtype == jnp.int8


def test_a_weight_moves_by_at_most_half_a_scale(rng):
    weight = rng.normal(size=(3, 5, 40)).astype(np.float32)
    values, scale = quantize(weight)
    assert (np.abs(weight - values * scale[..., None]) <= 0.5001 * scale[..., None]).all()


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.usefixtures("x64")
def test_scores_are_those_of_the_rounded_weights(weights, ties, rng):
    config = dataclasses.replace(MODEL, ties_embeddings=ties, has_qkv_bias=True)
    params = in_8_bits(decoder.init_params(config, jax.random.key(0), jnp.float64), weights)
    tables = ["embedding"] if ties else ["embedding", "head"]
    assert [name for name in tables if params[name].dtype == jnp.int8] == (
        tables if weights == "int8_head" else []
    )
    batch = make_batch(rng, rows=4)

    def run(params):
        head = decoder.head_of(params, valid_vocab=10)
        scores = score(params, head, batch, config=config, needs="top_k", top_k=3, tile=8)
        layers = kv_cache.split_layers(params["layers"], config)
        rows = batch.tokens, batch.segment_ids == 1
        cached, _ = kv_cache.prefill(params, layers, config, *rows, jnp.float64)
        return scores, cached

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-9), run(params), run(rounded(params)))


@pytest.mark.usefixtures("x64")
def test_adapters_over_8_bits_have_the_gradient_over_the_rounded_weights(rng):
    student, teacher = make_models("float64")
    lora = LoraConfig(rank=2, targets=("q", "down"))
    adapters = jax.tree.map(lambda x: x + 0.3, init_adapters(MODEL, lora, 0))
    batch, head = scored(make_batch(rng), teacher, VOPD)
    frozen = in_8_bits(student, "int8")
    spec = UpdateSpec(MODEL, in_tiles(VOPD), "float64", max_completion_length=7)
    run = jax.jit(lambda base: loss_and_grad(adapters, batch, head, spec, frozen=base)[:2])
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-9), run(frozen), run(rounded(frozen)))


@pytest.mark.parametrize("weights", KINDS)
def test_a_mesh_holds_and_computes_what_one_device_does(weights, rng):
    checkpoint, mesh = open_checkpoint("@mini_teacher"), make_mesh(2, 2, 2)
    one, many = (load_params(checkpoint, "float32", on, weights=weights) for on in (None, mesh))
    assert_equal_trees(one, many)
    expected = shardings_of(many, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, of: x.sharding == of, many, expected)))
    tokens = jnp.asarray(rng.integers(0, 200, (4, 12)), jnp.int32)
    run = partial(decoder.forward, config=checkpoint.config, segment_ids=jnp.ones_like(tokens))
    run = jax.jit(run, static_argnames="mesh")
    np.testing.assert_allclose(
        run(many, tokens=tokens, mesh=mesh), run(one, tokens=tokens, mesh=None), atol=1e-4
    )


def test_a_student_with_adapters_is_exported_over_its_base_as_stored(tmp_path):
    """The run trains, scores and samples with 8 bits; its adapters are merged into the checkpoint's
    own weights.
    """
    with_lora = dataclasses.replace(TINY, lora=LoraConfig(rank=2, targets=("v",)))
    # The first of two steps has a learning rate of 0.
    two_steps = {"train": {"num_steps": 2, "frozen_weights": "int8_head"}}
    config = vary(with_lora, **SHORT | two_steps)
    train(config, tmp_path / "run")
    found = final_weights(tmp_path / "run")
    stored = load_params(open_checkpoint(TINY.student.path), "float32")
    moved = {name for name, x in found["layers"].items() if (x != stored["layers"][name]).any()}
    assert moved == {"v_kernel"}
    del found["layers"], stored["layers"]
    assert_equal_trees(found, stored)


def test_what_is_trained_is_not_held_in_8_bits():
    with pytest.raises(ConfigError, match="train.frozen_weights .* all weights are trained"):
        vary(teacher={"path": "@student"}, train={"frozen_weights": "int8"})


def test_the_adapters_base_is_one_tree(rng):
    params = in_8_bits(make_models("float32")[0], "int8")
    both = combine(params, init_adapters(MODEL, LoraConfig(rank=2, targets=("q",)), 0))
    assert {"q_kernel", "q_kernel_scale", "q_lora_a", "q_lora_b"} <= both["layers"].keys()
