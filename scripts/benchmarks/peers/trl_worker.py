"""The TRL worker, in torch: the forward KL, transformers' `generate`, the on-policy trainer."""

from __future__ import annotations

import tempfile
from functools import partial

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDTrainer

from benchmarks.peers import protocol


def dense_loss(case):
    student, teacher = map(torch.from_numpy, protocol.make_logits(case))
    student.requires_grad_()
    loss = partial(GKDTrainer.generalized_jsd_loss, student, teacher, beta=0.0, reduction="sum")

    def run():
        value = loss() / case["tokens"]
        return value.detach(), *torch.autograd.grad(value, [student])

    def describe(result):
        norm = torch.linalg.vector_norm(result[1], dtype=torch.float64)
        return {"loss": float(result[0]), "gradient norm": float(norm)}

    return protocol.Job(run, describe)


def generate(case, cache):
    model = AutoModelForCausalLM.from_pretrained(case["student"], dtype=case["dtype"]).eval()
    ids = torch.tensor(protocol.read_prompts(case, "ids"), dtype=torch.int64)
    options = {"max_new_tokens": case["new"], "do_sample": True, "top_k": 0, "temperature": 1.0}
    options |= {"top_p": case["top_p"], "eos_token_id": case["stop_ids"], "pad_token_id": 0}
    options["cache_implementation"] = cache

    def drawn(seed):
        torch.manual_seed(seed)
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return found[:, ids.shape[1] :].numpy()

    return protocol.generation(drawn)


def trainer(case):
    def loop(pause):
        class Pause(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                pause({"useful_tokens": case["step_batch"] * case["new"]})

        models, rows = (case["student"], case["teacher"]), {"prompt": protocol.read_prompts(case)}
        with tempfile.TemporaryDirectory() as directory:
            config = DistillationConfig(
                output_dir=directory,
                use_cpu=True,
                bf16=case["dtype"] == "bfloat16",
                gradient_checkpointing=False,
                per_device_train_batch_size=case["step_batch"],
                max_completion_length=case["new"],
                beta=1.0,  # reverse KL
                learning_rate=1e-6,
                max_steps=10**6,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            given = {"train_dataset": Dataset.from_dict(rows), "callbacks": [Pause()]}
            DistillationTrainer(*models, args=config, **given).train()

    return protocol.Job(protocol.Stepper(loop))


if __name__ == "__main__":
    forms = {
        "generalized_jsd_loss": dense_loss,
        "generate, dynamic cache": partial(generate, cache=None),
        "generate, static cache": partial(generate, cache="static"),
        "DistillationTrainer": trainer,
    }
    protocol.serve(
        forms, **{module.__name__: module.__version__ for module in (trl, torch, transformers)}
    )
