"""One row per model family: how to read its `config.json`, and the names of its tensors.

A name table maps our parameter path to the checkpoint's tensor name; `{i}` is the layer. Kernels
keep the checkpoint's `[out, in]` layout, so import and export do not transpose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from opdjax.models.attention import NO_WINDOW
from opdjax.models.config_fields import Fields, UnsupportedModelError, read_rope
from opdjax.models.decoder import DecoderConfig
from opdjax.models.rope import UNROTATED
from opdjax.runs.bounds import MODEL_LAYERS

_FULL, _WINDOWED = "full_attention", "sliding_attention"  # kinds of layers
_KINDS = (_FULL, _WINDOWED)
_MOST_EXPERTS = 1 << 16  # of all layers


@dataclasses.dataclass(frozen=True)
class Family:
    """How to read a family's config, and its tensor names."""

    read_config: Callable[[dict[str, Any]], DecoderConfig]
    layer_names: dict[str, str]
    global_names: dict[str, str]


def _read_window(config: Fields, default: int | None) -> int | None:
    """Unlike other fields, a null window is not the default: it is none."""
    has_window = config.values.get("sliding_window", default) is not None
    return config.integer("sliding_window", default) if has_window else None


def _layer_windows(
    config: Fields, window: int | None, has_window: Callable[[int], bool] = lambda layer: False
) -> tuple[int, ...]:
    """The window of each layer; `has_window` is the family's rule where `layer_types` is absent."""
    num_layers, kinds = _read_num_layers(config), config.values.get("layer_types")
    if kinds is None:
        kinds = [_WINDOWED if has_window(layer) else _FULL for layer in range(num_layers)]
    is_list = isinstance(kinds, list) and len(kinds) == num_layers
    if not is_list or not all(kind in _KINDS for kind in kinds):
        config.refuse("layer_types", f"one of {_KINDS} for each of the {num_layers} layers")
    if _WINDOWED not in kinds:
        return ()
    if window is None:
        config.refuse("layer_types", "'full_attention' in every layer (there is no window)")
    return tuple(window if kind == _WINDOWED else NO_WINDOW for kind in kinds)


def _read_num_layers(config: Fields) -> int:
    return config.integer("num_hidden_layers", most=MODEL_LAYERS)


def _read_decoder(
    raw: dict[str, Any],
    *,
    head_size: int | None = None,
    rope_theta: float | None = None,
    norm_epsilon: float = 1e-6,
    ties_embeddings: bool = False,
    **options: Any,
) -> DecoderConfig:
    """The fields that all families share; the arguments are a family's defaults, and in `options`
    its fields of DecoderConfig.
    """
    config = Fields(raw)
    if "activation" not in options:
        config.expect("hidden_act", "silu", "the gate of the MLP")
    config.expect("quantization_config", None, "weights that are not quantized")
    num_heads, width = map(config.integer, ("num_attention_heads", "hidden_size"))
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    if head_size is None and not config.has("head_dim") and width % num_heads:
        config.refuse(
            "hidden_size", f"a multiple of num_attention_heads, {num_heads}, or a head_dim"
        )
    head_size = config.integer("head_dim", head_size or width // num_heads)
    if head_size % 2:
        raise UnsupportedModelError(
            f"config.json implies a head_dim of {head_size}; expected an even one (its dimensions "
            "rotate in pairs)"
        )
    return DecoderConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=width,
        num_layers=_read_num_layers(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        intermediate_size=config.integer("intermediate_size"),
        norm_epsilon=config.number("rms_norm_eps", norm_epsilon),
        ties_embeddings=config.boolean("tie_word_embeddings", ties_embeddings),
        **{"rope": options.get("rope") or read_rope(raw, rope_theta), **options},
    )


def _read_biases(raw: dict[str, Any]) -> dict[str, bool]:
    has_bias = Fields(raw).boolean("attention_bias", False)
    return {"has_qkv_bias": has_bias, "has_output_bias": has_bias}


def _read_qwen3(raw: dict[str, Any]) -> DecoderConfig:
    windows = _qwen_windows(Fields(raw))
    return _read_decoder(
        raw, head_size=128, has_qk_norm=True, layer_windows=windows, **_read_biases(raw)
    )


def _read_qwen3_moe(raw: dict[str, Any]) -> DecoderConfig:
    """Every layer has experts. The router's loss (`router_aux_loss_coef`) spreads tokens over the
    experts in pretraining; it is no part of distillation, and not read.
    """
    config = Fields(raw)
    config.expect("decoder_sparse_step", 1, "experts in every layer")
    config.expect("mlp_only_layers", [], "experts in every layer")
    most = _MOST_EXPERTS // _read_num_layers(config)
    num_experts = config.integer("num_experts", config.integer("num_local_experts", 128), most=most)
    config.expect("num_local_experts", num_experts, "the same as num_experts")
    size = config.integer("moe_intermediate_size", 768)
    has_window = config.boolean("use_sliding_window", False)
    return _read_decoder(
        raw | {"intermediate_size": size},
        has_qk_norm=True,
        num_experts=num_experts,
        experts_per_token=config.integer("num_experts_per_tok", 8, most=num_experts),
        normalizes_experts=config.boolean("norm_topk_prob", False),
        layer_windows=_one_window(config, 4096) if has_window else (),
        **_read_biases(raw),
    )


def _read_qwen2(raw: dict[str, Any]) -> DecoderConfig:
    """Qwen2 and Qwen2.5, which always have biases."""
    return _read_decoder(raw, has_qkv_bias=True, layer_windows=_qwen_windows(Fields(raw)))


def _qwen_windows(config: Fields) -> tuple[int, ...]:
    window = _read_window(config, 4096) if config.boolean("use_sliding_window", False) else None
    first = config.integer("max_window_layers", 28, least=0)
    return _layer_windows(config, window, lambda layer: window is not None and layer >= first)


def _read_llama(raw: dict[str, Any]) -> DecoderConfig:
    """Llama 2 (whose files have no rope_theta) to 3.2; `pretraining_tp` changes no product."""
    config = Fields(raw)
    config.expect("mlp_bias", False, "an MLP without biases")
    return _read_decoder(
        raw,
        rope_theta=10000.0,
        **_read_biases(raw),
        layer_windows=_layer_windows(config, None),
    )


def _read_mistral(raw: dict[str, Any]) -> DecoderConfig:
    return _read_decoder(raw, layer_windows=_one_window(Fields(raw), 4096))


def _read_olmo2(raw: dict[str, Any], **options: Any) -> DecoderConfig:
    return _read_decoder(
        raw,
        norm_epsilon=1e-5,
        has_qk_norm=True,
        **_read_biases(raw),
        has_pre_norms=False,
        has_post_norms=True,
        norms_all_heads=True,
        **options,
    )


def _read_olmo3(raw: dict[str, Any]) -> DecoderConfig:
    """Every fourth layer attends to all tokens, and its rotation alone is stretched."""
    config = Fields(raw)
    window, has_window = _read_window(config, 4096), lambda layer: (layer + 1) % 4 != 0
    windows = _layer_windows(config, window, has_window)
    return _read_olmo2(raw, layer_windows=windows, **_ropes_by_window(raw, windows, 5e5, 5e5))


def _ropes_by_window(
    raw: dict[str, Any], windows: tuple[int, ...], theta: float, local_theta: float
) -> dict[str, Any]:
    """The rotations of a config that names them by the kind of the layer; the arguments are the
    base frequencies of layers without and with a window that it does not name.
    """
    config, nested = Fields(raw), raw.get("rope_parameters") or {}
    if not isinstance(nested, dict) or not nested.keys() <= set(_KINDS):
        config.refuse("rope_parameters", f"an object for each of {_KINDS}")
    if nested:
        config.expect("rope_scaling", None, "rope_parameters alone")
    own = {"rope_scaling": None, "rope_theta": local_theta}
    full, local = (
        read_rope(fields | {"rope_parameters": nested.get(kind)}, theta)
        for kind, fields in zip(_KINDS, (raw, raw | own))
    )
    ropes = tuple(full if window == NO_WINDOW else local for window in windows)
    return {"rope": full, "layer_ropes": ropes if local != full else ()}


def _read_smollm3(raw: dict[str, Any]) -> DecoderConfig:
    """Layers without rotation: of each four the last, or as `no_rope_layers` says (1: rotated)."""
    config, num_layers = Fields(raw), _read_num_layers(Fields(raw))
    config.expect("mlp_bias", False, "an MLP without biases")
    interval, rotates = config.integer("no_rope_layer_interval", 4), raw.get("no_rope_layers")
    if rotates is None:
        rotates = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    is_list = isinstance(rotates, list) and len(rotates) >= num_layers
    if not is_list or not all(type(each) is int and each in (0, 1) for each in rotates):
        config.refuse("no_rope_layers", f"0 or 1 for each of the {num_layers} layers")
    window = _read_window(config, None) if config.boolean("use_sliding_window", False) else None
    has_window = lambda layer: window is not None and not rotates[layer]
    rope = read_rope(raw, None)
    ropes = tuple(rope if each else UNROTATED for each in rotates[:num_layers])
    return _read_decoder(
        raw,
        ties_embeddings=True,
        **_read_biases(raw),
        layer_windows=_layer_windows(config, window, has_window),
        layer_ropes=ropes if UNROTATED in ropes else (),
    )


def _read_gemma3(raw: dict[str, Any]) -> DecoderConfig:
    """The text models: every sixth layer attends to all tokens, with a rotation of its own."""
    config = Fields(raw)
    config.expect("hidden_activation", "gelu_pytorch_tanh", "the gate of the MLP")
    config.expect("use_bidirectional_attention", False, "attention to earlier tokens")
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        config.expect(name, None, "logits without a cap")
    pattern = config.integer("sliding_window_pattern", 6)
    has_window = lambda layer: (layer + 1) % pattern != 0
    windows = _layer_windows(config, _read_window(config, 4096), has_window)
    local_theta = config.number("rope_local_base_freq", 10000.0, least=1.001)
    head_size = config.integer("head_dim", 256)
    return _read_decoder(
        raw,
        head_size=head_size,
        ties_embeddings=True,
        has_qk_norm=True,
        **_read_biases(raw),
        has_post_norms=True,
        norm_offset=1.0,
        embedding_scale=config.integer("hidden_size") ** 0.5,
        query_scale=(head_size / config.number("query_pre_attn_scalar", 256)) ** 0.5,
        activation="gelu",
        layer_windows=windows,
        **_ropes_by_window(raw, windows, 1e6, local_theta),
    )


def _read_phi3(raw: dict[str, Any]) -> DecoderConfig:
    """Phi-3 and Phi-4; of those with long contexts the frequencies (`longrope`) are refused."""
    rope, config = read_rope(raw, None, is_partial=True), Fields(raw)
    windows = _one_window(config, None)
    decoder = _read_decoder(raw, norm_epsilon=1e-5, rope=rope, layer_windows=windows)
    if not 2 <= (size := int(decoder.head_size * rope.rotated)) <= decoder.head_size or size % 2:
        config.refuse("partial_rotary_factor", "an even number of rotated dimensions of a head")
    return decoder


def _one_window(config: Fields, default: int | None) -> tuple[int, ...]:
    """The same in all layers."""
    config.expect("layer_types", None, "layers of one kind")
    window = _read_window(config, default)
    return (window,) * _read_num_layers(config) if window else ()


_LAYER_NAMES = {
    "attention_norm": "model.layers.{i}.input_layernorm.weight",
    "q_kernel": "model.layers.{i}.self_attn.q_proj.weight",
    "k_kernel": "model.layers.{i}.self_attn.k_proj.weight",
    "v_kernel": "model.layers.{i}.self_attn.v_proj.weight",
    "o_kernel": "model.layers.{i}.self_attn.o_proj.weight",
    "q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "o_bias": "model.layers.{i}.self_attn.o_proj.bias",
    "q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "gate_kernel": "model.layers.{i}.mlp.gate_proj.weight",
    "up_kernel": "model.layers.{i}.mlp.up_proj.weight",
    "down_kernel": "model.layers.{i}.mlp.down_proj.weight",
}
_EXPERT_NAMES = {  # `{e}` is the expert
    "router_kernel": "model.layers.{i}.mlp.gate.weight",
    "expert_gate_kernel": "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
    "expert_up_kernel": "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    "expert_down_kernel": "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
}
_POST_NORMS = {
    "attention_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}
_PRE_AND_POST_NORMS = _POST_NORMS | {
    "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
}
# A name of several parameters is that of one tensor with the rows of all.
_FUSED = {
    **dict.fromkeys(
        ("q_kernel", "k_kernel", "v_kernel"), "model.layers.{i}.self_attn.qkv_proj.weight"
    ),
    **dict.fromkeys(("gate_kernel", "up_kernel"), "model.layers.{i}.mlp.gate_up_proj.weight"),
}
_GLOBAL_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}

FAMILIES = {
    "Gemma3ForCausalLM": Family(_read_gemma3, _LAYER_NAMES | _PRE_AND_POST_NORMS, _GLOBAL_NAMES),
    "LlamaForCausalLM": Family(_read_llama, _LAYER_NAMES, _GLOBAL_NAMES),
    "MistralForCausalLM": Family(_read_mistral, _LAYER_NAMES, _GLOBAL_NAMES),
    "Olmo2ForCausalLM": Family(_read_olmo2, _LAYER_NAMES | _POST_NORMS, _GLOBAL_NAMES),
    "Olmo3ForCausalLM": Family(_read_olmo3, _LAYER_NAMES | _POST_NORMS, _GLOBAL_NAMES),
    "Phi3ForCausalLM": Family(_read_phi3, _LAYER_NAMES | _FUSED, _GLOBAL_NAMES),
    "Qwen2ForCausalLM": Family(_read_qwen2, _LAYER_NAMES, _GLOBAL_NAMES),
    "Qwen3ForCausalLM": Family(_read_qwen3, _LAYER_NAMES, _GLOBAL_NAMES),
    "Qwen3MoeForCausalLM": Family(_read_qwen3_moe, _LAYER_NAMES | _EXPERT_NAMES, _GLOBAL_NAMES),
    "SmolLM3ForCausalLM": Family(_read_smollm3, _LAYER_NAMES, _GLOBAL_NAMES),
}


_RECURRENT = (
    "its layers of linear attention (gated delta rule) pass a state and a convolution from token "
    "to token, which packed rows would carry into the next text and a cache by column does not hold"
)
_REFUSED = {
    f"{name}For{task}": _RECURRENT
    for name in ("Qwen3Next", "Qwen3_5", "Qwen3_5Moe")
    for task in ("CausalLM", "ConditionalGeneration")
}


def family_of(raw: dict[str, Any]) -> Family:
    """The family that `config.json` names; UnsupportedModelError if there is none."""
    architectures = raw.get("architectures") or []
    reason = ""
    for name in architectures if isinstance(architectures, list) else ():
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
        if isinstance(name, str) and name in _REFUSED:
            reason = f" ({_REFUSED[name]})"
    raise UnsupportedModelError(
        f"config.json names the architecture {architectures or 'nothing'}{reason}; expected one "
        f"of {sorted(FAMILIES)}. A new family is a row of opdjax/models/families.py"
    )


def layer_fields(config: DecoderConfig, layers: list[int], raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of `raw` that say what these layers are, if they are all that is kept."""
    fields: dict[str, Any] = {"num_hidden_layers": len(layers)}
    if raw.get("layer_types") or len(set(config.windows)) > 1:
        kind = lambda layer: _FULL if config.windows[layer] == NO_WINDOW else _WINDOWED
        fields["layer_types"] = list(map(kind, layers))
    if UNROTATED in config.ropes:
        fields["no_rope_layers"] = [int(config.ropes[layer] != UNROTATED) for layer in layers]
    return fields
