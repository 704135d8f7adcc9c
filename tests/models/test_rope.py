"""Rotary frequencies equal those of transformers for the options of published models; why two kinds
are refused.
"""

import dataclasses
import json

import numpy as np
import pytest

from opdjax.models.families import FAMILIES
from opdjax.models.rope import Rope, inverse_frequencies, yarn_attention_factor

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
PUBLISHED = {  # what config.json sets besides shapes
    "Llama 2": {},
    "Llama 3.1": {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"factor": 8.0}},
    "Llama 3.2 1B": {
        "head_dim": 64,
        "rope_parameters": LLAMA3 | {"factor": 32.0, "rope_theta": 5e5},
    },
    "DeepSeek Coder": {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "Qwen2.5": {"rope_theta": 1e6, "rope_scaling": YARN},
    "yarn, length of today": {
        "rope_parameters": {"rope_type": "yarn", "factor": 2.5, "rope_theta": 1e4}
    },
    "yarn, length outside": {
        "rope_theta": 1e6,
        "rope_scaling": YARN,
        "original_max_position_embeddings": 4096,
    },
    "yarn, range": {
        "rope_theta": 1e4,
        "rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    },
    "yarn, empty range": {
        "rope_theta": 1e4,
        "rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 8, "truncate": False},
    },
    "yarn, range past the end": {"rope_theta": 1e4, "rope_scaling": YARN | {"beta_slow": 1e-5}},
    "yarn, backward range": {
        "rope_theta": 1e4,
        "rope_scaling": YARN | {"original_max_position_embeddings": 2, "beta_slow": 40},
    },
    "yarn, attention": {"rope_theta": 1e4, "rope_scaling": YARN | {"attention_factor": 0.5}},
    "yarn, DeepSeek": {
        "rope_theta": 1e4,
        "rope_scaling": YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707},
    },
    "yarn, one scale": {"rope_theta": 1e4, "rope_scaling": YARN | {"mscale": 0.707}},
    "yarn, shrunk": {
        "rope_theta": 1e4,
        "rope_scaling": YARN | {"factor": 0.5, "mscale": 1.0, "mscale_all_dim": 0.707},
    },
}
SHAPES = {
    "vocab_size": 11,
    "hidden_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 16384,
}


def unstretched(theta, head_size):
    return theta ** -(np.arange(0, head_size, 2) / head_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_equal_transformers(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = SHAPES | PUBLISHED[name]
    config = FAMILIES["LlamaForCausalLM"].read_config(raw)
    theirs = LlamaConfig.from_dict(json.loads(json.dumps(raw)))
    kinds = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
    expected, attention_factor = kinds[config.rope.kind](theirs)
    ours = inverse_frequencies(config.rope, config.head_size)
    assert (ours.dtype, ours.shape) == (np.float32, (config.head_size // 2,))
    np.testing.assert_allclose(ours, expected.numpy(), rtol=5e-7)
    assert config.rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    is_stretched = np.max(np.abs(ours / unstretched(config.rope.theta, config.head_size) - 1)) > 0.1
    assert is_stretched == (name not in ("Llama 2", "yarn, backward range"))


def test_llama3_by_hand():
    # theta = (2 pi)^4 and H = 4: the pairs rotate 1 / 2 pi and (2 pi)^-3 times per token, so 4 and
    # 0.10 times over 8 pi tokens.
    rope = Rope(
        (2 * np.pi) ** 4,
        "llama3",
        factor=5.0,
        original_length=8 * np.pi,
        slow_rotations=1.0,
        fast_rotations=7.0,
    )
    np.testing.assert_allclose(
        inverse_frequencies(rope, 4), [0.5 + 0.5 / 5, (2 * np.pi) ** -2 / 5], rtol=1e-6
    )


def test_yarn_by_hand():
    # theta = 16 and H = 8: the pairs rotate 8, 4, 2 and 1 times over 16 pi tokens; the range of 8
    # to 1 rotations is [0, 3].
    rope = Rope(
        16.0,
        "yarn",
        factor=2.0,
        original_length=16 * np.pi,
        slow_rotations=1.0,
        fast_rotations=8.0,
        rounds_range=False,
    )
    np.testing.assert_allclose(
        inverse_frequencies(rope, 8), [1, 0.5 * 5 / 6, 0.25 * 4 / 6, 0.125 * 0.5], rtol=1e-6
    )
    narrower = dataclasses.replace(
        rope, fast_rotations=5.9, slow_rotations=1.1
    )  # the range [0.44, 2.86], rounded to [0, 3]
    assert not np.allclose(inverse_frequencies(narrower, 8), inverse_frequencies(rope, 8))
    rounded = dataclasses.replace(narrower, rounds_range=True)
    np.testing.assert_allclose(
        inverse_frequencies(rounded, 8), inverse_frequencies(rope, 8), rtol=1e-6
    )


def test_yarn_attention_factor_by_hand():
    assert yarn_attention_factor(np.e**2) == pytest.approx(1.2)
    assert yarn_attention_factor(np.e**2, 2.0, 1.0) == pytest.approx(1.4 / 1.2)
    assert yarn_attention_factor(0.5) == 1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_refused_kinds_are_no_function_of_the_position(build, torch_logits, rng, kind):
    """Once the sequence crosses the bound, logits of earlier tokens change, which must not happen
    under causal attention.
    """
    ropes = {
        "default": {},
        "dynamic": {"factor": 4.0},
        "longrope": {
            "short_factor": [1.0] * 5,
            "long_factor": [1.0, 1.0, 2.0, 3.0, 4.0],
            "factor": 1.0,
        },
    }
    plain, model = (
        build(
            "Llama",
            max_position_embeddings=8,
            rope_parameters={"rope_type": name, "rope_theta": 1e4, **ropes[name]},
        )
        for name in ("default", kind)
    )
    tokens, live = rng.integers(0, 131, (2, 16)), np.ones((2, 16), np.int32)
    short, long = torch_logits(model, tokens[:, :8], live[:, :8]), torch_logits(model, tokens, live)
    assert np.max(np.abs(short - long[:, :8])) > 0.05
    # Up to the bound they equal the default kind, as the error says; here longrope does too,
    # because its short factors are 1.
    np.testing.assert_allclose(
        short, torch_logits(plain, tokens[:, :8], live[:, :8]), atol=1e-5, rtol=0
    )
