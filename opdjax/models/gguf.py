"""GGUF files of llama.cpp, written once as Hugging Face directories in the user's cache: weights
dequantised to float32, names and rotary order as in transformers, tokenizer and template rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from opdjax.models.families import FAMILIES
from opdjax.models.gguf_tokenizer import build_tokenizer
from opdjax.models.hf import CheckpointError
from opdjax.models.rope import Rope, inverse_frequencies
from opdjax.runs.object_store import scratch_root

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_NAMES = {  # parameter of the decoder: tensor of the file, without `.weight`
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "blk.{i}.attn_norm",
    "q_kernel": "blk.{i}.attn_q",
    "k_kernel": "blk.{i}.attn_k",
    "v_kernel": "blk.{i}.attn_v",
    "o_kernel": "blk.{i}.attn_output",
    "q_norm": "blk.{i}.attn_q_norm",
    "k_norm": "blk.{i}.attn_k_norm",
    "mlp_norm": "blk.{i}.ffn_norm",
    "gate_kernel": "blk.{i}.ffn_gate",
    "up_kernel": "blk.{i}.ffn_up",
    "down_kernel": "blk.{i}.ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3.1 and later: what each frequency is divided by
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # so in all of its models
_LLAMA3_LENGTH = 8192
_MAX_READS = 10_000_000  # of the metadata; a vocabulary of 256k tokens takes about 2 million


def directory_of(file: pathlib.Path) -> pathlib.Path:
    """The Hugging Face directory of a GGUF file, made by the first call and kept in the cache.
    CheckpointError for a file that cannot be converted.
    """
    stat = file.stat()
    identity = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    out = scratch_root() / "gguf" / f"{file.stem[:60]}-{digest}"
    if not out.exists():
        staging = out.with_name(f"{out.name}.partial-{os.getpid()}")
        try:
            _convert(file, staging)
            if not out.exists():  # another process may have been faster
                staging.rename(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return out


def _convert(file: pathlib.Path, out: pathlib.Path) -> None:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{file} needs the package gguf; install it with pip install 'opdjax[gguf]'"
        ) from error
    try:
        reader = _bounded_reader(gguf)(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = _config(fields, tensors)
        files = {"config.json": config} | _tokenizer_files(fields)
        out.mkdir(parents=True)
        for name, content in files.items():
            is_text = isinstance(content, str)
            (out / name).write_text(
                content if is_text else json.dumps(content, indent=2) + "\n", "utf-8"
            )
        _write_weights(out / "model.safetensors", config, tensors, gguf.quants.dequantize)
    # The library raises any of these for a file that is cut or of another kind.
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, NotImplementedError) as e:
        reason = f"lacks {e}" if isinstance(e, KeyError) else f"cannot be read: {e}"
        raise CheckpointError(
            f"{file} {reason}; expected a whole GGUF file of one of {', '.join(_CLASSES)}"
        ) from e


def _bounded_reader(gguf: Any) -> type:
    class Reader(gguf.GGUFReader):
        """Refuses what lies beyond the end of the file, and more metadata than any model has."""

        reads = 0

        def _get(self, offset, dtype, count=1, override_order=None):
            self.reads += 1
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data) or self.reads > _MAX_READS:
                raise ValueError(f"its {len(self.data)} bytes end before what its header names")
            return super()._get(offset, dtype, count, override_order)

    return Reader


def _config(fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json; ValueError for what the decoder does not implement, KeyError for a field that
    is missing.
    """
    kind = fields["general.architecture"]
    if kind not in _CLASSES:
        raise ValueError(f"its architecture is {kind!r}")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    heads, width = own["attention.head_count"], own["embedding_length"]
    head_size = own.get("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, head_size) != head_size:
            raise ValueError(f"{name} is {own[name]}; expected that of a head, {head_size}")
    if own.get("attention.sliding_window"):
        raise ValueError(
            f"attention.sliding_window is {own['attention.sliding_window']}; expected none (the "
            "file does not say which layers have it: use the model's safetensors)"
        )
    config = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "num_hidden_layers": own["block_count"],
        "intermediate_size": own["feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": own["context_length"],
        # The shortest decimal of the file's float32 is the number that was meant.
        "rms_norm_eps": float(str(np.float32(own["attention.layer_norm_rms_epsilon"]))),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
        "rope_parameters": _rope(own, head_size, tensors),
    }
    if kind != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    return config


def _rope(own: dict[str, Any], head_size: int, tensors: dict[str, Any]) -> dict[str, Any]:
    theta, kind = float(own.get("rope.freq_base", 10000.0)), own.get("rope.scaling.type", "none")
    rope = {"rope_type": "default", "rope_theta": theta}
    if _ROPE_FACTORS in tensors:
        found = np.asarray(tensors[_ROPE_FACTORS].data, np.float32).ravel()
        plain = inverse_frequencies(Rope(theta), head_size)
        for factor in (8.0, 32.0):
            tried = Rope(theta, "llama3", factor, _LLAMA3_LENGTH, *_LLAMA3.values())
            if np.allclose(plain / inverse_frequencies(tried, head_size), found, rtol=1e-4):
                return rope | {
                    "rope_type": "llama3",
                    "factor": factor,
                    "original_max_position_embeddings": _LLAMA3_LENGTH,
                    **_LLAMA3,
                }
        raise ValueError(f"{_ROPE_FACTORS} holds none of the factors of Llama 3.1 and 3.2")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type is {kind!r}; expected none, linear or yarn")
    rope |= {"rope_type": kind, "factor": float(own["rope.scaling.factor"])}
    if kind == "yarn":
        length = own["rope.scaling.original_context_length"]
        rope["original_max_position_embeddings"] = length
    return rope


def _tokenizer_files(fields: dict[str, Any]) -> dict[str, Any]:
    """Name -> content of the files of the tokenizer, template and stop ids."""
    prefix = "tokenizer.ggml."
    own = {
        name.removeprefix(prefix): value
        for name, value in fields.items()
        if name.startswith(prefix)
    }
    ids = {
        role: own.get(f"{name}_token_id")
        for role, name in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    special = {f"{role}_token": own["tokens"][i] for role, i in ids.items() if i is not None}
    stops = [ids["eos"], *([own["eot_token_id"]] if "eot_token_id" in own else [])]
    files = {
        "tokenizer.json": build_tokenizer(own).to_str(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **special},
        "generation_config.json": {
            "bos_token_id": ids["bos"],
            "eos_token_id": sorted(set(stops)),
            "pad_token_id": ids["pad"],
        },
    }
    if template := fields.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files


def _write_weights(
    file: pathlib.Path,
    config: dict[str, Any],
    tensors: dict[str, Any],
    dequantize: Callable[..., np.ndarray],
) -> None:
    """A safetensors file in float32, written tensor by tensor."""
    names = _tensor_names(config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    header, start = {"__metadata__": {"format": "pt"}}, 0
    kept = [tensor for tensor in tensors.values() if tensor.name != _ROPE_FACTORS]
    for tensor in kept:
        shape = [int(size) for size in reversed(tensor.shape)]
        end = start + 4 * int(np.prod(shape))
        # A name without a place here is one that the reader of the directory refuses.
        name = names.get(tensor.name, tensor.name)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in kept:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            kind = tensor.name.split(".")[-2]
            if config["model_type"] == "llama" and kind in heads:
                values = _in_halves(values, heads[kind])
            out.write(np.ascontiguousarray(values).data)


def _tensor_names(config: dict[str, Any]) -> dict[str, str]:
    """Name in a GGUF file -> name in a Hugging Face checkpoint."""
    family, names = FAMILIES[config["architectures"][0]], {}
    for ours, theirs in (family.global_names | family.layer_names).items():
        is_bias = ours.endswith("_bias")
        stem = _NAMES[ours.replace("_bias", "_kernel")] + (".bias" if is_bias else ".weight")
        for layer in range(config["num_hidden_layers"]):
            names[stem.format(i=layer)] = theirs.format(i=layer)
    return names


def _in_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from llama.cpp's order, in which the two of a rotated pair are neighbours,
    to that of transformers, in which they are half a head apart.
    """
    rows = len(values) // heads
    pairs = values.reshape(heads, rows // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
