"""The Tunix worker: its logit distillation loss and its sampler.

Tunix has no on-policy distillation and no loss from hidden states.
"""

from __future__ import annotations

from importlib.metadata import version

import jax
import jax.numpy as jnp
from transformers import AutoTokenizer
from tunix.distillation.strategies.logit import LogitStrategy
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig
from tunix.models.qwen3.params import create_model_from_safe_tensors

from benchmarks.peers.jax_jobs import blocked, describe_loss
from benchmarks.peers.protocol import Job, describe_lengths, make_logits, read_prompts, serve


def build_logit_strategy(case):
    strategy = LogitStrategy(
        lambda *_: None, lambda *_: None, lambda *_: None, temperature=1.0, alpha=1.0
    )
    student, teacher = (jnp.asarray(x)[None] for x in make_logits(case))
    labels = jax.nn.one_hot(jnp.zeros((1, case["tokens"]), jnp.int32), case["vocab"])
    function = jax.jit(
        jax.value_and_grad(lambda *arguments: strategy.compute_loss(*arguments), has_aux=True)
    )

    def run():
        (loss, _), gradient = blocked(function, student, teacher, labels)
        return loss, gradient

    return Job(run, describe_loss)


def build_sampler(case):
    shape = case["student_shape"]
    config = ModelConfig(
        num_layers=shape["num_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_heads"],
        head_dim=shape["head_size"],
        num_kv_heads=shape["num_kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=jnp.dtype(case["dtype"]),
        param_dtype=jnp.dtype(case["dtype"]),
    )
    mesh = jax.make_mesh(
        (1, 1),
        ("fsdp", "tp"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:1],
    )
    model = create_model_from_safe_tensors(case["student"], config, mesh, jnp.dtype(case["dtype"]))
    columns = case["prompt"] + case["new"]
    cache = CacheConfig(columns, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, AutoTokenizer.from_pretrained(case["student"]), cache)
    texts = [row["prompt"] for row in read_prompts(case)]
    seeds = iter(range(10**6))

    def run(count=case["prompts"]):
        lengths = []
        for start in range(0, count, case["batch"]):
            drawn = sampler(
                texts[start : start + case["batch"]],
                case["new"],
                case["prompt"],
                eos_tokens=case["stop_ids"],
                temperature=1.0,
                top_p=case["top_p"],
                seed=next(seeds),
            )
            # The returned tokens exclude the stop token.
            lengths += [min(len(tokens) + 1, case["new"]) for tokens in drawn.tokens]
        return lengths

    return Job(run, describe_lengths, warm_up=lambda: run(case["batch"]))


if __name__ == "__main__":
    forms = {
        "LogitStrategy.compute_loss": build_logit_strategy,
        "Sampler": build_sampler,
    }
    serve(forms, tunix=version("google-tunix"), jax=jax.__version__)
