"""What is compared: sizes, cases, the functions that do each case, and its inputs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks.models import EOS, MODELS, PAD, decoder_of, write_model
from opdjax.models.decoder import init_params

FIRST_WORD = 2
NUM_PROMPTS = 4096


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all cases; the defaults are those for a CPU."""

    dtype: str = "float32"  # of models and hidden states; logits are float32
    loss_tokens: tuple[int, ...] = (256,)
    vocab: int = 151_936  # of the losses
    width: int = 256  # of the losses' hidden states
    student: str = "3.4M"
    teacher: str = "5M"
    step_batch: int = 8
    batch: int = 16  # rows generated at a time: the slots
    prompt: int = 32
    new: int = 128  # the most tokens of a completion
    tail_prompts: int = 128  # prompts of the case with a long tail
    tail_share: float = 1 / 25  # the share of the vocabulary that stops its completions


SIZES = {
    "cpu": Sizes(),
    "gpu": Sizes(
        dtype="bfloat16",
        loss_tokens=(2048, 8192),
        width=2048,
        student="1.7B",
        teacher="4B",
        step_batch=16,
        batch=64,
        prompt=256,
        new=512,
        tail_prompts=512,
        tail_share=1 / 110,
    ),
    "tiny": Sizes(
        loss_tokens=(16,), vocab=500, step_batch=2, batch=2, new=8, tail_prompts=6, tail_share=1 / 4
    ),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to do the work of a kind of case."""

    system: str
    name: str
    divergences: tuple[str, ...] = ("reverse", "forward", "jsd")  # those it computes
    remark: str = ""


FORWARD = ("forward",)
TWO_MORE = "also computes two cross-entropies of weight 0"
FORMS = {  # opdjax's comes first
    "logits": (
        Form("opdjax", "full_kl"),
        Form("trl", "generalized_jsd_loss"),
        Form("easydel", "distillation_loss", FORWARD),
        Form("easydel", "generalized_jsd_loss"),
        Form("tunix", "LogitStrategy.compute_loss", FORWARD, TWO_MORE),
    ),
    "hidden states": (
        Form("opdjax", "tiled_loss"),
        Form("trl", "_chunked_divergence_loss", remark="also computes the student's entropy"),
        Form("easydel", "chunked_distillation_loss", FORWARD),
    ),
    "generate": (
        Form("opdjax", "sampler.sample"),
        Form("trl", "generate, dynamic cache", remark="transformers"),
        Form("trl", "generate, static cache", remark="transformers"),
        Form("tunix", "Sampler"),
        Form("easydel", "generate", remark="compiled"),
    ),
    "step": (
        Form("opdjax", "train"),
        Form("trl", "DistillationTrainer", remark="gradient checkpointing off"),
        Form("easydel", "OnPolicyDistillationTrainer", remark="forward KL, the only one it has"),
    ),
}
PARTS = ("losses", "generation", "step")  # last the step, whose trainers keep their threads


def cases_of(part: str, sizes: Sizes, inputs: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the cases of one part, each with a title for the table and all that a worker needs."""
    shape, shared = MODELS[sizes.student], dataclasses.asdict(sizes) | inputs
    shared |= {"student_shape": shape, "stop_ids": [EOS]}
    if part == "losses":
        two = ("reverse", "forward")
        kinds = (("logits", sizes.vocab, (*two, "jsd")), ("hidden states", sizes.width, two))
        for kind, width, names in kinds:
            for tokens, name in itertools.product(sizes.loss_tokens, names):
                title = f"{name} KL from {kind} [{tokens}, {width}]"
                fields = {"tokens": tokens, "divergence": name}
                yield shared | {"kind": kind, "title": title} | fields
    elif part == "generation":
        for top_p in (1.0, 0.95):
            title = f"generation, {sizes.batch} x {sizes.new} tokens, top-p {top_p}"
            fields = {"top_p": top_p, "prompts": sizes.batch}
            yield shared | {"kind": "generate", "title": title} | fields
        # Lengths are geometric: these ids end a completion.
        words = np.arange(FIRST_WORD, shape["vocab_size"])
        count = max(round(sizes.tail_share * shape["vocab_size"]), 1)
        stops = np.random.default_rng(3).choice(words, count, replace=False)
        title = f"generation with a long tail, {sizes.tail_prompts} prompts by {sizes.batch}"
        fields = {"top_p": 1.0, "prompts": sizes.tail_prompts, "stop_ids": sorted(stops.tolist())}
        yield shared | {"kind": "generate", "title": title} | fields
    else:
        title = f"on-policy step, {sizes.step_batch} x {sizes.new} tokens"
        fields = {"divergence": "reverse", "prompts": NUM_PROMPTS}
        yield shared | {"kind": "step", "title": title} | fields


def write_inputs(root: pathlib.Path, sizes: Sizes) -> dict[str, str]:
    """Return the paths of student, teacher and prompts, which are written if absent."""
    file = root / "prompts.jsonl"
    paths = {"student": root / "student", "teacher": root / "teacher", "prompts_file": file}
    if not file.exists():
        for seed, name in enumerate(("student", "teacher")):
            write_random_model(MODELS[getattr(sizes, name)], seed, sizes.dtype, paths[name])
        vocab = MODELS[sizes.student]["vocab_size"]
        ids = np.random.default_rng(2).integers(FIRST_WORD, vocab, (NUM_PROMPTS, sizes.prompt))
        rows = [{"prompt": " ".join(f"w{i}" for i in row), "ids": row} for row in ids.tolist()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(path) for name, path in paths.items()}


def write_random_model(raw: dict[str, Any], seed: int, dtype: str, out: pathlib.Path) -> None:
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
    write_model(params, raw | {"rope_theta": 1e4}, fast, out, dtype)
