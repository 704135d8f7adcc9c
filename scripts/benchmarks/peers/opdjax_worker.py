"""The opdjax worker: the recipe on given logits, the tiled pass, the sampler, the loop itself."""

from __future__ import annotations

import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.jax_jobs import blocked, describe_loss
from benchmarks.peers.protocol import (
    Job,
    Stepper,
    describe_completions,
    make_hidden,
    make_logits,
    prompt_ids,
    serve,
)
from opdjax import train
from opdjax.config import Config
from opdjax.config.validation import from_dict
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import sample
from opdjax.estimators import bind
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, dense_loss, tiled_loss
from opdjax.runs.metrics import MetricWriter
from opdjax.types import PromptBatch

_LOSS_TILE = 256  # tokens


def build_dense_loss(case):
    token_loss = bind("full_kl", {"divergence": case["divergence"]}).token_loss
    student, teacher = map(jnp.asarray, make_logits(case))
    columns = TokenInputs(jnp.zeros(case["tokens"], jnp.int32))
    weights = jnp.full(case["tokens"], 1 / case["tokens"])

    def mean_loss(student, teacher):
        return dense_loss(token_loss, student, weights, columns, teacher)[0]

    function = jax.jit(jax.value_and_grad(mean_loss))
    return Job(partial(blocked, function, student, teacher), describe_loss)


def build_tiled_loss(case):
    tokens = case["tokens"]
    token_loss = bind("full_kl", {"divergence": case["divergence"]}).token_loss
    arrays = (jnp.asarray(x, case["dtype"]) for x in make_hidden(case))
    hidden, head, teacher_hidden, teacher_head = arrays
    # Column t of `hidden` predicts column t + 1, so there is one column more than tokens.
    hidden, teacher_hidden = (jnp.pad(x, ((0, 1), (0, 0)))[None] for x in (hidden, teacher_hidden))
    weights = jnp.full((1, tokens + 1), 1 / tokens).at[0, 0].set(0)
    columns = TokenInputs(jnp.zeros((1, tokens + 1), jnp.int32))

    def loss(hidden, head, teacher_hidden, teacher_head):
        teacher, tile = (teacher_hidden, Head(teacher_head)), _LOSS_TILE
        return tiled_loss(token_loss, hidden, Head(head), weights, columns, teacher, tile=tile)

    function = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    def run():
        (value, _), gradients = blocked(function, hidden, head, teacher_hidden, teacher_head)
        return value, gradients

    return Job(run, describe_loss)


def build_sampler(case):
    checkpoint, batch = open_checkpoint(case["student"]), case["batch"]
    params, tokens = load_params(checkpoint, case["dtype"]), prompt_ids(case)
    numbers = np.arange(len(tokens), dtype=np.int32)
    prompts = PromptBatch(tokens, np.ones(tokens.shape, bool), numbers)
    first = jax.tree.map(lambda x: x[:batch], prompts)
    decoding = Decoding(case["new"], tuple(case["stop_ids"]), top_p=case["top_p"])
    draw = partial(sample, config=checkpoint.config, decoding=decoding, slots=batch)
    seeds = iter(range(10**6))

    def run(prompts=prompts):
        return np.asarray(draw(params, prompts, next(seeds), 0).tokens)

    def describe(tokens):
        return describe_completions([tokens[:, -case["new"] :]], case["stop_ids"])

    return Job(run, describe, warm_up=lambda: run(first))


def build_loop(case):
    """Return `opdjax.train.train` unchanged, except that its metric writer pauses each step."""

    def loop(pause):
        class PausingWriter(MetricWriter):
            def write(self, step, metrics):
                super().write(step, metrics)
                pause({"useful_tokens": int(metrics["perf/trained_tokens"])})

        train.MetricWriter = PausingWriter
        with tempfile.TemporaryDirectory() as directory:
            train.train(_loop_config(case), directory)

    return Job(Stepper(loop), lambda facts: facts)


def _loop_config(case):
    never = 10**6
    settings = {
        "student": {"path": case["student"]},
        "teacher": {"path": case["teacher"]},
        "data": {"source": case["prompts_file"], "format": "raw"},
        "sampling": {"max_completion_length": case["new"]},
        "estimator": {"recipe": "full_kl", "divergence": case["divergence"]},
        "optimizer": {"learning_rate": 1e-6, "schedule": "constant"},
        "train": {
            "num_steps": never,
            "prompts_per_step": case["step_batch"],
            "dtype": case["dtype"],
        },
        "evaluation": {"source": None},
        "checkpoint": {"every": never},
        "log": {"samples_every": 0},
        "mesh": {"data": 1},
    }
    settings["data"]["max_prompt_length"] = case["prompt"]
    return from_dict(Config, settings)


if __name__ == "__main__":
    forms = {
        "full_kl": build_dense_loss,
        "tiled_loss": build_tiled_loss,
        "sampler.sample": build_sampler,
        "train": build_loop,
    }
    serve(forms, jax=jax.__version__, device=jax.devices()[0].device_kind)
