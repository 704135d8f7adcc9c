"""One row per model family: how to read its `config.json`, and the names of its tensors.

A name table maps our parameter path to the checkpoint's tensor name; `{i}` is the layer. Kernels
keep the checkpoint's `[out, in]` layout, so import and export do not transpose.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from opdjax.models.attention import NO_WINDOW
from opdjax.models.decoder import DecoderConfig
from opdjax.models.rope import UNROTATED, Rope, yarn_attention_factor
from opdjax.runs.bounds import MODEL_LAYERS, MODEL_SIZE, BoundedError


class UnsupportedModelError(BoundedError):
    """The decoder does not implement the checkpoint's architecture or one of its options."""


_KINDS = _, _WINDOWED = "full_attention", "sliding_attention"  # of layers
_LARGEST = 1e12  # of a config's numbers with a point: beyond it float32 loses what they describe


@dataclasses.dataclass(frozen=True)
class Family:
    """How to read a family's config, and its tensor names."""

    read_config: Callable[[dict[str, Any]], DecoderConfig]
    layer_names: dict[str, str]
    global_names: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Fields:
    """An object of `config.json`; null fields count as absent. KeyError without a default."""

    values: dict[str, Any]
    within: str = ""

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def number(self, name: str, default: float | None = None, least: float = 1e-12) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not least <= value <= _LARGEST:
            self.refuse(name, f"a positive number, from {least:g} to {_LARGEST:g}")
        return float(value)

    def integer(
        self, name: str, default: int | None = None, least: int = 1, most: int = MODEL_SIZE
    ) -> int:
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(name, f"an integer of at least {least} and at most {most}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def _get(self, name: str, default: Any) -> Any:
        if not self.has(name) and default is None:
            raise KeyError(self.within + name)
        return self.values[name] if self.has(name) else default

    def expect(self, name: str, expected: Any, reason: str) -> None:
        """Refuse any value but the one that the decoder implements."""
        if self.has(name) and self.values[name] != expected:
            self.refuse(name, f"{json.dumps(expected)} ({reason})")

    def refuse(self, name: str, expected: str) -> None:
        raise UnsupportedModelError(
            f"config.json sets {self.within}{name} {self.values[name]!r}; expected {expected}"
        )


def _read_original_length(rope: _Fields, config: _Fields) -> int:
    """As in transformers: the field next to the rope object wins over the one inside it."""
    name = "original_max_position_embeddings"
    owner = config if config.has(name) else rope
    return owner.integer(name) if owner.has(name) else config.integer("max_position_embeddings")


def _read_llama3(rope: _Fields, config: _Fields) -> dict[str, Any]:
    slow, fast = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if fast <= slow:
        rope.refuse("high_freq_factor", f"more than low_freq_factor, {slow}")
    length = _read_original_length(rope, config)
    factor, rotations = rope.number("factor"), {"slow_rotations": slow, "fast_rotations": fast}
    return {"factor": factor, "original_length": length, **rotations}


def _read_yarn(rope: _Fields, config: _Fields) -> dict[str, Any]:
    factor, names = rope.number("factor"), ("mscale", "mscale_all_dim")
    scales = [rope.number(name) if rope.has(name) else None for name in names]
    return {
        "factor": factor,
        "original_length": _read_original_length(rope, config),
        "slow_rotations": rope.number("beta_slow", 1.0),
        "fast_rotations": rope.number("beta_fast", 32.0),
        "rounds_range": rope.boolean("truncate", True),
        "attention_factor": rope.number("attention_factor", yarn_attention_factor(factor, *scales)),
    }


_ROPE_READERS = {
    "default": lambda rope, config: {},
    "linear": lambda rope, config: {"factor": rope.number("factor")},
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}
_IMPURE = (
    "the frequencies of this kind depend on the longest sequence in the batch, so cached tokens "
    "would disagree with a full forward"
)
_IMPURE_ROPES = {
    "dynamic": f"{_IMPURE}; up to max_position_embeddings tokens it equals 'default', which you "
    "may write instead",
    "longrope": _IMPURE,
}


def _read_rope(raw: dict[str, Any], default_theta: float | None, is_partial: bool = False) -> Rope:
    """transformers 5 writes `rope_parameters`, older versions `rope_scaling` and `rope_theta`."""
    written = [name for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    written = written or ["rope_parameters"]
    ropes = [_read_written_rope(raw, name, default_theta, is_partial) for name in written]
    if ropes[0] != ropes[-1]:
        same = f"the same as rope_parameters, {raw['rope_parameters']!r}"
        _Fields(raw).refuse("rope_scaling", f"{same}, or only one of the two")
    return ropes[0]


def _read_written_rope(
    raw: dict[str, Any], name: str, default_theta: float | None, is_partial: bool
) -> Rope:
    config, values = _Fields(raw), raw.get(name) or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        config.refuse(name, "one flat object, the same for every layer")
    rope = _Fields(values, f"{name}.")
    spelling = "rope_type" if "rope_type" in values or "type" not in values else "type"
    kind = values.get(spelling, "default")
    if not isinstance(kind, str) or kind not in _ROPE_READERS:
        reason = f"; {_IMPURE_ROPES[kind]}" if str(kind) in _IMPURE_ROPES else ""
        rope.refuse(spelling, f"one of {sorted(_ROPE_READERS)}{reason}")
    rotated = 1.0
    for fields in (config, rope):  # the inner factor wins
        if is_partial:
            rotated = fields.number("partial_rotary_factor", rotated)
        else:
            fields.expect("partial_rotary_factor", 1, "all dimensions of a head are rotated")
    owner = rope if rope.has("rope_theta") else config
    if not owner.has("rope_theta") and default_theta is None:  # a silent default would be wrong
        raise UnsupportedModelError(
            "config.json has neither rope_parameters.rope_theta nor rope_theta; add the base "
            "frequency"
        )
    theta = owner.number("rope_theta", default_theta, least=1.001)
    return Rope(theta, kind, rotated=rotated, **_ROPE_READERS[kind](rope, config))


def _read_window(config: _Fields, default: int | None) -> int | None:
    """Unlike other fields, a null window is not the default: it is none."""
    has_window = config.values.get("sliding_window", default) is not None
    return config.integer("sliding_window", default) if has_window else None


def _layer_windows(
    config: _Fields, window: int | None, has_window: Callable[[int], bool] = lambda layer: False
) -> tuple[int, ...]:
    """The window of each layer; `has_window` is the family's rule where `layer_types` is absent."""
    num_layers, kinds = _read_num_layers(config), config.values.get("layer_types")
    if kinds is None:
        kinds = [_KINDS[has_window(layer)] for layer in range(num_layers)]
    is_list = isinstance(kinds, list) and len(kinds) == num_layers
    if not is_list or not all(kind in _KINDS for kind in kinds):
        config.refuse("layer_types", f"one of {_KINDS} for each of the {num_layers} layers")
    if _WINDOWED not in kinds:
        return ()
    if window is None:
        config.refuse("layer_types", "'full_attention' in every layer (there is no window)")
    return tuple(window if kind == _WINDOWED else NO_WINDOW for kind in kinds)


def _read_num_layers(config: _Fields) -> int:
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
    config = _Fields(raw)
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
        **{"rope": options.get("rope") or _read_rope(raw, rope_theta), **options},
    )


def _read_qwen3(raw: dict[str, Any]) -> DecoderConfig:
    has_bias = _Fields(raw).boolean("attention_bias", False)
    return _read_decoder(
        raw,
        head_size=128,
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        layer_windows=_qwen_windows(_Fields(raw)),
    )


def _read_qwen2(raw: dict[str, Any]) -> DecoderConfig:
    """Qwen2 and Qwen2.5, which always have biases."""
    return _read_decoder(raw, has_qkv_bias=True, layer_windows=_qwen_windows(_Fields(raw)))


def _qwen_windows(config: _Fields) -> tuple[int, ...]:
    window = _read_window(config, 4096) if config.boolean("use_sliding_window", False) else None
    first = config.integer("max_window_layers", 28, least=0)
    return _layer_windows(config, window, lambda layer: window is not None and layer >= first)


def _read_llama(raw: dict[str, Any]) -> DecoderConfig:
    """Llama 2 (whose files have no rope_theta) to 3.2; `pretraining_tp` changes no product."""
    config = _Fields(raw)
    config.expect("mlp_bias", False, "an MLP without biases")
    has_bias = config.boolean("attention_bias", False)
    return _read_decoder(
        raw,
        rope_theta=10000.0,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        layer_windows=_layer_windows(config, None),
    )


def _read_mistral(raw: dict[str, Any]) -> DecoderConfig:
    return _read_decoder(raw, layer_windows=_one_window(_Fields(raw), 4096))


def _read_olmo2(raw: dict[str, Any], **options: Any) -> DecoderConfig:
    has_bias = _Fields(raw).boolean("attention_bias", False)
    return _read_decoder(
        raw,
        norm_epsilon=1e-5,
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        has_pre_norms=False,
        has_post_norms=True,
        norms_all_heads=True,
        **options,
    )


def _read_olmo3(raw: dict[str, Any]) -> DecoderConfig:
    """Every fourth layer attends to all tokens, and its rotation alone is stretched."""
    config = _Fields(raw)
    window, has_window = _read_window(config, 4096), lambda layer: (layer + 1) % 4 != 0
    windows = _layer_windows(config, window, has_window)
    return _read_olmo2(raw, layer_windows=windows, **_ropes_by_window(raw, windows, 5e5, 5e5))


def _ropes_by_window(
    raw: dict[str, Any], windows: tuple[int, ...], theta: float, local_theta: float
) -> dict[str, Any]:
    """The rotations of a config that names them by the kind of the layer; the arguments are the
    base frequencies of layers without and with a window that it does not name.
    """
    config, nested = _Fields(raw), raw.get("rope_parameters") or {}
    if not isinstance(nested, dict) or not nested.keys() <= set(_KINDS):
        config.refuse("rope_parameters", f"an object for each of {_KINDS}")
    if nested:
        config.expect("rope_scaling", None, "rope_parameters alone")
    own = {"rope_scaling": None, "rope_theta": local_theta}
    full, local = (
        _read_rope(fields | {"rope_parameters": nested.get(kind)}, theta)
        for kind, fields in zip(_KINDS, (raw, raw | own))
    )
    ropes = tuple(full if window == NO_WINDOW else local for window in windows)
    return {"rope": full, "layer_ropes": ropes if local != full else ()}


def _read_smollm3(raw: dict[str, Any]) -> DecoderConfig:
    """Layers without rotation: of each four the last, or as `no_rope_layers` says (1: rotated)."""
    config, num_layers = _Fields(raw), _read_num_layers(_Fields(raw))
    config.expect("mlp_bias", False, "an MLP without biases")
    has_bias = config.boolean("attention_bias", False)
    interval, rotates = config.integer("no_rope_layer_interval", 4), raw.get("no_rope_layers")
    if rotates is None:
        rotates = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    is_list = isinstance(rotates, list) and len(rotates) >= num_layers
    if not is_list or not all(type(each) is int and each in (0, 1) for each in rotates):
        config.refuse("no_rope_layers", f"0 or 1 for each of the {num_layers} layers")
    window = _read_window(config, None) if config.boolean("use_sliding_window", False) else None
    has_window = lambda layer: window is not None and not rotates[layer]
    rope = _read_rope(raw, None)
    ropes = tuple(rope if each else UNROTATED for each in rotates[:num_layers])
    return _read_decoder(
        raw,
        ties_embeddings=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        layer_windows=_layer_windows(config, window, has_window),
        layer_ropes=ropes if UNROTATED in ropes else (),
    )


def _read_gemma3(raw: dict[str, Any]) -> DecoderConfig:
    """The text models: every sixth layer attends to all tokens, with a rotation of its own."""
    config = _Fields(raw)
    config.expect("hidden_activation", "gelu_pytorch_tanh", "the gate of the MLP")
    config.expect("use_bidirectional_attention", False, "attention to earlier tokens")
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        config.expect(name, None, "logits without a cap")
    pattern = config.integer("sliding_window_pattern", 6)
    has_window = lambda layer: (layer + 1) % pattern != 0
    windows = _layer_windows(config, _read_window(config, 4096), has_window)
    has_bias = config.boolean("attention_bias", False)
    local_theta = config.number("rope_local_base_freq", 10000.0, least=1.001)
    head_size = config.integer("head_dim", 256)
    return _read_decoder(
        raw,
        head_size=head_size,
        ties_embeddings=True,
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
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
    rope, config = _read_rope(raw, None, is_partial=True), _Fields(raw)
    windows = _one_window(config, None)
    decoder = _read_decoder(raw, norm_epsilon=1e-5, rope=rope, layer_windows=windows)
    if not 2 <= (size := int(decoder.head_size * rope.rotated)) <= decoder.head_size or size % 2:
        config.refuse("partial_rotary_factor", "an even number of rotated dimensions of a head")
    return decoder


def _one_window(config: _Fields, default: int | None) -> tuple[int, ...]:
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
    "SmolLM3ForCausalLM": Family(_read_smollm3, _LAYER_NAMES, _GLOBAL_NAMES),
}


def family_of(raw: dict[str, Any]) -> Family:
    """The family that `config.json` names; UnsupportedModelError if there is none."""
    architectures = raw.get("architectures") or []
    for name in architectures if isinstance(architectures, list) else ():
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    raise UnsupportedModelError(
        f"config.json names the architecture {architectures or 'nothing'}; expected one of "
        f"{sorted(FAMILIES)}. A new family is a row of opdjax/models/families.py"
    )
