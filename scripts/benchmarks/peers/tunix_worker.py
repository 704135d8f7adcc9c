"""The Tunix worker: its logit distillation loss and its sampler.

Tunix has no on-policy distillation.
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

from benchmarks.peers.protocol import generation, jax_loss, make_logits, read_prompts, serve


def logit_strategy(case):
    unused = lambda *_: None
    strategy = LogitStrategy(unused, unused, unused, temperature=1.0, alpha=1.0)
    student, teacher = (jnp.asarray(x)[None] for x in make_logits(case))
    labels = jax.nn.one_hot(jnp.zeros((1, case["tokens"]), jnp.int32), case["vocab"])
    loss = lambda *arguments: strategy.compute_loss(*arguments)[0]
    return jax_loss(loss, (student, teacher, labels))


def sampler(case):
    shape, dtype = case["student_shape"], jnp.dtype("float32")
    config = ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=dtype,
        param_dtype=dtype,
    )
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=types, devices=jax.devices()[:1])
    model = create_model_from_safe_tensors(case["student"], config, mesh, dtype)
    columns = case["prompt"] + case["new"]
    cache = CacheConfig(columns, config.num_layers, config.num_kv_heads, config.head_dim)
    draw = Sampler(model, AutoTokenizer.from_pretrained(case["student"]), cache)
    options = {"eos_tokens": case["stop_ids"], "temperature": 1.0, "top_p": case["top_p"]}
    sizes = read_prompts(case), case["new"], case["prompt"]
    return generation(lambda seed: draw(*sizes, seed=seed, **options).tokens)


if __name__ == "__main__":
    forms = {"LogitStrategy.compute_loss": logit_strategy, "Sampler": sampler}
    serve(forms, tunix=version("google-tunix"), jax=jax.__version__)
