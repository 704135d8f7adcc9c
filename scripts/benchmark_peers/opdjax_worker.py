"""The opdjax worker: the recipe on given logits, the tiled pass, the sampler, the loop itself."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmark_peers.inputs import (
    count_until_stop,
    describe_lengths,
    make_hidden,
    make_logits,
    make_matrices,
    read_prompts,
)
from benchmark_peers.protocol import Job, Stepper, serve
from opdjax import train
from opdjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import sample
from opdjax.estimators import bind
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, dense_loss, tiled_loss
from opdjax.runs.metrics import MetricWriter
from opdjax.types import PromptBatch

_LOSS_TILE = 256  # tokens


def _describe_loss(result):
    loss, gradients = result
    return {
        "loss": float(loss),
        "norms": [
            float(jnp.linalg.norm(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients)
        ],
    }


def build_product(case):
    one, other = map(jnp.asarray, make_matrices(case["matmul"]))
    one, other = one.astype(case["dtype"]), other.astype(case["dtype"])
    return Job(
        partial(_blocked, jax.jit(jnp.matmul), one, other),
        lambda _: {"bytes_per_second": _copy_rate()},
    )


def _copy_rate():
    """Return bytes a second, read plus written, of scaling an array too large for the caches."""
    touch, x = jax.jit(lambda x: x * 1.5, donate_argnums=0), jnp.ones(2**27)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        x = jax.block_until_ready(touch(x))
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def _blocked(function, *arguments):
    return jax.block_until_ready(function(*arguments))


def build_dense_loss(case):
    token_loss = bind("full_kl", {"divergence": case["divergence"]}).token_loss
    student, teacher = map(jnp.asarray, make_logits(case["tokens"], case["vocab"]))
    columns = TokenInputs(jnp.zeros(case["tokens"], jnp.int32))
    weights = jnp.full(case["tokens"], 1 / case["tokens"])

    def mean_loss(student, teacher):
        return dense_loss(token_loss, student, weights, columns, teacher)[0]

    return Job(
        partial(_blocked, jax.jit(jax.value_and_grad(mean_loss)), student, teacher), _describe_loss
    )


def build_tiled_loss(case):
    tokens = case["tokens"]
    token_loss = bind("full_kl", {"divergence": case["divergence"]}).token_loss
    arrays = (
        jnp.asarray(x, case["dtype"]) for x in make_hidden(tokens, case["vocab"], case["width"])
    )
    hidden, head, teacher_hidden, teacher_head = arrays
    # Column t of `hidden` predicts column t + 1, so there is one column more than tokens.
    hidden, teacher_hidden = (jnp.pad(x, ((0, 1), (0, 0)))[None] for x in (hidden, teacher_hidden))
    weights = jnp.full((1, tokens + 1), 1 / tokens).at[0, 0].set(0)
    columns = TokenInputs(jnp.zeros((1, tokens + 1), jnp.int32))

    def loss(hidden, head, teacher_hidden, teacher_head):
        return tiled_loss(
            token_loss,
            hidden,
            Head(head),
            weights,
            columns,
            (teacher_hidden, Head(teacher_head)),
            tile=_LOSS_TILE,
        )

    function = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    def run():
        (value, _), gradients = _blocked(function, hidden, head, teacher_hidden, teacher_head)
        return value, gradients

    return Job(run, _describe_loss)


def build_sampler(case):
    checkpoint = open_checkpoint(case["student"])
    params = load_params(checkpoint, case["dtype"])
    rows, batch = read_prompts(case["student"]), case["batch"]
    count = case["prompts"]
    tokens = np.array([row["ids"] for row in rows[:count]], np.int32)
    prompts = PromptBatch(tokens, np.ones(tokens.shape, bool), np.arange(count, dtype=np.int32))
    decoding = Decoding(case["new"], tuple(case["stop_ids"]), top_p=case["top_p"])
    has_slots = "slots" in inspect.signature(sample).parameters and count > batch
    draw = partial(
        sample,
        config=checkpoint.config,
        decoding=decoding,
        **({"slots": batch} if has_slots else {}),
    )
    parts = (
        [prompts]
        if has_slots
        else [
            jax.tree.map(lambda x, i=i: x[i : i + batch], prompts) for i in range(0, count, batch)
        ]
    )
    seeds = iter(range(10**6))

    def run(parts=parts):
        seed = next(seeds)
        return [
            np.asarray(jax.block_until_ready(draw(params, part, seed, 0)).tokens) for part in parts
        ]

    def describe(drawn):
        completions = np.concatenate([tokens[:, -case["new"] :] for tokens in drawn])
        return describe_lengths(count_until_stop(completions, case["stop_ids"])) | {
            "slots": has_slots
        }

    return Job(run, describe, warm_up=lambda: run(parts[:1]))


def build_loop(case):
    """Return `opdjax.train.train` unchanged, except that its metric writer pauses each step."""

    def loop(pause):
        class PausingWriter(MetricWriter):
            def write(self, step, metrics):
                super().write(step, metrics)
                pause(
                    {
                        "loss": metrics["loss/objective"],
                        "useful_tokens": int(metrics["perf/trained_tokens"]),
                    }
                )

        train.MetricWriter = PausingWriter
        with tempfile.TemporaryDirectory() as directory:
            train.train(_loop_config(case), directory)

    return Job(Stepper(loop), lambda facts: facts)


def _loop_config(case):
    never = 10**6
    return Config(
        student=ModelConfig(case["student"]),
        teacher=ModelConfig(case["teacher"]),
        data=DataConfig(
            source=case["prompts_file"], format="raw", max_prompt_length=case["prompt"]
        ),
        sampling=SamplingConfig(max_completion_length=case["new"]),
        estimator=EstimatorConfig(recipe="full_kl", divergence=case["divergence"]),
        optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant"),
        train=TrainConfig(
            num_steps=never, prompts_per_step=case["step_batch"], dtype=case["dtype"]
        ),
        evaluation=EvaluationConfig(source=None),
        checkpoint=CheckpointConfig(every=never),
        log=dataclasses.replace(LogConfig(), samples_every=0),
        mesh=MeshConfig(data=1),
    )


if __name__ == "__main__":
    forms = {
        "product": build_product,
        "full_kl": build_dense_loss,
        "tiled_loss": build_tiled_loss,
        "sampler.sample": build_sampler,
        "train": build_loop,
    }
    serve(forms, {"jax": jax.__version__})
