"""The opdjax worker: the recipe on given logits, the tiled pass, the sampler, the loop itself."""

from __future__ import annotations

import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.protocol import (
    Job,
    Stepper,
    generation,
    jax_loss,
    make_hidden,
    make_logits,
    read_prompts,
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


def dense(case):
    token_loss = bind("full_kl", {"divergence": case["divergence"]}).token_loss
    columns = TokenInputs(jnp.zeros(case["tokens"], jnp.int32))
    weights = jnp.full(case["tokens"], 1 / case["tokens"])
    loss = lambda student, teacher: dense_loss(token_loss, student, weights, columns, teacher)[0]
    return jax_loss(loss, map(jnp.asarray, make_logits(case)))


def tiled(case):
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
        return tiled_loss(token_loss, hidden, Head(head), weights, columns, teacher, tile=tile)[0]

    return jax_loss(loss, (hidden, head, teacher_hidden, teacher_head), (0, 1))


def sampler(case):
    checkpoint = open_checkpoint(case["student"])
    params, tokens = load_params(checkpoint, case["dtype"]), read_prompts(case, "ids")
    tokens, numbers = np.array(tokens, np.int32), np.arange(len(tokens), dtype=np.int32)
    prompts = PromptBatch(tokens, np.ones(tokens.shape, bool), numbers)
    decoding = Decoding(case["new"], tuple(case["stop_ids"]), top_p=case["top_p"])
    draw = partial(sample, config=checkpoint.config, decoding=decoding, slots=case["batch"])

    def generate(rows, seed):
        part = jax.tree.map(lambda x: x[rows], prompts)
        return np.asarray(draw(params, part, seed, 0).tokens)[:, -case["new"] :]

    # All prompts at once: the slot of a finished row is given to the next one.
    return generation(case, len(tokens), generate)


def loop(case):
    """Return `opdjax.train.train` unchanged, except that its metric writer pauses each step."""

    def stepping(pause):
        class PausingWriter(MetricWriter):
            def write(self, step, metrics):
                super().write(step, metrics)
                pause({"useful_tokens": int(metrics["perf/trained_tokens"])})

        train.MetricWriter = PausingWriter
        with tempfile.TemporaryDirectory() as directory:
            train.train(_loop_config(case), directory)

    return Job(Stepper(stepping))


def _loop_config(case):
    never, rows = 10**6, {"prompts_per_step": case["step_batch"], "dtype": case["dtype"]}
    data = {"source": case["prompts_file"], "format": "raw", "max_prompt_length": case["prompt"]}
    settings = {
        "student": {"path": case["student"]},
        "teacher": {"path": case["teacher"]},
        "data": data,
        "sampling": {"max_completion_length": case["new"]},
        "estimator": {"recipe": "full_kl", "divergence": case["divergence"]},
        "optimizer": {"learning_rate": 1e-6, "schedule": "constant"},
        "train": {"num_steps": never} | rows,
        "evaluation": {"source": None},
        "checkpoint": {"every": never},
        "log": {"samples_every": 0},
        "mesh": {"data": 1},
    }
    return from_dict(Config, settings)


if __name__ == "__main__":
    forms = {"full_kl": dense, "tiled_loss": tiled, "sampler.sample": sampler, "train": loop}
    serve(forms, jax=jax.__version__, device=jax.devices()[0].device_kind)
