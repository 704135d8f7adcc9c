"""Random checkpoints of every family, with odd sizes, written by transformers; the model tests
compare with them.
"""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.models import decoder
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.tile import head_logits

CHAT_TEMPLATE = "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s>' }}{% endfor %}"
SIZES = {
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "eos_token_id": [3, 5],
    "pad_token_id": 0,
}


# Name of a checkpoint in the model tests -> its family and its fields besides SIZES; a field that
# is ... is absent.
PAIRS = {
    "untied": ("Qwen3", {}),
    "bias": ("Qwen3", {"attention_bias": True}),
    "tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "head_dim": ...}),
    "llama": ("Llama", {"head_dim": ..., "rms_norm_eps": 1e-5}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-full": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {"head_dim": ..., "num_key_value_heads": 3}),
    "olmo3": (
        "Olmo3",
        {
            "head_dim": ...,
            "sliding_window": 4,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 100.0,
                    "factor": 4.0,
                    "beta_fast": 4,
                    "beta_slow": 0.5,
                    "original_max_position_embeddings": 10,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "smollm3": ("SmolLM3", {"head_dim": ..., "no_rope_layers": [1, 0]}),
    "smollm3-window": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 4,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 7,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": (
        "Phi3",
        {
            "head_dim": ...,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "sliding_window": 5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-window": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama-bias-tied": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="session")
def build():
    """build(family, **config fields) -> a torch model whose norms, biases and logits are far from
    the usual 1, 0 and 0.
    """
    import torch
    import transformers

    torch.set_num_threads(1)

    def build(family="Qwen3", **changes):
        fields = {
            **SIZES,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **changes,
        }
        config = getattr(transformers, f"{family}Config")(
            **{name: value for name, value in fields.items() if value is not ...}
        )
        family = family.removesuffix("Text")
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            scale, shift = (
                (0.2, 1.0)
                if "norm" in name
                else (0.5, 0.0)
                if "embed" in name or "bias" in name
                else (0.3, 0.0)
            )
            parameter.data.copy_(shift + scale * noise)
        return model

    return build


@pytest.fixture(scope="session")
def save(tmp_path_factory):
    """save(torch model, **save_pretrained arguments) -> the checkpoint directory, with a tokenizer
    and a chat template.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: i
        for i, word in enumerate(
            ["<pad>", "<s>", "<unk>", "</s>"] + [f"w{i}" for i in range(4, 131)]
        )
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", bos_token="<s>"
    )
    fast.chat_template = CHAT_TEMPLATE

    def save(model, **arguments):
        path = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(path, **arguments)
        fast.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def pairs(build, save):
    """Name -> torch model, its directory and checkpoint, and our float32 parameters with the same
    weights.
    """
    pairs = {}
    for name, (family, changes) in PAIRS.items():
        model = build(family, **changes)
        checkpoint = open_checkpoint(save(model))
        pairs[name] = types.SimpleNamespace(
            model=model,
            path=checkpoint.path,
            checkpoint=checkpoint,
            config=checkpoint.config,
            params=load_params(checkpoint, "float32"),
        )
    return pairs


LONG = ("qwen2-window", "mistral", "mistral-full", "olmo2", "olmo3", "smollm3", "smollm3-window")
LONG += ("phi3", "qwen3-moe-window")


@pytest.fixture(
    params=[pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in PAIRS]
)
def pair(request, pairs):
    """One of the pairs."""
    return pairs[request.param]


@pytest.fixture
def copy(pairs, tmp_path):
    """copy(name, **config fields) -> a copy of that checkpoint; a field set to None is null, a
    field set to ... is absent.
    """

    def copy(name, **fields):
        path = tmp_path / "copy"
        shutil.copytree(pairs[name].path, path)
        raw = json.loads((path / "config.json").read_text()) | fields
        (path / "config.json").write_text(
            json.dumps({key: value for key, value in raw.items() if value is not ...})
        )
        return path

    return copy


@pytest.fixture(scope="session")
def our_logits():
    """our_logits(params, config, tokens, segment_ids) -> numpy [B, T, V]."""

    def logits(params, config, tokens, segment_ids):
        hidden = decoder.forward(params, config, tokens, segment_ids)
        return head_logits(decoder.head_of(params), hidden)

    compiled = jax.jit(logits, static_argnums=1)
    return lambda params, config, *rows: np.asarray(
        compiled(params, config, *map(jnp.asarray, rows))
    )


@pytest.fixture(scope="session")
def torch_logits():
    """torch_logits(model, tokens, segment_ids) -> numpy [B, T, V]; one segment per row, padding on
    either side.
    """
    import torch

    def logits(model, tokens, segment_ids):
        mask = torch.as_tensor(segment_ids, dtype=torch.long)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            output = model(
                input_ids=torch.as_tensor(tokens, dtype=torch.long),
                attention_mask=mask,
                position_ids=positions,
            )
        return output.logits.float().numpy()

    return logits
