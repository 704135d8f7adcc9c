"""The opdjax worker: the recipe on given logits, the tiled pass, the sampler, the loop itself."""

from __future__ import annotations

import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import protocol
from opdjax import train
from opdjax.config import Config
from opdjax.config.validation import from_dict
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import sample
from opdjax.estimators import bind
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.vocab import TokenInputs, dense_loss
from opdjax.runs.metrics import MetricWriter
from opdjax.types import PromptBatch


def dense(case):
    token_loss = bind("full_kl", {"divergence": "forward"}).token_loss
    columns = TokenInputs(jnp.zeros(case["tokens"], jnp.int32))
    weights = jnp.full(case["tokens"], 1 / case["tokens"])
    loss = lambda student, teacher: dense_loss(token_loss, student, weights, columns, teacher)[0]
    return protocol.jax_loss(loss, protocol.make_logits(case))


def sampler(case):
    checkpoint = open_checkpoint(case["student"])
    params, tokens = load_params(checkpoint, case["dtype"]), protocol.read_prompts(case, "ids")
    tokens, numbers = np.array(tokens, np.int32), np.arange(len(tokens), dtype=np.int32)
    prompts = PromptBatch(tokens, np.ones(tokens.shape, bool), numbers)
    decoding = Decoding(case["new"], tuple(case["stop_ids"]), top_p=case["top_p"])
    draw = partial(sample, params, prompts, config=checkpoint.config, decoding=decoding)
    return protocol.generation(lambda seed: np.asarray(draw(seed, 0).tokens)[:, -case["new"] :])


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

    return protocol.Job(protocol.Stepper(stepping))


def _loop_config(case):
    never, rows = 10**6, {"prompts_per_step": case["step_batch"], "dtype": case["dtype"]}
    data = {"source": case["prompts_file"], "format": "raw", "max_prompt_length": case["prompt"]}
    settings = {
        "student": {"path": case["student"]},
        "teacher": {"path": case["teacher"]},
        "data": data,
        "sampling": {"max_completion_length": case["new"]},
        "estimator": {"recipe": "full_kl", "divergence": "reverse"},
        "optimizer": {"learning_rate": 1e-6, "schedule": "constant"},
        "train": {"num_steps": never} | rows,
        "evaluation": {"source": None},
        "checkpoint": {"every": never},
        "log": {"samples_every": 0},
        "mesh": {"data": 1},
    }
    return from_dict(Config, settings)


if __name__ == "__main__":
    forms = {"full_kl": dense, "sampler.sample": sampler, "train": loop}
    protocol.serve(forms, jax=jax.__version__, device=jax.devices()[0].device_kind)
