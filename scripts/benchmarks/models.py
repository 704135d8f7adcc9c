"""Shapes and checkpoints of small models."""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
from typing import Any

from opdjax.models.decoder import DecoderConfig
from opdjax.models.families import family_of
from opdjax.models.hf import Checkpoint
from opdjax.models.hf_export import export

PAD, EOS = 0, 1


def qwen3(
    hidden: int, layers: int, heads: int, kv_heads: int, head: int, mlp: int, vocab: int, **more
) -> dict[str, Any]:
    """Return the `config.json` of a Qwen3 checkpoint in float32 with tied embeddings."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": mlp,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    } | more


MODELS = {
    "3.4M": qwen3(256, 4, 8, 4, 32, 768, 4096),
    "5M": qwen3(256, 6, 8, 4, 32, 768, 4096),
    "1.7B": qwen3(2048, 28, 16, 8, 128, 6144, 151_936),  # of a checkpoint that is measured
}


def decoder_of(raw: dict[str, Any]) -> DecoderConfig:
    """Return the shapes of a checkpoint's decoder."""
    return family_of(raw).read_config(raw)


def write_model(params: dict, raw: dict[str, Any], tokenizer: Any, out: pathlib.Path) -> None:
    """Write a Hugging Face directory, in the dtype of `raw`; an existing one is replaced."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        ids = {"eos_token_id": raw["eos_token_id"], "pad_token_id": raw["pad_token_id"]}
        pathlib.Path(folder, "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        parts = pathlib.Path(folder), raw, family_of(raw), decoder_of(raw)
        source = Checkpoint(*parts, (raw["eos_token_id"],), raw["dtype"])
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        export(params, source, out)
