"""Reading `config.json`: equivalent spellings, defaults of the families, and refusals that name the
field.
"""

import json

import pytest

from opdjax.models.attention import NO_WINDOW
from opdjax.models.families import UnsupportedModelError
from opdjax.models.hf import CheckpointError, open_checkpoint
from opdjax.models.rope import UNROTATED, Rope

RAW = {
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rope_theta": 1e4,
    "max_position_embeddings": 640,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def read(tmp_path):
    """read(family, **fields besides RAW) -> the DecoderConfig; a field that is ... is absent."""

    def read(family="Qwen2", **fields):
        raw = {"architectures": [f"{family}ForCausalLM"], **RAW, **fields}
        (tmp_path / "config.json").write_text(
            json.dumps({name: value for name, value in raw.items() if value is not ...})
        )
        return open_checkpoint(tmp_path).config

    return read


def scaled(kind, **fields):
    """The field of config.json that sets frequencies of this kind."""
    return {"rope_scaling": {"rope_type": kind, **fields}}


@pytest.mark.parametrize(
    ("kind", "options", "outside"),
    [
        ("default", {}, {}),
        ("linear", {"factor": 2.0}, {}),
        ("llama3", LLAMA3, {}),
        ("yarn", YARN | {"beta_fast": 16, "truncate": False}, {}),
        (
            "yarn",
            YARN | {"original_max_position_embeddings": 640},
            {"original_max_position_embeddings": 64},
        ),
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn-length-outside"],
)
def test_spellings_are_equivalent(read, kind, options, outside):
    new = {"rope_type": kind, "rope_theta": 5e5, **options}
    expected = read(rope_parameters=new, rope_theta=..., **outside)
    assert (expected.rope.kind, expected.rope.theta) == (kind, 5e5)
    assert expected.rope.original_length == (
        64 if "original_max_position_embeddings" in options else 0
    )
    old = {"type": kind, **options}
    for fields in (
        {"rope_scaling": old, "rope_theta": 5e5},
        {"rope_scaling": old, "rope_theta": 5e5, "rope_parameters": None},
        {"rope_scaling": new},  # the inner theta wins
        {"rope_scaling": old, "rope_theta": 5e5, "rope_parameters": new},
        {"rope_parameters": new | {"type": "passed over"}},
        {
            "rope_parameters": new | {"partial_rotary_factor": 1.0},
            "rope_scaling": {},
            "partial_rotary_factor": None,
        },
    ):
        assert read(**fields, **outside) == expected


def test_attention_factor_is_read_as_a_number(read):
    assert read(**scaled("yarn", **YARN)).rope == Rope(
        1e4,
        "yarn",
        factor=4.0,
        original_length=64,
        slow_rotations=1.0,
        fast_rotations=32.0,
        attention_factor=1.1386294361119891,
    )
    assert read(**scaled("yarn", **YARN, attention_factor=2)).rope.attention_factor == 2


@pytest.mark.parametrize(
    "family", ["Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mistral", "Olmo2", "SmolLM3"]
)
def test_defaults_equal_transformers(read, family):
    import transformers

    theirs = getattr(transformers, f"{family}Config")(
        **{k: v for k, v in RAW.items() if k != "rope_theta"}
    )
    config = read(family, num_key_value_heads=2)
    assert config.head_size == (getattr(theirs, "head_dim", None) or 24 // 6)
    assert config.norm_epsilon == theirs.rms_norm_eps
    assert config.ties_embeddings == theirs.tie_word_embeddings
    assert config.has_output_bias == getattr(theirs, "attention_bias", False)
    assert read(family, num_key_value_heads=None).num_kv_heads == 6
    if family == "Llama":  # absent in files of Llama 2
        assert read(family, rope_theta=...).rope.theta == theirs.rope_parameters["rope_theta"]
    else:
        with pytest.raises(
            UnsupportedModelError, match="neither rope_parameters.rope_theta nor rope_theta"
        ):
            read(family, rope_theta=...)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Llama", {"pretraining_tp": 2, "mlp_bias": False, "attention_bias": None}),
        (
            "Qwen2",
            {
                "use_sliding_window": False,
                "sliding_window": 32,
                "max_window_layers": 0,
                "layer_types": ["full_attention"] * 2,
            },
        ),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        (
            "Qwen3",
            {
                "use_sliding_window": True,
                "max_window_layers": 0,
                "layer_types": ["full_attention"] * 2,
            },
        ),
    ],
)
def test_options_without_effect_are_ignored(read, family, fields):
    assert read(family, **fields) == read(family)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 8, "max_window_layers": 1}, (NO_WINDOW, 8)),
        ({"max_window_layers": 0}, (4096, 4096)),
        ({"layer_types": ["sliding_attention", "full_attention"]}, (4096, NO_WINDOW)),
    ],
)
def test_windows_of_qwen_are_read(read, fields, windows):
    for family in ("Qwen2", "Qwen3"):
        assert read(family, use_sliding_window=True, **fields).layer_windows == windows


def test_a_null_window_is_no_window(read):
    assert read("Mistral").layer_windows == (4096, 4096)
    assert read("Mistral", sliding_window=None) == read("Llama")


@pytest.mark.parametrize("family", ["Olmo3", "Gemma3"])
def test_rotations_by_the_kind_of_the_layer(read, family):
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e3},
    }
    kinds = ["sliding_attention", "full_attention"]
    fields = {"layer_types": kinds, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 4}
    config = read(family, **fields, rope_parameters=nested)
    assert config.layer_ropes == (Rope(1e3), Rope(1e6, "linear", 8.0))
    assert config.layer_windows == (4096, NO_WINDOW)
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e3}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    local = Rope(1e3 if family == "Gemma3" else 5e5)
    assert read(family, **fields, **old).layer_ropes == (local, Rope(1e6, "linear", 8.0))


def test_experts_are_read(read):
    """transformers 5 writes `num_local_experts`. The field of dense layers is not needed."""
    config = read("Qwen3Moe", intermediate_size=...)
    assert (config.num_experts, config.experts_per_token, config.intermediate_size) == (128, 8, 768)
    assert (config.head_size, config.normalizes_experts, config.layer_windows) == (4, False, ())
    for name in ("num_experts", "num_local_experts"):
        fields = {name: 16, "norm_topk_prob": True, "router_aux_loss_coef": 0.1}
        config = read("Qwen3Moe", **fields, use_sliding_window=True, mlp_only_layers=[])
        assert (config.num_experts, config.normalizes_experts) == (16, True)
        assert config.layer_windows == (4096, 4096)


def test_a_part_of_a_head_rotates(read):
    assert read("Phi3", partial_rotary_factor=0.5).rope == Rope(1e4, rotated=0.5)
    assert read("Phi3").rope == Rope(1e4)
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor 0.4; expected an even"):
        read("Phi3", partial_rotary_factor=0.4)


def test_layers_without_a_window_by_the_familys_rule(read):
    assert read("Olmo3", num_hidden_layers=5).layer_windows == (4096, 4096, 4096, NO_WINDOW, 4096)
    config = read("Gemma3", num_hidden_layers=6, head_dim=4, rope_theta=1e6)
    assert config.layer_windows == (4096,) * 5 + (NO_WINDOW,)
    assert config.layer_ropes == (Rope(1e4),) * 5 + (Rope(1e6),)
    assert read("SmolLM3", num_hidden_layers=4).layer_ropes == (Rope(1e4),) * 3 + (UNROTATED,)


KINDS = r"expected one of \['default', 'linear', 'llama3', 'yarn'\]"


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        (
            "Mamba",
            {},
            r"MambaForCausalLM.*expected one of \['Gemma3ForCausalLM', .*'Qwen3ForCausalLM'",
        ),
        ("Qwen3", {"architectures": ...}, "names the architecture nothing"),
        (
            "Qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types \['full.*\]; expected 'full_attention' in every layer \(there is no win",
        ),
        ("Qwen2", {"layer_types": 3}, "layer_types 3; expected one of .* each of the 2 layers"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0; expected null"),
        ("Gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0; expected n"),
        ("Gemma3", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'; expected \"gelu_py"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True; exp"),
        (
            "Olmo3",
            {"rope_parameters": {"rope_type": "default"}},
            "rope_parameters .* an object for each of",
        ),
        ("SmolLM3", {"no_rope_layers": [1]}, r"no_rope_layers \[1\]; expected 0 or 1 for each"),
        ("Mistral", {"layer_types": ["full_attention"] * 2}, "layer_types .* expected null"),
        ("Qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types .* expected one of"),
        ("Qwen3Moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2; expected 1"),
        ("Qwen3Moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]; expected \[\] \(experts"),
        (
            "Qwen3Moe",
            {"num_experts": 4, "num_experts_per_tok": 5},
            "per_tok 5; expected .* at most 4",
        ),
        ("Qwen3Moe", {"num_experts": 10**6}, "num_experts 1000000; expected .* at most 32768"),
        (
            "Qwen3Moe",
            {"num_experts": 8, "num_local_experts": 9},
            "num_local_experts 9; expected 8",
        ),
        ("Qwen3_5", {}, r"Qwen3_5ForCausalLM'\] \(its layers of linear attention"),
        ("Qwen3", {"hidden_act": "gelu"}, "hidden_act 'gelu'; expected \"silu\""),
        ("Llama", {"mlp_bias": True}, r"mlp_bias True; expected false \(an MLP without biases"),
        ("Llama", {"attention_bias": "yes"}, "attention_bias 'yes'; expected true or false"),
        (
            "Llama",
            {"quantization_config": {"bits": 4}},
            r"quantization_config \{'bits': 4\}; expected null \(weights that are not",
        ),
        (
            "Llama",
            {"partial_rotary_factor": 0.5},
            r"sets partial_rotary_factor 0\.5; expected 1 \(all dimensions of a head",
        ),
        (
            "Llama",
            scaled("linear", factor=2.0, partial_rotary_factor=0.5),
            r"rope_scaling\.partial_rotary_factor 0\.5; expected 1",
        ),
        (
            "Llama",
            {"hidden_size": 25},
            "hidden_size 25; expected a multiple of num_attention_heads, 6, or a head_dim",
        ),
        ("Qwen2", {"head_dim": 5}, "implies a head_dim of 5; expected an even one"),
        ("Qwen2", {"hidden_size": 18}, "implies a head_dim of 3; expected an even one"),
        (
            "Qwen2",
            {"num_key_value_heads": 4},
            "num_key_value_heads 4; expected a divisor of num_attention_heads, 6",
        ),
        ("Qwen2", {"vocab_size": "131"}, "vocab_size '131'; expected an integer of at least 1"),
        (
            "Qwen2",
            {"num_hidden_layers": 0},
            "num_hidden_layers 0; expected an integer of at least 1",
        ),
        ("Qwen2", {"rms_norm_eps": True}, "rms_norm_eps True; expected a positive number"),
        ("Qwen2", {"rope_theta": float("inf")}, "rope_theta inf; expected a positive number"),
        ("Qwen2", scaled("mystery"), rf"rope_scaling\.rope_type 'mystery'; {KINDS}$"),
        (
            "Qwen2",
            {"rope_parameters": {"type": ["yarn"]}},
            rf"rope_parameters\.type \['yarn'\]; {KINDS}$",
        ),
        (
            "Llama",
            scaled("dynamic", factor=2.0),
            rf"rope_type 'dynamic'; {KINDS}; the frequencies of this kind depend.*equals 'default'",
        ),
        (
            "Llama",
            {"rope_scaling": {"type": "longrope"}},
            rf"rope_scaling\.type 'longrope'; {KINDS}; the frequencies of this kind depend",
        ),
        (
            "Qwen3",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters {'full.*expected one flat object",
        ),
        ("Qwen3", {"rope_parameters": "yarn"}, "rope_parameters 'yarn'; expected one flat object"),
        (
            "Qwen3",
            {"rope_theta": ..., "rope_parameters": {"rope_type": "default"}},
            "neither rope_parameters.rope_theta nor rope_theta",
        ),
        (
            "Qwen3",
            {"rope_parameters": {"rope_theta": 1e6}, **scaled("linear", factor=2.0)},
            "rope_scaling .*; expected the same as rope_par",
        ),
        (
            "Llama",
            scaled("llama3", **LLAMA3 | {"factor": "8"}),
            r"rope_scaling\.factor '8'; expected a positive number",
        ),
        (
            "Llama",
            scaled("llama3", **LLAMA3 | {"high_freq_factor": 1}),
            "high_freq_factor 1; expected more than low_freq_factor, 1.0",
        ),
        (
            "Qwen2",
            scaled("yarn", **YARN, truncate=1),
            r"rope_scaling\.truncate 1; expected true or false",
        ),
        (
            "Qwen2",
            scaled("yarn", factor=4, original_max_position_embeddings=6.5),
            "embeddings 6.5; expected an integer of at least 1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 6 else "",
)
def test_unsupported_models_are_refused(read, family, fields, words):
    with pytest.raises(UnsupportedModelError, match=words):
        read(family, **fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"intermediate_size": ...}, "intermediate_size"),
        ({"hidden_size": None}, "hidden_size"),
        (scaled("linear"), "rope_scaling.factor"),
        (scaled("yarn", original_max_position_embeddings=64), "rope_scaling.factor"),
        (scaled("yarn", factor=4.0) | {"max_position_embeddings": ...}, "max_position_embeddings"),
        *(
            (scaled("llama3", **LLAMA3 | {name: None}), f"rope_scaling.{name}")
            for name in list(LLAMA3)[:3]
        ),
    ],
)
def test_config_without_a_field_is_refused(read, fields, name):
    with pytest.raises(CheckpointError, match=rf"config\.json lacks the field '{name}'"):
        read(**fields)
