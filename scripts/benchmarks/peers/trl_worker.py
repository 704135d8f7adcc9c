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
    generation,
    make_hidden,
    make_logits,
    read_prompts,
    serve,
)

_BETAS = {"reverse": 1.0, "forward": 0.0, "jsd": 0.5}
_DEVICE = "cpu" if os.environ["BENCHMARK_DEVICE"] == "cpu" else "cuda"


def _place(arrays, dtype):
    return [torch.from_numpy(array).to(_DEVICE, getattr(torch, dtype)) for array in arrays]


def _loss_job(loss, leaves):
    for leaf in leaves:
        leaf.requires_grad_()

    def run():
        value = loss()
        gradients = torch.autograd.grad(value, leaves)
        if _DEVICE == "cuda":
            torch.cuda.synchronize()
        return value.detach(), gradients

    def describe(result):
        norms = [float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in result[1]]
        return {"loss": float(result[0]), "norms": norms}

    return Job(run, describe)


def dense_loss(case):
    (student, teacher), beta = _place(make_logits(case), "float32"), _BETAS[case["divergence"]]
    total = partial(GKDTrainer.generalized_jsd_loss, student, teacher, beta=beta, reduction="sum")
    return _loss_job(lambda: total() / case["tokens"], [student])


def chunked_loss(case):
    hidden, head, teacher, teacher_head = _place(make_hidden(case), case["dtype"])
    mask, beta = torch.ones(1, case["tokens"], device=_DEVICE), _BETAS[case["divergence"]]
    arguments = head, teacher_head, mask, beta
    loss = lambda: _chunked_divergence_loss(hidden[None], teacher[None], *arguments)[0]
    return _loss_job(loss, [hidden, head])


def generate(case, cache):
    dtype = getattr(torch, case["dtype"])
    model = AutoModelForCausalLM.from_pretrained(case["student"], dtype=dtype).to(_DEVICE).eval()
    ids = torch.tensor(read_prompts(case, "ids"), dtype=torch.int64, device=_DEVICE)
    options = {"max_new_tokens": case["new"], "do_sample": True, "top_k": 0, "temperature": 1.0}
    options |= {"top_p": case["top_p"], "eos_token_id": case["stop_ids"], "pad_token_id": 0}
    options["cache_implementation"] = cache

    def drawn(rows, seed):
        torch.manual_seed(seed)
        with torch.inference_mode():
            part = ids[rows]
            found = model.generate(part, attention_mask=torch.ones_like(part), **options)
        return found.cpu()[:, ids.shape[1] :].numpy()

    return generation(case, case["batch"], drawn)


def trainer(case):
    def loop(pause):
        class Pause(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                pause({"useful_tokens": case["step_batch"] * case["new"]})

        models, rows = (case["student"], case["teacher"]), {"prompt": read_prompts(case)}
        with tempfile.TemporaryDirectory() as directory:
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
            given = {"train_dataset": Dataset.from_dict(rows), "callbacks": [Pause()]}
            DistillationTrainer(*models, args=config, **given).train()

    return Job(Stepper(loop))


if __name__ == "__main__":
    forms = {
        "generalized_jsd_loss": dense_loss,
        "_chunked_divergence_loss": chunked_loss,
        "generate, dynamic cache": partial(generate, cache=None),
        "generate, static cache": partial(generate, cache="static"),
        "DistillationTrainer": trainer,
    }
    serve(forms, **{module.__name__: module.__version__ for module in (trl, torch, transformers)})
