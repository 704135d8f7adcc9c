"""Adapters: the function they add, their training, and that PEFT and transformers read them."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import (
    MODEL,
    gradient,
    in_tiles,
    make_batch,
    make_models,
    relative_difference,
    scored,
)

from opdjax.config import EstimatorConfig, LoraConfig, ModelConfig, OptimizerConfig
from opdjax.config.validation import ConfigError
from opdjax.engine.update import UpdateSpec, init_state, loss_and_grad, make_optimizer, make_update
from opdjax.models.decoder import abstract_params, forward
from opdjax.models.hf import CheckpointError, fingerprint, load_params, open_checkpoint
from opdjax.models.hf_export import export, export_adapter
from opdjax.models.lora import (
    combine,
    continues,
    init_adapters,
    merged,
    with_adapters,
    without_adapters,
)
from opdjax.ops.sharding import make_mesh

LORA = LoraConfig(rank=3, alpha=12.0, targets=("v", "q", "o", "down", "up"))
SCALE = 4.0


new_adapters = jax.jit(init_adapters, static_argnums=(0, 1))


def with_scale(config):
    return dataclasses.replace(config, lora_scale=SCALE)


def trained_adapters(model, rng, dtype=np.float32, lora=LORA):
    """Adapters whose B is not 0."""
    adapters = jax.device_get(new_adapters(model, lora, 0))
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), dtype), adapters)


def test_adapters_are_shaped_and_drawn_as_pefts():
    """A: Kaiming uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)); B: zeros. Every
    layer and target has its own draws.
    """
    wide = dataclasses.replace(MODEL, hidden_size=400)
    layers = init_adapters(wide, LORA, 5)["layers"]
    assert {name.partition("_")[0] for name in layers} == set(LORA.targets)
    assert layers["o_lora_a"].shape == (2, 3, 8)
    assert layers["down_lora_b"].shape == (2, 400, 3)
    assert layers["q_lora_b"].shape == (2, 8, 3)
    assert LORA.scale == SCALE
    drawn = np.asarray(layers["q_lora_a"])
    assert np.abs(drawn).max() == pytest.approx(0.05, rel=0.01)
    assert drawn.std() == pytest.approx(0.05 / np.sqrt(3), rel=0.05)
    assert len(np.unique(np.concatenate([drawn.ravel(), np.ravel(layers["v_lora_a"])]))) > 4700
    assert not any(np.any(leaf) for name, leaf in layers.items() if name.endswith("_b"))
    fewer = init_adapters(wide, dataclasses.replace(LORA, targets=("q",)), 5)["layers"]
    np.testing.assert_array_equal(fewer["q_lora_a"], drawn)
    assert not np.array_equal(init_adapters(wide, LORA, 6)["layers"]["q_lora_a"], drawn)


def test_new_adapters_change_nothing_and_trained_ones_are_their_merged_kernels(rng):
    (base, _), batch, model = make_models(jnp.float32), make_batch(rng), with_scale(MODEL)
    run = jax.jit(
        functools.partial(forward, config=model, tokens=batch.tokens, segment_ids=batch.segment_ids)
    )
    plain = run(base)
    np.testing.assert_array_equal(run(combine(base, init_adapters(model, LORA, 0))), plain)
    adapted = combine(base, trained_adapters(model, rng))
    whole = without_adapters(adapted)
    shapes_of = functools.partial(jax.tree.map, lambda x: x.shape)
    assert shapes_of(whole) == shapes_of(abstract_params(model))

    @jax.jit
    def stacked(adapted):
        layers = range(model.num_layers)
        return {
            name: jnp.stack([merged(adapted, name, (layer,), SCALE) for layer in layers])
            for name in whole["layers"]
        }

    whole = whole | {"layers": stacked(adapted)}
    live = np.asarray(batch.segment_ids) > 0
    np.testing.assert_allclose(run(adapted)[live], run(whole)[live], atol=1e-5)
    assert np.abs(run(adapted) - plain)[live].max() > 0.1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.long), 2])
def test_gradients_are_those_of_the_kernels_by_the_chain_rule(parts, rng):
    """W' = W + s B A, so dB = s dW' A^T and dA = s B^T dW'; dW' is the gradient of the merged
    model.
    """
    base, teacher = make_models(jnp.float64)
    estimator, model = EstimatorConfig(recipe="full_kl"), with_scale(MODEL)
    batch, head = scored(make_batch(rng), teacher, estimator)
    adapters = trained_adapters(model, rng, np.float64)
    layers = jax.device_get(combine(base, adapters)["layers"])
    kernels = {
        f"{t}_kernel": layers[f"{t}_kernel"] + SCALE * layers[f"{t}_lora_b"] @ layers[f"{t}_lora_a"]
        for t in LORA.targets
    }
    expected_loss, whole, _ = gradient(
        base | {"layers": base["layers"] | kernels}, batch, head, estimator, "float64"
    )

    spec = UpdateSpec(model, in_tiles(estimator), "float64", 7, gradient_accumulation_steps=parts)
    loss, found, *_ = jax.jit(lambda p, b, h, f: loss_and_grad(p, b, h, spec, frozen=f))(
        adapters, batch, head, base
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-11)
    expected = {}
    for target in LORA.targets:
        dkernel = np.asarray(whole["layers"][f"{target}_kernel"])
        a = layers[f"{target}_lora_a"]
        b = layers[f"{target}_lora_b"]
        expected[f"{target}_lora_a"] = SCALE * b.swapaxes(1, 2) @ dkernel
        expected[f"{target}_lora_b"] = SCALE * dkernel @ a.swapaxes(1, 2)
    assert relative_difference({"layers": expected}, found) < 1e-10


@pytest.mark.long
def test_an_update_trains_the_adapters_alone(rng):
    base, teacher = make_models(jnp.bfloat16)
    estimator = EstimatorConfig(recipe="full_kl")
    model = with_scale(MODEL)
    config = OptimizerConfig(learning_rate=1e-2)
    batch, head = scored(make_batch(rng), teacher, estimator)
    update = make_update(UpdateSpec(model, in_tiles(estimator), "bfloat16", 7), config, 10)
    kept = jax.device_get(base)
    state = init_state(new_adapters(model, LORA, 0), make_optimizer(config, 10))
    # Only adapters and moments are float32: nothing has the shape of a kernel or of the head.
    sizes = sum(x.size for x in jax.tree.leaves(state.params))
    assert (
        sum(
            x.size
            for x in jax.tree.leaves((state.params, state.opt_state))
            if x.dtype == jnp.float32
        )
        == 3 * sizes
    )
    lowered = update.lower(state, batch, head, base).as_text()
    shapes = {leaf.shape for leaf in jax.tree.leaves(base) if leaf.ndim > 1}
    assert {(11, 8), (2, 12, 8), (2, 8, 12)} <= shapes
    assert not [
        shape
        for shape in shapes
        for s in (shape, shape[1:])
        if len(s) > 1 and f"tensor<{'x'.join(map(str, s))}xf32>" in lowered
    ]

    losses = []
    for _ in range(3):
        state, metrics = update(state, batch, head, base)
        losses.append(float(metrics["loss/objective"]))
    assert losses[2] < losses[0]
    chex.assert_trees_all_equal(jax.device_get(base), kept)  # neither changed nor donated
    assert state.params.keys() == {"layers"}
    assert all("_lora_" in name and np.any(leaf) for name, leaf in state.params["layers"].items())


# Of the families that do not take all of LORA's.
TARGETS = {"phi3": ("o", "down"), "qwen3-moe": ("v", "q", "o")}


def adapted_pair(pairs, name, rng):
    """(checkpoint, its parameters with trained adapters) of one of the pairs."""
    pair = pairs[name]
    lora = dataclasses.replace(LORA, targets=TARGETS.get(name, LORA.targets))
    checkpoint = with_adapters(pair.checkpoint, lora)
    return checkpoint, combine(pair.params, trained_adapters(pair.config, rng, lora=lora))


@pytest.mark.parametrize(
    "name",
    [
        "bias",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("olmo3", "smollm3", "gemma3", "phi3", "qwen3-moe")
        ),
    ],
)
def test_a_merged_export_is_the_adapted_model(name, pairs, our_logits, rng, tmp_path):
    checkpoint, params = adapted_pair(pairs, name, rng)
    student = open_checkpoint(export(params, checkpoint, tmp_path / "student"))
    assert student.config == pairs[name].config
    rows = rng.integers(0, 131, (2, 9)), np.ones((2, 9), np.int64)
    expected = our_logits(params, checkpoint.config, *rows)
    found = our_logits(load_params(student, "float32"), student.config, *rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - our_logits(pairs[name].params, student.config, *rows)).max() > 0.1


def test_merged_kernels_are_rounded_once(pairs, rng):
    """A sum in bfloat16 would lose changes below 1/256 of a weight."""
    _, params = adapted_pair(pairs, "bias", rng)
    kernel = params["layers"]["q_kernel"].astype(jnp.bfloat16)
    exact = np.float32(kernel) + SCALE * np.matmul(
        params["layers"]["q_lora_b"], params["layers"]["q_lora_a"]
    )
    found = merged({"layers": params["layers"] | {"q_kernel": kernel}}, "q_kernel", (1,), SCALE)
    np.testing.assert_allclose(found, exact[1], rtol=1e-5, atol=1e-6)


def test_the_adapter_directory_holds_pefts_names(pairs, rng, tmp_path):
    checkpoint, params = adapted_pair(pairs, "untied", rng)
    export_adapter(params, checkpoint, LORA, ModelConfig("owner/name@main"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["v_proj", "q_proj", "o_proj", "down_proj", "up_proj"]
    assert (
        config["base_model_name_or_path"],
        config["revision"],
        config["r"],
        config["lora_alpha"],
    ) == ("owner/name", "main", 3, 12.0)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(LORA.targets)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (3, 37)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    np.testing.assert_array_equal(tensors[name], params["layers"]["q_lora_b"][1])


@pytest.mark.parametrize(
    "name",
    [
        "untied",
        pytest.param("qwen2-tied", marks=pytest.mark.long),
        pytest.param("llama", marks=pytest.mark.long),
    ],
)
def test_peft_computes_what_we_compute(name, pairs, build, our_logits, torch_logits, rng, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    checkpoint, params = adapted_pair(pairs, name, rng)
    export_adapter(
        params, checkpoint, LORA, ModelConfig(str(checkpoint.path)), tmp_path / "adapter"
    )
    export(params, checkpoint, tmp_path / "student")
    rows = rng.integers(0, 131, (2, 9)), np.ones((2, 9), np.int64)
    expected = our_logits(params, checkpoint.config, *rows)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    np.testing.assert_allclose(torch_logits(adapted, *rows), expected, rtol=2e-4, atol=2e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    np.testing.assert_allclose(torch_logits(merged, *rows), expected, rtol=2e-4, atol=2e-4)
    assert np.abs(expected - torch_logits(pairs[name].model, *rows)).max() > 0.5


# Adapters that PEFT wrote


@pytest.fixture
def peft_adapter(pairs, tmp_path):
    """`make(**settings)`: the directory of an adapter that PEFT saved, and its model."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    def make(**settings):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(pairs["untied"].checkpoint.path)
        config = peft.LoraConfig(
            r=3,
            lora_alpha=12,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,  # B is random too
            **settings,
        )
        model = peft.get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return make


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"layers_to_transform": [1]}])
def test_a_directory_of_peft_is_its_base_with_the_adapter(
    settings, peft_adapter, pairs, our_logits, torch_logits, rng
):
    directory, model = peft_adapter(**settings)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.path == pairs["untied"].checkpoint.path
    assert fingerprint(checkpoint) != fingerprint(pairs["untied"].checkpoint)
    rows = rng.integers(0, 131, (2, 9)), np.ones((2, 9), np.int64)
    found = our_logits(load_params(checkpoint, "float32"), checkpoint.config, *rows)
    np.testing.assert_allclose(found, torch_logits(model, *rows), rtol=2e-4, atol=2e-4)
    assert np.abs(found - torch_logits(pairs["untied"].model, *rows)).max() > 0.05
    base = load_params(checkpoint, "float32", with_adapter=False)
    chex.assert_trees_all_equal(base, load_params(pairs["untied"].checkpoint, "float32"))
    mesh = make_mesh(4, 2)
    sharded = load_params(checkpoint, "float32", mesh)
    chex.assert_trees_all_close(sharded, load_params(checkpoint, "float32"), rtol=1e-6)
    alpha = 12 * 3**0.5 if "use_rslora" in settings else 12.0
    lora = LoraConfig(3, alpha, ("down", "q"))
    assert continues(checkpoint, lora) == ("layers_to_transform" not in settings)
    for other in ((2, 8.0, ("down", "q")), (3, 1.0, ("down", "q")), (3, alpha, ("q",))):
        assert not continues(checkpoint, LoraConfig(*other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern \{'q_proj': 2\}"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": 0}, "r 0"),
        ({"r": 2}, "of rank 2, as PEFT saves them"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path None"),
        (
            {"base_model_name_or_path": "/no/such/base"},
            "is a PEFT adapter, and its base cannot be opened: '/no/such/base' is neither",
        ),
    ],
)
def test_another_adapter_is_refused_by_the_name_of_what_it_has(changes, message, pairs, tmp_path):
    checkpoint, params = adapted_pair(pairs, "untied", np.random.default_rng(0))
    directory = tmp_path / "adapter"
    export_adapter(params, checkpoint, LORA, ModelConfig(str(checkpoint.path)), directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        load_params(open_checkpoint(directory), "float32")


@pytest.mark.parametrize(
    ("settings", "tensor"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_its_first_tensor(settings, tensor, peft_adapter):
    directory, _ = peft_adapter(**settings)
    with pytest.raises(CheckpointError, match=rf"holds \['.*{tensor}.*'\]; expected the lora_A"):
        load_params(open_checkpoint(directory), "float32")


def test_a_tensor_that_is_no_adapter_is_named(pairs, tmp_path):
    checkpoint, params = adapted_pair(pairs, "untied", np.random.default_rng(0))
    directory = tmp_path / "adapter"
    export_adapter(params, checkpoint, LORA, ModelConfig(str(checkpoint.path)), directory)
    save_file({"model.norm.weight": np.ones(3)}, directory / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds \['model.norm.weight'\]; expected the lora_A"
    ):
        load_params(open_checkpoint(directory), "float32")


def test_adapters_of_kernels_that_share_a_tensor_are_refused(pairs):
    student = pairs["phi3"].checkpoint
    lora = LoraConfig(rank=2, targets=("o", "down"))
    assert with_adapters(student, lora).config.lora_scale == lora.scale
    with pytest.raises(ConfigError, match="targets .* others than q, k, v, gate, up, which share"):
        with_adapters(student, LoraConfig(rank=2))


def test_adapters_of_experts_are_refused(pairs):
    student, lora = pairs["qwen3-moe"].checkpoint, LoraConfig(rank=2, targets=("q", "k", "v", "o"))
    assert with_adapters(student, lora).config.lora_scale == lora.scale
    assert with_adapters(student, LoraConfig()).config == student.config
    with pytest.raises(ConfigError, match="others than gate, up, down, which are kernels of exp"):
        with_adapters(student, LoraConfig(rank=2))
