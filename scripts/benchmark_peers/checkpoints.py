"""A random student and teacher, written once as Hugging Face checkpoints for every system."""

from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmark_peers.settings import Model, Sizes

PAD, EOS, FIRST_WORD = 0, 1, 2
_PROMPTS = 4096


def write_pair(root: pathlib.Path, sizes: Sizes) -> tuple[pathlib.Path, pathlib.Path]:
    """Return the directories of student and teacher, written if absent.

    Their parent directory holds `prompts.jsonl`.
    """
    marker = root / "prompts.jsonl"
    student, teacher = root / "student", root / "teacher"
    if not marker.exists():
        _write(student, sizes.student, sizes, seed=0)
        _write(teacher, sizes.teacher, sizes, seed=1)
        rng = np.random.default_rng(2)
        ids = rng.integers(FIRST_WORD, sizes.student.vocab, (_PROMPTS, sizes.prompt)).tolist()
        rows = [json.dumps({"prompt": " ".join(f"w{i}" for i in row), "ids": row}) for row in ids]
        marker.write_text("\n".join(rows) + "\n")
    return student, teacher


def stop_ids(sizes: Sizes) -> list[int]:
    """Return the ids that end a completion in the case with a long tail.

    They are about `tail_share` of every distribution, so lengths are geometric.
    """
    rng, vocab = np.random.default_rng(3), sizes.student.vocab
    count = max(round(sizes.tail_share * vocab), 1)
    return sorted(int(i) for i in rng.choice(np.arange(FIRST_WORD, vocab), count, replace=False))


def _write(directory: pathlib.Path, model: Model, sizes: Sizes, seed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.float32 if sizes.dtype == "float32" else ml_dtypes.bfloat16
    save_file(
        {name: x.astype(dtype) for name, x in _tensors(model, seed)},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head,
        "intermediate_size": model.mlp,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": sizes.dtype,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"eos_token_id": EOS, "pad_token_id": PAD, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=1))
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(FIRST_WORD, model.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "padding_side": "left",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(named, indent=1))


def _tensors(model: Model, seed: int):
    """Yield (name, array) of every tensor.

    No padding or end-of-sequence token is ever sampled, so every completion has the full length in
    every system. Component 0 of the residual stream is a positive constant that no layer writes to,
    and it gives these two tokens a logit of about -60.
    """
    rng, d, h = np.random.default_rng(seed), model.hidden, model.head

    def normal(*shape, scale):
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    def writes(rows, columns):
        kernel = normal(rows, columns, scale=columns**-0.5)
        kernel[0] = 0
        return kernel

    embedding = normal(model.vocab, d, scale=0.05)
    embedding[:, 0], embedding[[PAD, EOS], 0] = 0.1, -60
    yield "model.embed_tokens.weight", embedding
    norm = np.ones(d, np.float32)
    norm[0] = 30
    yield "model.norm.weight", norm
    for i in range(model.layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", np.ones(d, np.float32)
        yield layer + "post_attention_layernorm.weight", np.ones(d, np.float32)
        yield layer + "self_attn.q_norm.weight", np.ones(h, np.float32)
        yield layer + "self_attn.k_norm.weight", np.ones(h, np.float32)
        yield layer + "self_attn.q_proj.weight", normal(model.heads * h, d, scale=d**-0.5)
        yield layer + "self_attn.k_proj.weight", normal(model.kv_heads * h, d, scale=d**-0.5)
        yield layer + "self_attn.v_proj.weight", normal(model.kv_heads * h, d, scale=d**-0.5)
        yield layer + "self_attn.o_proj.weight", writes(d, model.heads * h)
        yield layer + "mlp.gate_proj.weight", normal(model.mlp, d, scale=d**-0.5)
        yield layer + "mlp.up_proj.weight", normal(model.mlp, d, scale=d**-0.5)
        yield layer + "mlp.down_proj.weight", writes(d, model.mlp)
