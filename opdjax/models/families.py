"""One row per model family: how its `config.json` reads and what its tensors are called.

A name table maps our parameter path to the checkpoint's tensor name; `{i}` is the layer. Kernels keep the checkpoint's
`[out, in]` layout, so import and export move no element.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from opdjax.models.decoder import DecoderConfig


class UnsupportedModelError(ValueError):
    """The checkpoint's architecture, or an option of it, is not one that the decoder computes."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table."""

    read_config: Callable[[dict[str, Any]], DecoderConfig]
    layer_names: dict[str, str]
    global_names: dict[str, str]

    def names(self, config: DecoderConfig) -> tuple[dict[str, str], dict[str, str]]:
        """(global, per layer) path -> tensor name, of just the parameters that a model of this config has."""
        absent = set()
        if config.ties_embeddings:
            absent.add("head")
        if not config.has_qk_norm:
            absent |= {"q_norm", "k_norm"}
        if not config.has_qkv_bias:
            absent |= {"q_bias", "k_bias", "v_bias"}
        if not config.has_output_bias:
            absent.add("o_bias")
        return (
            {path: name for path, name in self.global_names.items() if path not in absent},
            {path: name for path, name in self.layer_names.items() if path not in absent},
        )


def _rope_theta(raw: dict[str, Any]) -> float:
    """transformers 5 writes `rope_parameters.rope_theta`, older files a top-level `rope_theta`; a silent default is wrong."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedModelError(f"config.json asks for rope_type {kind!r}; expected 'default' (no scaling)")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise UnsupportedModelError("config.json has neither rope_parameters.rope_theta nor rope_theta; add the base frequency")
    return float(theta)


def _read_qwen3(raw: dict[str, Any]) -> DecoderConfig:
    if raw.get("use_sliding_window"):
        raise UnsupportedModelError("config.json sets use_sliding_window; expected false (every layer attends to all tokens)")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"config.json sets hidden_act {raw['hidden_act']!r}; expected 'silu'")
    has_bias = bool(raw.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_size=raw.get("head_dim", 128),  # the default of this family, not hidden_size / num_attention_heads
        intermediate_size=raw["intermediate_size"],
        rope_theta=_rope_theta(raw),
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        ties_embeddings=bool(raw.get("tie_word_embeddings", False)),
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )


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
_GLOBAL_NAMES = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}

FAMILIES = {
    "Qwen3ForCausalLM": Family(_read_qwen3, _LAYER_NAMES, _GLOBAL_NAMES),
}


def family_of(raw: dict[str, Any]) -> Family:
    """The family that `config.json` names, or an error that lists those there are."""
    architectures = raw.get("architectures") or []
    for name in architectures:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UnsupportedModelError(
        f"config.json names the architecture {architectures or 'nothing'}; expected one of {sorted(FAMILIES)}. "
        "A new family is a row of opdjax/models/families.py"
    )
