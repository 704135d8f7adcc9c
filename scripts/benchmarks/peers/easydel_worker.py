"""The EasyDeL worker: its three divergences, compiled `generate`, and its on-policy trainer."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from importlib.metadata import version

import easydel as ed
import jax
import jax.numpy as jnp
import numpy as np
from datasets import Dataset
from easydel.trainers.distillation_trainer._fn import chunked_distillation_loss, distillation_loss
from easydel.trainers.generalized_knowledge_distillation_trainer._fn import generalized_jsd_loss
from transformers import AutoTokenizer, GenerationConfig

from benchmarks.peers.jax_jobs import blocked, describe_loss
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

_BETAS = {"reverse": 0.0, "forward": 1.0, "jsd": 0.5}  # the opposite of other libraries


def build_dense_loss(case, loss):
    student, teacher = (jnp.asarray(x)[None] for x in make_logits(case))
    function = jax.jit(jax.value_and_grad(partial(loss, case)))
    return Job(partial(blocked, function, student, teacher), describe_loss)


def _hinton(case, student, teacher):
    return distillation_loss(student, teacher, temperature=1.0, alpha=1.0)[0]


def _generalized(case, student, teacher):
    return generalized_jsd_loss(student, teacher, beta=_BETAS[case["divergence"]])


def build_chunked_loss(case):
    arrays = [jnp.asarray(x, case["dtype"]) for x in make_hidden(case)]

    def loss(hidden, head, teacher, teacher_head):
        of = lambda kernel: lambda states: states @ kernel.T
        return chunked_distillation_loss(
            hidden[None], teacher[None], of(head), of(teacher_head), temperature=1.0, alpha=1.0
        )[0]

    function = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return Job(partial(blocked, function, *arrays), describe_loss)


def _load(path, case):
    types = dict.fromkeys(("dtype", "param_dtype"), jnp.dtype(case["dtype"]))
    mesh = {"sharding_axis_dims": (1, -1, 1, 1, 1), "auto_shard_model": True}
    model = ed.AutoEasyDeLModelForCausalLM
    return model.from_pretrained(path, from_torch=True, **types, **mesh)


def build_generate(case):
    model = _load(case["student"], case)
    options = {"max_new_tokens": case["new"], "do_sample": True, "temperature": 1.0, "top_k": 0}
    options |= {"top_p": case["top_p"], "eos_token_id": case["stop_ids"], "pad_token_id": 0}
    model.generation_config = GenerationConfig(**options)
    graph, state, rest = model.split_module()

    @jax.jit
    def generate(state, rest, ids, key):
        module = model.merge_module(graph, state, rest)
        return module.generate(
            ids,
            attention_mask=jnp.ones_like(ids),
            generation_config=module.generation_config,
            prng_key=key,
        ).sequences

    ids = jnp.asarray(prompt_ids(case))
    seeds = iter(range(10**6))

    def run(count=case["prompts"]):
        drawn = []
        with model.mesh:
            for i in range(0, count, case["batch"]):
                key, part = jax.random.PRNGKey(next(seeds)), ids[i : i + case["batch"]]
                drawn.append(np.asarray(generate(state, rest, part, key)))
        return drawn

    def describe(drawn):
        return describe_completions([part[:, ids.shape[1] :] for part in drawn], case["stop_ids"])

    return Job(run, describe, warm_up=lambda: run(case["batch"]))


def build_trainer(case):
    def loop(pause):
        class PausingTrainer(ed.OnPolicyDistillationTrainer):
            def on_step_end(self, state, metrics, step):
                length = metrics.other_metrics["completion_length"]
                pause({"useful_tokens": int(length * case["step_batch"])})
                return state, metrics

        with tempfile.TemporaryDirectory() as directory:
            _trainer(case, directory, PausingTrainer).train()

    return Job(Stepper(loop), lambda facts: facts)


def _trainer(case, directory, trainer):
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
    student, teacher = _load(case["student"], case), _load(case["teacher"], case)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    generation = GenerationConfig(max_new_tokens=case["new"], do_sample=True, **ids)
    student.generation_config = generation
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in read_prompts(case)])
    return trainer(
        arguments=config,
        processing_class=tokenizer,
        student_model=student,
        teacher_model=teacher,
        train_dataset=rows,
    )


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    forms = {
        "distillation_loss": partial(build_dense_loss, loss=_hinton),
        "generalized_jsd_loss": partial(build_dense_loss, loss=_generalized),
        "chunked_distillation_loss": build_chunked_loss,
        "generate": build_generate,
        "OnPolicyDistillationTrainer": build_trainer,
    }
    serve(forms, easydel=version("easydel"), jax=jax.__version__)
