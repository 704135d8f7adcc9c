"""What is compared: sizes, cases, the functions that do each case, and its inputs."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks.models import EOS, MODELS, PAD, decoder_of, write_model
from opdjax.data.tasks.instructions import instructions
from opdjax.data.tokenizer import load_tokenizer
from opdjax.models.decoder import init_params

FIRST_WORD = 2
NEVER_SAMPLED = "<file_sep>"  # a token of SmolLM2 that no chat has
NUM_PROMPTS = 4096
SIZES = {
    "tokens": 256,  # of the loss
    "vocab": 151_936,  # of the loss
    "step_batch": 8,
    "batch": 16,  # rows generated at a time
    "prompt": 32,
    "new": 128,  # tokens of a completion: no model ever samples a stop token
}
TINY = SIZES | {"tokens": 16, "vocab": 500, "step_batch": 2, "batch": 2, "new": 8}


class Form(NamedTuple):
    """One way to do the work of a kind of case."""

    system: str
    name: str
    remark: str = ""


FORMS = {  # opdjax's comes first
    "loss": (
        Form("opdjax", "full_kl"),
        Form("trl", "generalized_jsd_loss"),
        Form("easydel", "distillation_loss"),
        Form("tunix", "LogitStrategy.compute_loss", "also two cross-entropies of weight 0"),
    ),
    "generate": (
        Form("opdjax", "sampler.sample"),
        Form("trl", "generate, dynamic cache", "transformers"),
        Form("trl", "generate, static cache", "transformers"),
        Form("tunix", "Sampler"),
        Form("easydel", "generate", "compiled"),
    ),
    "step": (
        Form("opdjax", "train"),
        Form("trl", "DistillationTrainer", "gradient checkpointing off"),
        Form("easydel", "OnPolicyDistillationTrainer", "forward KL, the only one it has"),
    ),
}


def cases_of(kind: str, sizes: dict[str, Any], inputs: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the cases of one kind, each with a title for the table and all that a worker needs."""
    shared = {"stop_ids": [EOS], "dtype": "float32", "student_shape": MODELS["3.4M"]}
    shared |= sizes | inputs | {"kind": kind}
    name = "" if shared["dtype"] == "float32" else f", {shared['dtype']}"
    if kind == "loss":
        title = f"forward KL from logits [{sizes['tokens']}, {sizes['vocab']}]"
        yield shared | {"title": title}
    elif kind == "generate":
        for top_p in (1.0, 0.95):
            title = f"generation, {sizes['batch']} x {sizes['new']} tokens, top-p {top_p}{name}"
            yield shared | {"title": title, "top_p": top_p, "prompts": sizes["batch"]}
    else:
        title = f"on-policy step, {sizes['step_batch']} x {sizes['new']} tokens{name}"
        yield shared | {"title": title, "prompts": NUM_PROMPTS}


def write_inputs(root: pathlib.Path) -> dict[str, str]:
    """Return the paths of student, teacher and prompts, which are written if absent."""
    file = root / "prompts.jsonl"
    paths = {"student": root / "student", "teacher": root / "teacher", "prompts_file": file}
    if not file.exists():
        for seed, (name, size) in enumerate((("student", "3.4M"), ("teacher", "5M"))):
            write_random_model(MODELS[size], seed, paths[name])
        vocab = MODELS["3.4M"]["vocab_size"]
        ids = np.random.default_rng(2).integers(FIRST_WORD, vocab, (NUM_PROMPTS, SIZES["prompt"]))
        rows = [{"prompt": " ".join(f"w{i}" for i in row), "ids": row} for row in ids.tolist()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(path) for name, path in paths.items()}


def pretrained_inputs(
    root: pathlib.Path, student: pathlib.Path, teacher: pathlib.Path, length: int
) -> dict[str, Any]:
    """Return the inputs of a pretrained pair: prompts of `length` ids, cut out of the built-in
    instructions, and copies of the models, whose stop token is one that they do not sample.
    """
    tokenizer = load_tokenizer(student)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    if (stop := tokenizer.get_vocab().get(NEVER_SAMPLED)) is None:
        raise ValueError(f"{student}: expected a token {NEVER_SAMPLED} in its vocabulary")
    ids = encode(" ".join(instructions("train")))
    cuts = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    rows = [{"prompt": tokenizer.decode(cut), "ids": cut} for cut in cuts]
    shutil.rmtree(root, ignore_errors=True)
    fields = {
        "config.json": {"eos_token_id": stop},
        "generation_config.json": {"eos_token_id": stop},
    }
    fields["tokenizer_config.json"] = {"eos_token": NEVER_SAMPLED}
    for name, source in (("student", student), ("teacher", teacher)):
        shutil.copytree(source, root / name)
        for file, values in fields.items():
            content = json.loads((source / file).read_text()) | values
            (root / name / file).write_text(json.dumps(content))
    file = root / "prompts.jsonl"
    kept = [json.dumps(row) + "\n" for row in rows if encode(row["prompt"]) == row["ids"]]
    file.write_text("".join(kept))
    paths = {"student": root / "student", "teacher": root / "teacher", "prompts_file": file}
    return {name: str(path) for name, path in paths.items()} | {"stop_ids": [stop]}


def write_random_model(raw: dict[str, Any], seed: int, out: pathlib.Path) -> None:
    """Write a random model that never samples PAD or EOS, so that completions have full length.

    Component 0 of the residual stream is a positive constant that no layer writes to, and it gives
    these two tokens a very low logit.
    """
    params = jax.tree.map(np.array, init_params(decoder_of(raw), jax.random.key(seed)))
    params["embedding"][:, 0], params["embedding"][[PAD, EOS], 0] = 0.1, -60
    params["final_norm"][0] = 30
    for name in ("o_kernel", "down_kernel"):
        params["layers"][name][:, 0] = 0
    words = {"<pad>": PAD, "<eos>": EOS}
    words |= {f"w{i}": i for i in range(FIRST_WORD, raw["vocab_size"])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    # Older releases of transformers read the field of the top level.
    write_model(params, raw | {"rope_theta": 1e4}, fast, out)
