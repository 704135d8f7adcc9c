"""The hub's models and data sets that the experiments name, small: the real config.json, or a
thirty-second of its widths with two layers, a byte-level tokenizer with the family's special
tokens, and hand-written rows in the published columns.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as splits
from tokenizers.trainers import BpeTrainer

from opdjax.config.presets import presets_in
from opdjax.models.decoder import init_params
from opdjax.models.hf import open_checkpoint
from opdjax.models.hf_export import export

FIRST_SPECIAL, FIRST_SMALL, SCALE = 151643, 300, 32
_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": FIRST_SPECIAL,
    "eos_token_id": FIRST_SPECIAL,  # of the base models
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_hidden_layers": 28,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3 = _COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
}
_QWEN2_MATH = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "use_mrope": False,
}
_CHAT = {"eos_token_id": FIRST_SPECIAL + 2, "max_position_embeddings": 40960}


def _sizes(width, inner, **others):
    return {"hidden_size": width, "intermediate_size": inner, **others}


_4B = _sizes(2560, 9728, num_attention_heads=32, num_hidden_layers=36, max_window_layers=36)
_14B = _sizes(5120, 17408, num_attention_heads=40, num_hidden_layers=40, max_window_layers=40)
CONFIGS = {
    "Qwen/Qwen3-0.6B-Base": _QWEN3 | _sizes(1024, 3072),
    "Qwen/Qwen3-1.7B-Base": _QWEN3 | _sizes(2048, 6144),
    "Qwen/Qwen3-1.7B": _QWEN3 | _sizes(2048, 6144) | _CHAT,
    "Qwen/Qwen3-4B-Base": _QWEN3 | _4B,
    "Qwen/Qwen3-4B": _QWEN3 | _4B | _CHAT,
    "Qwen/Qwen3-14B": _QWEN3 | _14B | _CHAT | {"tie_word_embeddings": False},
    "Qwen/Qwen2.5-Math-1.5B": _QWEN2_MATH
    | _sizes(1536, 8960, num_attention_heads=12, num_key_value_heads=2, max_window_layers=21),
    "Qwen/Qwen2.5-Math-7B-Instruct": _QWEN2_MATH
    | _sizes(3584, 18944, num_attention_heads=28, num_key_value_heads=4)
    | {"eos_token_id": FIRST_SPECIAL + 2, "tie_word_embeddings": False, "vocab_size": 152064},
}
# In the order of their ids, from FIRST_SPECIAL on; the last ones are Qwen3's alone.
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
)
PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|>"
)
QWEN3_PLAIN = " <tool_response> </tool_response> <think> </think>"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Conversations in ChatML; Qwen3 opens an empty thought, Qwen2.5-Math has a system message.
TEMPLATE = """\
{%- if SYSTEM and messages[0].role != 'system' -%}
<|im_start|>system\n{{ SYSTEM }}<|im_end|>\n{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant\n{% if THINKS and enable_thinking is defined and not enable_thinking -%}
<think>\n\n</think>\n\n{% endif -%}
{%- endif -%}"""
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def write_config(name, directory):
    """The directory of the model with its real config.json alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]))
    return str(directory)


def small_id(special):
    """The id that a special token of the real models has in the small ones."""
    return special - FIRST_SPECIAL + FIRST_SMALL


def write_tiny(name, directory):
    """The directory of a random model with the real one's architecture, tokenizer and chat."""
    real = CONFIGS[name]
    described = directory.with_name(f"{directory.name} described")
    described.mkdir(parents=True)
    tokenizer = _tokenizer(real)
    widths = ("hidden_size", "intermediate_size", "head_dim")
    tiny = real | {key: real[key] // SCALE for key in widths if key in real}
    tiny["vocab_size"] = real["vocab_size"] // 256  # still more rows than tokens
    stops = {key: small_id(real[key]) for key in ("bos_token_id", "eos_token_id")}
    tiny |= {"num_hidden_layers": 2, **stops}
    eos = tokenizer.id_to_token(stops["eos_token_id"])
    told = {"bos_token": None, "eos_token": eos, "pad_token": "<|endoftext|>"}
    told |= {"chat_template": _template(real), "tokenizer_class": "Qwen2Tokenizer"}
    generation = {"eos_token_id": sorted({*stops.values()}), "do_sample": True}
    tokenizer.save(str(described / "tokenizer.json"))
    for file, content in {
        "config": tiny,
        "tokenizer_config": told,
        "generation_config": generation,
    }.items():
        (described / f"{file}.json").write_text(json.dumps(content))
    source = open_checkpoint(described, with_weights=False)
    params = init_params(source.config, jax.random.key(len(name)), jnp.float32)
    export(params, source, directory, "bfloat16")
    return str(directory)


def _template(real):
    is_qwen3 = real["model_type"] == "qwen3"
    system = "''" if is_qwen3 else json.dumps(SYSTEM)
    return TEMPLATE.replace("SYSTEM", system).replace("THINKS", str(is_qwen3).lower())


def _tokenizer(real):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    by_bytes = splits.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = splits.Sequence([splits.Split(Regex(SPLIT), "isolated"), by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    letters = splits.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=FIRST_SMALL, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([SYSTEM, *map(str, ROWS["math500"].values())], trainer)
    assert tokenizer.get_vocab_size() == FIRST_SMALL
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL.split()])
    plain = PLAIN + QWEN3_PLAIN * (real["model_type"] == "qwen3")
    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in plain.split()])
    return tokenizer


_DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    'What is $N+N$?\n\nRemember to put your answer on its own line after "Answer:".'
)
_PROBLEM = {"problem": "What is $N+N$? Please reason.", "answer": "N"}
_RUBRIC = [{"description": "Essential Criteria: Names N.", "title": "Name", "weight": 5}]
# Rows as each set publishes them, and as scripts/join_benchmarks.py joins them; N is the row's.
ROWS = {
    "dapo_math_14k_en": {"prompt": "What is $N+N$?", "solution": "N", "data_source": "math_dapo"},
    "dapo_math_17k": {
        "data_source": "math_dapo",
        "prompt": [{"content": _DAPO, "role": "user"}],
        "reward_model": {"ground_truth": "N", "style": "rule-lighteval/MATH_v2"},
    },
    "metamathqa": {
        "type": "GSM_AnsAug",
        "query": "What is N+N?",
        "original_question": "What is N+N?",
        "response": "It is N.\n#### N\nThe answer is: N",
    },
    "rar_science": {
        "question": "What has the number N?",
        "reference_answer": "N",
        "rubric": _RUBRIC,
    },
    "math500": _PROBLEM | {"solution": "N", "subject": "Algebra", "level": 1, "unique_id": "N"},
    "aime24": _PROBLEM | {"id": 60, "solution": "N", "url": "u", "year": "2024"},
    "gpqa_diamond": {
        "Question": "Which number is N?",
        "Correct Answer": "N",
        "Incorrect Answer 1": "none",
        "Incorrect Answer 2": "N00",
        "Incorrect Answer 3": "0",
    },
    "joined": {"prompt": "What is $N+N$?", "answer": "N", "benchmark": "BENCHMARK"},
}
# What the sweeps call files that their docstrings describe, with the benchmarks that these hold.
FILES = {
    "math4.jsonl": ("MATH500", "Minerva", "AMC23", "AIME24/25"),
    "math2.jsonl": ("MATH500", "GSM8K"),
    "contests.jsonl": ("AIME24", "AIME25", "HMMT25 Feb", "HMMT25 Nov"),
    "gpqa.jsonl": ("GPQA-Diamond",),
    "science2.jsonl": ("SciKnowEval", "GPQA-Diamond"),
    "chemistry_train.jsonl": ("SciKnowEval",),
    "rar_science.jsonl": ("RaR-Science",),
}
HUB = {
    "hf:open-r1/DAPO-Math-17k-Processed@en#train": "dapo_math_14k_en",
    "hf:meta-math/MetaMathQA#train[:50000]": "metamathqa",
}


def local_source(source, directory):
    """The data source with hand-written rows in place of the hub's, or of a file's."""
    if source in FILES:
        return _written(directory / source, "joined", FILES[source])
    if source in HUB:
        return _written(directory / f"{HUB[source]}.jsonl", HUB[source])
    ((name, _, _),) = presets_in(source)
    return f"{source.partition('=')[0]}={_written(directory / f'{name}.jsonl', name)}"


def _written(file, kind, benchmarks=("",)):
    numbered = [(n, name) for name in benchmarks for n in range(100, 108)]
    fill = lambda n, name: re.sub(r"\bN\b", str(n), json.dumps(ROWS[kind])).replace(
        "BENCHMARK", name
    )
    file.write_text("".join(fill(*each) + "\n" for each in numbered))
    return str(file)


def with_models(config, place):
    """The config with `place(name)` instead of each model of the hub."""

    def moved(model):
        is_hub = model.path in CONFIGS
        return dataclasses.replace(model, path=place(model.path)) if is_hub else model

    models = {role: moved(getattr(config, role)) for role in ("student", "teacher")}
    return dataclasses.replace(config, **models)
