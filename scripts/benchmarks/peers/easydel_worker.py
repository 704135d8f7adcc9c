"""The EasyDeL worker: its forward KL, compiled `generate`, and its on-policy trainer."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version

import easydel as ed
import jax
import jax.numpy as jnp
import numpy as np
from datasets import Dataset
from easydel.trainers.distillation_trainer._fn import distillation_loss
from transformers import AutoTokenizer, GenerationConfig

from benchmarks.peers import protocol


def hinton_loss(case):
    loss = lambda *logits: distillation_loss(*logits, temperature=1.0, alpha=1.0)[0]
    return protocol.jax_loss(loss, (x[None] for x in protocol.make_logits(case)))


def _load(path):
    types = dict.fromkeys(("dtype", "param_dtype"), jnp.dtype("float32"))
    mesh = {"sharding_axis_dims": (1, -1, 1, 1, 1), "auto_shard_model": True}
    model = ed.AutoEasyDeLModelForCausalLM
    return model.from_pretrained(path, from_torch=True, **types, **mesh)


def generate(case):
    model = _load(case["student"])
    options = {"max_new_tokens": case["new"], "do_sample": True, "temperature": 1.0, "top_k": 0}
    options |= {"top_p": case["top_p"], "eos_token_id": case["stop_ids"], "pad_token_id": 0}
    model.generation_config = GenerationConfig(**options)
    graph, state, rest = model.split_module()

    @jax.jit
    def compiled(state, rest, ids, key):
        module = model.merge_module(graph, state, rest)
        options = {"generation_config": module.generation_config, "prng_key": key}
        return module.generate(ids, attention_mask=jnp.ones_like(ids), **options).sequences

    ids = jnp.asarray(protocol.read_prompts(case, "ids"), jnp.int32)

    def drawn(seed):
        with model.mesh:
            found = compiled(state, rest, ids, jax.random.PRNGKey(seed))
        return np.asarray(found)[:, ids.shape[1] :]

    return protocol.generation(drawn)


def trainer(case):
    def loop(pause):
        class PausingTrainer(ed.OnPolicyDistillationTrainer):
            def on_step_end(self, state, metrics, step):
                length = metrics.other_metrics["completion_length"]
                pause({"useful_tokens": int(length * case["step_batch"])})
                return state, metrics

        with tempfile.TemporaryDirectory() as directory:
            PausingTrainer(**_trainer_arguments(case, directory)).train()

    return protocol.Job(protocol.Stepper(loop))


def _trainer_arguments(case, directory):
    config = ed.OnPolicyDistillationConfig(
        save_directory=directory,
        total_batch_size=case["step_batch"],
        max_prompt_length=case["prompt"],
        max_completion_length=case["new"],
        temperature_sampling=1.0,
        top_p=1.0,
        top_k=None,
        temperature=1.0,
        alpha=1.0,
        learning_rate=1e-6,
        num_train_epochs=1,
        skip_apply_chat_template=True,
        use_esurge_generation=False,
        use_wandb=False,
        report_steps=10,
        log_steps=10,
        do_last_save=False,
        save_optimizer_state=False,
        weight_distribution_log_steps=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(case["student"])
    student, teacher = _load(case["student"]), _load(case["teacher"])
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    options = GenerationConfig(max_new_tokens=case["new"], do_sample=True, **ids)
    student.generation_config = options
    return {
        "arguments": config,
        "processing_class": tokenizer,
        "student_model": student,
        "teacher_model": teacher,
        "train_dataset": Dataset.from_dict({"prompt": protocol.read_prompts(case)}),
    }


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    forms = {"distillation_loss": hinton_loss, "generate": generate}
    forms |= {"OnPolicyDistillationTrainer": trainer}
    protocol.serve(forms, easydel=version("easydel"), jax=jax.__version__)
