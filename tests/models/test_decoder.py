"""The decoder equals transformers; it equals itself with a cache, in packed rows and with
rematerialisation.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.models import decoder, kv_cache
from opdjax.models.attention import NO_WINDOW, segment_distance
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.models.partitioning import shardings_of
from opdjax.models.rope import UNROTATED, Rope
from opdjax.ops.sharding import make_mesh
from opdjax.ops.tile import head_logits

SMALL = decoder.DecoderConfig(
    vocab_size=31,
    hidden_size=12,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_size=6,
    intermediate_size=17,
    rope=Rope(1e4),
    norm_epsilon=1e-6,
    ties_embeddings=True,
    has_qk_norm=True,
    has_qkv_bias=True,
    has_output_bias=True,
)
CONFIGS = {  # every option on and off, and every kind of frequencies
    "qwen3": SMALL,
    "qwen2": dataclasses.replace(
        SMALL,
        has_qk_norm=False,
        has_output_bias=False,
        rope=Rope(
            100.0,
            "yarn",
            factor=4.0,
            original_length=10,
            slow_rotations=0.5,
            fast_rotations=4.0,
            attention_factor=1.3,
        ),
    ),
    "llama": dataclasses.replace(
        SMALL,
        has_qk_norm=False,
        has_qkv_bias=False,
        has_output_bias=False,
        ties_embeddings=False,
        rope=Rope(
            100.0, "llama3", factor=8.0, original_length=16, slow_rotations=1.0, fast_rotations=2.0
        ),
    ),
}
CONFIGS["gemma3"] = dataclasses.replace(
    SMALL,
    has_post_norms=True,
    norm_offset=1.0,
    embedding_scale=12**0.5,
    query_scale=1.2,
    activation="gelu",
    layer_windows=(3, NO_WINDOW),
    layer_ropes=(Rope(1e4), Rope(100.0)),
)
CONFIGS["olmo3"] = dataclasses.replace(
    SMALL,
    has_pre_norms=False,
    has_post_norms=True,
    norms_all_heads=True,
    layer_windows=(NO_WINDOW, 2),
    layer_ropes=(Rope(1e4), UNROTATED),
)
CONFIGS["qwen3-moe"] = dataclasses.replace(
    SMALL,
    has_qkv_bias=False,
    has_output_bias=False,
    num_experts=6,
    experts_per_token=2,
    normalizes_experts=True,
)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
forward = jax.jit(decoder.forward, static_argnums=1)


@partial(jax.jit, static_argnums=1)
def read_on(params, config, tokens, segments, positions, cache, seen, start):
    """(hidden states of columns `start : start + T`, cache, seen); `seen` are the segment ids of
    all columns so far.
    """
    seen = jax.lax.dynamic_update_slice(seen, segments, (0, start))
    distance = segment_distance(
        start + jnp.arange(tokens.shape[1]), segments, jnp.arange(seen.shape[1]), seen
    )
    layer_params = kv_cache.split_layers(params["layers"], config)
    hidden, cache = kv_cache.forward_cached(
        params, layer_params, config, tokens, positions, cache, start, distance
    )
    return hidden, cache, seen


def small_params(config=SMALL):
    """Float64; norms differ from 1 and biases from 0, so that a missing one is noticed."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        shift, scale = (
            (1.0, 0.3)
            if name.endswith("norm")
            else (0.0, 0.3 if name.endswith("bias") else shape[-1] ** -0.5)
        )
        return jnp.asarray(shift + scale * rng.normal(size=shape))

    return jax.tree_util.tree_map_with_path(draw, decoder.abstract_params(config))


def padded(rng, lengths, width, side, vocab, pad=0):
    """Random (tokens, segment ids); row i has lengths[i] live columns and padding on `side`."""
    column = np.arange(width)
    live = np.stack([column < n if side == "right" else column >= width - n for n in lengths])
    return np.where(live, rng.integers(0, vocab, live.shape), pad).astype(np.int32), live.astype(
        np.int32
    )


# Parity with transformers


@pytest.mark.parametrize("lengths", [[11, 11, 11], [11, 7, 1]], ids=["full", "ragged"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_transformers(pair, our_logits, torch_logits, rng, side, lengths):
    tokens, segments = padded(rng, lengths, 11, side, 131, pad=130)
    ours = our_logits(pair.params, pair.config, tokens, segments)
    theirs = torch_logits(pair.model, tokens, segments)
    assert np.std(theirs[segments == 1]) > 1
    np.testing.assert_allclose(ours[segments == 1], theirs[segments == 1], atol=2e-4, rtol=0)


def test_greedy_tokens_equal_generate(pair, rng):
    import torch

    steps, lengths = 16, [9, 1, 4, 6, 2]  # of which some are longer than the windows
    prompts = [rng.integers(6, 131, n) for n in lengths]
    expected = [
        pair.model.generate(
            torch.as_tensor(prompt)[None], max_new_tokens=steps, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    tokens, segments = np.zeros((5, 9), np.int32), np.zeros((5, 9), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, 9 - len(prompt) :], segments[row, 9 - len(prompt) :] = prompt, 1
    cache = kv_cache.init_cache(pair.config, 5, 9 + steps, jnp.float32)
    seen = jnp.zeros((5, 9 + steps), jnp.int32)
    positions = decoder.positions_of(jnp.asarray(segments))
    hidden, cache, seen = read_on(
        pair.params, pair.config, tokens, segments, positions, cache, seen, 0
    )
    chosen = []
    for step in range(steps):
        chosen.append(jnp.argmax(head_logits(decoder.head_of(pair.params), hidden[:, -1]), axis=-1))
        positions = np.asarray(lengths, np.int32)[:, None] + step
        ones = np.ones((5, 1), np.int32)
        hidden, cache, seen = read_on(
            pair.params, pair.config, chosen[-1][:, None], ones, positions, cache, seen, 9 + step
        )
    assert np.stack(chosen, 1).tolist() == expected
    assert len({token for row in expected for token in row}) > 10


def rope(kind, theta=1e4, **fields):
    """config.json as transformers 5 writes it."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def old_rope(theta, **fields):
    """config.json as transformers 4 wrote it."""
    return {"rope_parameters": ..., "rope_theta": theta, "rope_scaling": fields or None}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
YARN = {"factor": 4.0, "beta_fast": 4, "beta_slow": 0.5, "original_max_position_embeddings": 10}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("untied", rope("default", 5e6)),
        ("untied", old_rope(5e6)),
        ("qwen2", rope("default", 5e6)),
        ("llama-bias-tied", rope("default", 5e5)),
        ("qwen2", rope("linear", factor=3.0)),
        ("llama-bias-tied", rope("llama3", 100.0, **LLAMA3)),
        ("qwen2", rope("yarn", 100.0, **YARN)),
        ("untied", rope("yarn", 100.0, **YARN, truncate=False, mscale=1.0, mscale_all_dim=0.4)),
        ("llama-bias-tied", old_rope(100.0, **YARN, type="yarn", attention_factor=1.3)),
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else (value.get("rope_scaling") or {"rope_type": "old", **value}).get("rope_type")
    ),
)
def test_rope_moves_logits_as_in_transformers(
    pairs, copy, our_logits, torch_logits, rng, name, fields
):
    from transformers import AutoModelForCausalLM

    pair, path = pairs[name], copy(name, **fields)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == dataclasses.replace(pair.config, rope=checkpoint.config.rope)
    rows = padded(rng, [24, 24], 24, "right", 131)
    theirs = torch_logits(AutoModelForCausalLM.from_pretrained(path).eval(), *rows)
    ours = our_logits(pair.params, checkpoint.config, *rows)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
    moved = ours - our_logits(pair.params, pair.config, *rows)
    expected = theirs - torch_logits(pair.model, *rows)
    assert np.max(np.abs(expected)) > 0.5
    np.testing.assert_allclose(moved, expected, atol=4e-4, rtol=0)


def test_bfloat16_stays_near_float32(pairs, rng):
    pair = pairs["bias"]
    params = load_params(pair.checkpoint, "bfloat16")
    tokens, segments = padded(rng, [9, 9], 9, "right", 131)
    hidden = forward(params, pair.config, tokens, segments)
    exact = forward(
        jax.tree.map(lambda x: x.astype(jnp.float32), params), pair.config, tokens, segments
    )
    assert hidden.dtype == jnp.bfloat16
    assert head_logits(decoder.head_of(params), hidden).dtype == jnp.float32
    error = np.linalg.norm(np.asarray(hidden, np.float32) - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05


# Columns, segments, rematerialisation


def test_positions_restart_at_each_segment():
    segments = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0], [3, 1, 1, 1, 0, 0]])
    expected = [[0, 1, 0, 1, 2, 3], [0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 0, 1]]
    assert decoder.positions_of(segments).tolist() == expected


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "widths", [[6, 1, 1, 1, 1, 1], [4, 4, 3], [1] * 11], ids=["prefill", "blocks", "columns"]
)
@every_config
def test_cache_equals_full_forward(rng, monkeypatch, config, widths):
    monkeypatch.setattr(
        kv_cache, "_MAX_UNSTACKED", 8 if len(widths) == 3 else 0
    )  # with the layers in one stack, too
    params = small_params(config)
    tokens, segments = padded(rng, [11, 8, 6], 11, "left", config.vocab_size)
    positions = decoder.positions_of(jnp.asarray(segments))
    full = forward(params, config, tokens, segments)
    cache = jax.tree.map(
        lambda x: x + 1e3, kv_cache.init_cache(config, 3, 14, jnp.float64)
    )  # unwritten columns may hold anything
    seen, start, parts = jnp.zeros((3, 14), jnp.int32), 0, []
    for width in widths:
        now = np.s_[:, start : start + width]
        hidden, cache, seen = read_on(
            params, config, tokens[now], segments[now], positions[now], cache, seen, start
        )
        start += width
        parts.append(hidden)
    np.testing.assert_allclose(
        np.concatenate(parts, 1)[segments == 1], full[segments == 1], atol=1e-10, rtol=0
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.long
@every_config
def test_int8_keys_and_values_stay_near(rng, config):
    params = small_params(config)
    tokens, segments = padded(rng, [11, 8, 6], 11, "left", config.vocab_size)
    positions, seen = decoder.positions_of(jnp.asarray(segments)), jnp.zeros((3, 11), jnp.int32)
    exact, rounded = (
        read_on(
            params,
            config,
            tokens,
            segments,
            positions,
            kv_cache.init_cache(config, 3, 11, dtype),
            seen,
            0,
        )[0][segments == 1]
        for dtype in (jnp.float64, jnp.int8)
    )
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05


@pytest.mark.usefixtures("x64")
@pytest.mark.long
@every_config
def test_a_mesh_equals_one_device(rng, config):
    """Whole rows with their gradients, and the cache."""
    sizes = {"vocab_size": 32, "intermediate_size": 18}
    config, mesh = dataclasses.replace(config, **sizes), make_mesh(2, 2, 2)
    params = small_params(config)
    tokens, segments = padded(rng, [11, 8, 6, 9], 11, "left", config.vocab_size)
    live, weights = segments == 1, rng.normal(size=(*tokens.shape, config.hidden_size))

    def run(params, mesh):
        def loss(params):
            hidden = decoder.forward(params, config, tokens, segments, remat="layer", mesh=mesh)
            return jnp.sum(jnp.where(live[..., None], hidden, 0) * weights), hidden

        layer_params = kv_cache.split_layers(params["layers"], config)
        prompts = params, layer_params, config, jnp.asarray(tokens), jnp.asarray(live)
        last, _ = kv_cache.prefill(*prompts, jnp.float64, mesh)
        grads, hidden = jax.grad(loss, has_aux=True)(params)
        return grads, jnp.where(live[..., None], hidden, 0), last

    run, close = jax.jit(run, static_argnums=1), partial(np.testing.assert_allclose, atol=1e-9)
    expected = run(params, None)
    sharded = jax.device_put(params, shardings_of(params, mesh))
    jax.tree.map(close, run(sharded, mesh), expected)
    np.testing.assert_allclose(expected[1][:, -1], expected[2], atol=1e-9)


PACKED = np.zeros(
    (6, 12), np.int32
)  # as many rows as there are segments, so that both layouts share one compilation
PACKED[:2] = [1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 0, 0], [0, 7, 7, 1, 1, 1, 1, 1, 1, 2, 2, 2]


def separate_rows(tokens, segments):
    """Each segment in its own right-padded row, and the columns of the packed rows that the
    segments come from.
    """
    apart, live, origins = np.zeros_like(tokens), np.zeros_like(segments), []
    pieces = [
        (row, segment)
        for row, ids in enumerate(segments)
        for segment in sorted(set(ids.tolist()) - {0})
    ]
    for out, (row, segment) in enumerate(pieces):
        columns = np.flatnonzero(segments[row] == segment)
        apart[out, : len(columns)], live[out, : len(columns)] = tokens[row, columns], 1
        origins.append((np.full(len(columns), row), columns))
    return apart, live, tuple(np.concatenate(parts) for parts in zip(*origins))


def weighed(params, tokens, segments, weights, remat="none", config=SMALL):
    """A scalar function of the live hidden states, and the states."""
    hidden = decoder.forward(params, config, tokens, segments, remat=remat)
    return jnp.sum(jnp.where(segments[..., None] > 0, hidden, 0) ** 2 * weights), hidden


weighed_grad = jax.jit(jax.grad(weighed, has_aux=True), static_argnames=("remat", "config"))


@pytest.fixture
def batch(rng):
    """Tokens for PACKED and a weight for every element of their hidden states."""
    return rng.integers(0, SMALL.vocab_size, PACKED.shape), rng.normal(
        size=(*PACKED.shape, SMALL.hidden_size)
    )


@pytest.mark.usefixtures("x64")
@every_config
def test_packed_rows_equal_separate_rows(batch, config):
    params, (tokens, weights) = small_params(config), batch
    apart, live, origin = separate_rows(tokens, PACKED)
    assert live.sum() == (PACKED > 0).sum() == 21
    apart_weights = np.zeros_like(weights)
    apart_weights[np.nonzero(live)] = weights[origin]
    packed_grad, packed = weighed_grad(params, tokens, PACKED, weights, config=config)
    apart_grad, expected = weighed_grad(params, apart, live, apart_weights, config=config)
    np.testing.assert_allclose(packed[origin], expected[np.nonzero(live)], atol=1e-10, rtol=0)
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-10, rtol=1e-10), packed_grad, apart_grad
    )
    assert min(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(packed_grad["layers"])) > 1e-10


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("garbage", [-1, 30, 10**6, -(10**6)])
def test_padding_changes_neither_value_nor_gradient(batch, garbage):
    params, (tokens, weights), live = small_params(), batch, PACKED > 0
    clean_grad, clean = weighed_grad(params, tokens, PACKED, weights)
    dirty_grad, dirty = weighed_grad(params, np.where(live, tokens, garbage), PACKED, weights)
    assert np.isfinite(clean).all()
    assert not np.array_equal(clean, dirty)
    np.testing.assert_array_equal(clean[live], dirty[live])
    jax.tree.map(np.testing.assert_array_equal, clean_grad, dirty_grad)


@pytest.mark.usefixtures("x64")
def test_remat_changes_nothing(batch):
    params, (tokens, weights) = small_params(), batch
    plain, *others = (
        weighed_grad(params, tokens, PACKED, weights, remat=how)
        for how in ("none", "dots", "layer")
    )
    for remat in others:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), plain, remat)


def test_remat_keeps_what_it_says():
    """`layer` keeps the layer's input; `dots` also keeps the products with kernels, except the
    last, which no gradient needs.
    """
    params, tokens = small_params(), np.zeros(PACKED.shape, np.int32)

    def kept(remat):
        states = lambda params: decoder.forward(params, SMALL, tokens, PACKED, remat=remat)
        residuals = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(states, p)[1], params))
        return sum(leaf.shape[:3] == (SMALL.num_layers, *PACKED.shape) for leaf in residuals)

    assert kept("layer") == 1
    assert kept("dots") == 1 + 6
    assert kept("none") > 7


@pytest.mark.usefixtures("x64")
def test_later_columns_do_not_reach_earlier_ones(rng):
    params, segments = small_params(), np.ones((2, 9), np.int32)
    tokens = rng.integers(0, SMALL.vocab_size, (2, 9))
    changed = tokens.copy()
    changed[:, 5] = (tokens[:, 5] + 1) % SMALL.vocab_size
    difference = np.abs(
        np.asarray(
            forward(params, SMALL, tokens, segments) - forward(params, SMALL, changed, segments)
        )
    ).max((0, 2))
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 1e-3).all()


@pytest.mark.usefixtures("x64")
def test_only_relative_positions_matter(rng):
    params, segments = small_params(), np.ones((2, 9), np.int32)
    tokens = rng.integers(0, SMALL.vocab_size, (2, 9))
    at_zero, shifted, doubled = (
        read_on(
            params,
            SMALL,
            tokens,
            segments,
            positions,
            kv_cache.init_cache(SMALL, 2, 9, jnp.float64),
            jnp.zeros((2, 9), jnp.int32),
            0,
        )[0]
        for positions in (
            np.tile(np.arange(9), (2, 1)),
            np.tile(np.arange(9) + 1001, (2, 1)),
            np.tile(np.arange(9) * 2, (2, 1)),
        )
    )
    np.testing.assert_allclose(shifted, at_zero, atol=1e-3, rtol=0)  # the angles are float32
    assert np.max(np.abs(doubled - at_zero)) > 1e-2


def test_init_params_follow_their_stated_scales():
    config = dataclasses.replace(SMALL, vocab_size=1001, hidden_size=48, ties_embeddings=False)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    expected = decoder.abstract_params(config)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, expected)
    for name in ("embedding", "head"):
        np.testing.assert_allclose(np.std(params[name]), 0.02, rtol=0.02)
    for name in ("q_kernel", "v_kernel", "o_kernel", "gate_kernel", "down_kernel"):
        kernel = np.asarray(params["layers"][name])
        np.testing.assert_allclose(np.std(kernel) * kernel.shape[-1] ** 0.5, 1.0, rtol=0.1)
        assert (
            np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1] < 0.2
        )  # every layer draws its own
    assert (
        np.unique(params["layers"]["q_norm"]).tolist()
        == np.unique(params["final_norm"]).tolist()
        == [1.0]
    )
    assert np.unique(params["layers"]["o_bias"]).tolist() == [0.0]
    assert abs(np.corrcoef(np.ravel(params["embedding"]), np.ravel(params["head"]))[0, 1]) < 0.05


def test_head_of_unties_masks_and_tempers(rng):
    hidden = rng.normal(size=(3, 5)).astype(np.float32)
    embedding, head = rng.normal(size=(2, 7, 5)).astype(np.float32)
    tied = head_logits(decoder.head_of({"embedding": embedding}), hidden)
    np.testing.assert_allclose(tied, hidden @ embedding.T, rtol=1e-5, atol=1e-6)
    untied = head_logits(
        decoder.head_of({"embedding": embedding, "head": head}, valid_vocab=6, temperature=0.5),
        hidden,
    )
    np.testing.assert_allclose(untied[:, :6], 2 * hidden @ head[:6].T, rtol=1e-5, atol=1e-6)
    assert np.isneginf(untied[:, 6:]).all()
