"""The TRL worker, in torch: two divergences, transformers' `generate`, the on-policy trainer."""

from __future__ import annotations

import os
import tempfile
from functools import partial

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from benchmarks.peers.protocol import (
    Job,
    Stepper,
    describe_completions,
    make_hidden,
    make_logits,
    prompt_ids,
    read_prompts,
    serve,
)

_BETAS = {"reverse": 1.0, "forward": 0.0, "jsd": 0.5}
_DEVICE = "cpu" if os.environ["BENCHMARK_DEVICE"] == "cpu" else "cuda"


def _wait():
    if _DEVICE == "cuda":
        torch.cuda.synchronize()


def _place(array, dtype):
    return torch.from_numpy(array).to(_DEVICE, getattr(torch, dtype))


def _value_and_grad(loss, leaves):
    value = loss()
    gradients = torch.autograd.grad(value, leaves)
    _wait()
    return value.detach(), gradients


def _describe_loss(result):
    return {
        "loss": float(result[0]),
        "norms": [float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in result[1]],
    }


def build_dense_loss(case):
    student, teacher = (_place(x, "float32") for x in make_logits(case))
    student.requires_grad_()

    def loss():
        beta = _BETAS[case["divergence"]]
        total = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
        return total / case["tokens"]

    return Job(partial(_value_and_grad, loss, [student]), _describe_loss)


def build_chunked_loss(case):
    arrays = make_hidden(case)
    hidden, head, teacher_hidden, teacher_head = (_place(x, case["dtype"]) for x in arrays)
    hidden.requires_grad_()
    head.requires_grad_()
    mask = torch.ones(1, case["tokens"], device=_DEVICE)

    def loss():
        return _chunked_divergence_loss(
            hidden[None], teacher_hidden[None], head, teacher_head, mask, _BETAS[case["divergence"]]
        )[0]

    return Job(partial(_value_and_grad, loss, [hidden, head]), _describe_loss)


def build_generate(case, cache):
    dtype = getattr(torch, case["dtype"])
    model = AutoModelForCausalLM.from_pretrained(case["student"], dtype=dtype).to(_DEVICE).eval()
    ids = torch.tensor(prompt_ids(case), dtype=torch.int64, device=_DEVICE)
    torch.manual_seed(0)
    options = {"max_new_tokens": case["new"], "do_sample": True, "top_k": 0, "temperature": 1.0}
    options |= {"top_p": case["top_p"], "eos_token_id": case["stop_ids"], "pad_token_id": 0}
    options["cache_implementation"] = cache
    parts = ids.split(case["batch"])

    def run(parts=parts):
        with torch.inference_mode():
            return [
                model.generate(part, attention_mask=torch.ones_like(part), **options).cpu()
                for part in parts
            ]

    def describe(drawn):
        completions = [tokens[:, ids.shape[1] :].numpy() for tokens in drawn]
        return describe_completions(completions, case["stop_ids"])

    return Job(run, describe, warm_up=lambda: run(parts[:1]))


def build_trainer(case):
    def loop(pause):
        class Pause(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                pause({"useful_tokens": case["step_batch"] * case["new"]})

        with tempfile.TemporaryDirectory() as directory:
            _trainer(case, directory, Pause()).train()

    return Job(Stepper(loop), lambda facts: facts)


def _trainer(case, directory, callback):
    config = DistillationConfig(
        output_dir=directory,
        use_cpu=_DEVICE == "cpu",
        bf16=case["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        per_device_train_batch_size=case["step_batch"],
        max_completion_length=case["new"],
        beta=_BETAS[case["divergence"]],
        learning_rate=1e-6,
        max_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in read_prompts(case)])
    return DistillationTrainer(
        case["student"], case["teacher"], args=config, train_dataset=rows, callbacks=[callback]
    )


if __name__ == "__main__":
    forms = {
        "generalized_jsd_loss": build_dense_loss,
        "_chunked_divergence_loss": build_chunked_loss,
        "generate, dynamic cache": partial(build_generate, cache=None),
        "generate, static cache": partial(build_generate, cache="static"),
        "DistillationTrainer": build_trainer,
    }
    versions = {module.__name__: module.__version__ for module in (trl, torch, transformers)}
    serve(forms, **versions)
