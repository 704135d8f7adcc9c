"""What is compared: sizes, cases, the functions that do each case, and the least work it needs."""

from __future__ import annotations

import dataclasses
from typing import Any

DIVERGENCES = ("reverse", "forward", "jsd")


@dataclasses.dataclass(frozen=True)
class Model:
    """Shapes of a Qwen3 decoder with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    mlp: int
    vocab: int

    def forward_flops(self, tokens: int, contexts: int, predictions: int) -> float:
        """Return the FLOPs of a forward pass of `tokens` tokens.

        They attend to `contexts` columns in total; `predictions` of them go through the head.
        """
        projections = (
            self.hidden * self.head * (2 * self.heads + 2 * self.kv_heads)
            + 3 * self.hidden * self.mlp
        )
        layers = self.layers * (2 * projections * tokens + 4 * self.heads * self.head * contexts)
        return layers + 2 * self.hidden * self.vocab * predictions


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all cases on one kind of device."""

    dtype: str  # of models and hidden states; logits are float32
    matmul: int  # rows and columns of the matrices whose product measures FLOPs a second
    loss_tokens: tuple[int, ...]
    vocab: int  # of the losses
    width: int  # of the losses' hidden states
    student: Model
    teacher: Model
    step_batch: int
    batch: int  # rows generated at a time: the slots
    prompt: int
    new: int  # the most tokens of a completion
    tail_prompts: int  # prompts of the case with a long tail
    tail_share: float  # the share of the vocabulary that stops its completions


SIZES = {
    "cpu": Sizes(
        dtype="float32",
        matmul=3072,
        loss_tokens=(256,),
        vocab=151_936,
        width=256,
        student=Model(256, 4, 8, 4, 32, 768, 4096),
        teacher=Model(256, 6, 8, 4, 32, 768, 4096),
        step_batch=8,
        batch=16,
        prompt=32,
        new=128,
        tail_prompts=128,
        tail_share=1 / 25,
    ),
    "gpu": Sizes(
        dtype="bfloat16",
        matmul=8192,
        loss_tokens=(2048, 8192),
        vocab=151_936,
        width=2048,
        student=Model(2048, 28, 16, 8, 128, 6144, 151_936),
        teacher=Model(2560, 36, 32, 8, 128, 9728, 151_936),
        step_batch=16,
        batch=64,
        prompt=256,
        new=512,
        tail_prompts=512,
        tail_share=1 / 110,
    ),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to do the work of a kind of case."""

    system: str
    name: str
    divergences: tuple[str, ...] = DIVERGENCES  # those it computes
    remark: str = ""


_GENERATION = (
    Form("opdjax", "sampler.sample"),
    Form("trl", "generate, dynamic cache", remark="transformers"),
    Form("trl", "generate, static cache", remark="transformers"),
    Form("tunix", "Sampler"),
    Form("easydel", "generate", remark="compiled"),
)
FORMS = {
    "matmul": (
        Form("opdjax", "product"),
        Form("trl", "product"),
        Form("tunix", "product"),
        Form("easydel", "product"),
    ),
    "logits": (
        Form("opdjax", "full_kl"),
        Form("trl", "generalized_jsd_loss"),
        Form("easydel", "distillation_loss", ("forward",)),
        Form("easydel", "generalized_jsd_loss"),
        Form(
            "tunix",
            "LogitStrategy.compute_loss",
            ("forward",),
            "also computes two cross-entropies of weight 0",
        ),
    ),
    "hidden": (
        Form("opdjax", "tiled_loss"),
        Form("trl", "_chunked_divergence_loss", remark="also computes the student's entropy"),
        Form("easydel", "chunked_distillation_loss", ("forward",)),
    ),
    "generate": _GENERATION,
    "tail": _GENERATION,
    "step": (
        Form("opdjax", "train"),
        Form("trl", "DistillationTrainer", remark="gradient checkpointing off"),
        Form("easydel", "OnPolicyDistillationTrainer", remark="forward KL, the only one it has"),
    ),
}


def cases_of(part: str, device: str) -> list[dict[str, Any]]:
    """Return the cases of one part, each with a title for the table."""
    sizes = SIZES[device]
    if part == "floor":
        return [{"kind": "matmul", "title": f"product of two {sizes.matmul}² matrices"}]
    if part == "a":
        cases = []
        for tokens in sizes.loss_tokens:
            logits = f"{{}} KL from logits [{tokens}, {sizes.vocab}]"
            hidden = f"{{}} KL from hidden states [{tokens}, {sizes.width}]"
            named = {"kind": "logits", "tokens": tokens}
            cases += [
                named | {"divergence": name, "title": logits.format(name)} for name in DIVERGENCES
            ]
            named = {"kind": "hidden", "tokens": tokens}
            cases += [
                named | {"divergence": name, "title": hidden.format(name)}
                for name in ("reverse", "forward")
            ]
        return cases
    if part == "b":
        return [
            {
                "kind": "step",
                "divergence": "reverse",
                "title": f"on-policy step, {sizes.step_batch} x {sizes.new} tokens",
            }
        ]
    generated = f"generation, {sizes.batch} x {sizes.new} tokens, top-p {{}}"
    prompts = f"{sizes.tail_prompts} prompts in batches or slots of {sizes.batch}"
    tail = f"generation with a long tail, {prompts}"
    cases = [
        {"kind": "generate", "top_p": top_p, "title": generated.format(top_p)}
        for top_p in (1.0, 0.95)
    ]
    return [*cases, {"kind": "tail", "top_p": 1.0, "title": tail}]


def least_work(case: dict[str, Any], device: str, useful_tokens: float) -> tuple[float, float]:
    """Return (FLOPs of the matrix products, bytes to read and write) of a case.

    Bytes are counted for the losses from logits only, which have no product: they read two arrays
    and write one.
    """
    sizes, kind = SIZES[device], case["kind"]
    if kind == "matmul":
        return 2.0 * sizes.matmul**3, 0.0
    if kind == "logits":
        return 0.0, 3.0 * 4 * case["tokens"] * sizes.vocab
    if kind == "hidden":  # logits of both sides, gradients of the student's states and head
        return 4 * 2.0 * case["tokens"] * sizes.vocab * sizes.width, 0.0
    rows = sizes.step_batch if kind == "step" else useful_tokens / sizes.new
    contexts = rows * (sizes.prompt + sizes.new) ** 2 / 2
    tokens, predictions = rows * (sizes.prompt + sizes.new), rows * sizes.new
    if kind == "tail":  # a context is the prompt and, on average, half of the mean length
        tokens, predictions = useful_tokens + sizes.tail_prompts * sizes.prompt, useful_tokens
        contexts = tokens * (sizes.prompt + useful_tokens / sizes.tail_prompts) / 2
    generation = sizes.student.forward_flops(tokens, contexts, predictions)
    if kind != "step":
        return generation, 0.0
    teacher = sizes.teacher.forward_flops(tokens, contexts, predictions)
    return 4 * generation + teacher, 0.0
