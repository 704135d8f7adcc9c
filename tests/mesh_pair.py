"""A tiny pair of random models that every mesh of eight devices divides, and runs of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp

from opdjax.config import (
    MINI_PAIR,
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
from opdjax.models.decoder import DecoderConfig, Params, init_params
from opdjax.models.hf import open_checkpoint
from opdjax.models.hf_export import export

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
}


def make_pair(directory: pathlib.Path, **fields) -> None:
    """`student` and `teacher`, Hugging Face directories with the built-in pair's tokenizer; the
    fields replace those of their configs.
    """
    built_in = open_checkpoint(str(MINI_PAIR / "student"))
    for seed, name in enumerate(("student", "teacher")):
        described = directory / f"{name}_config"
        described.mkdir(parents=True)
        raw = built_in.raw_config | SIZES | {"layer_types": ["full_attention"] * 2} | fields
        (described / "config.json").write_text(json.dumps(raw))
        new = open_checkpoint(described)
        config = new.config
        source = dataclasses.replace(built_in, raw_config=raw, config=config, family=new.family)
        # Larger than at the start of training, so that the two differ and distributions are not
        # flat.
        params = _large_params(config, seed)
        export(params, source, directory / name, "float32")


@functools.partial(jax.jit, static_argnums=0)
def _large_params(config: DecoderConfig, seed: int) -> Params:
    params = init_params(config, jax.random.key(seed), jnp.float32)
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


def mesh_config(directory: pathlib.Path, mesh: MeshConfig, **sections) -> Config:
    """Two steps of `vopd` on the pair; sections replace."""
    given = {
        "data": DataConfig("arithmetic:train[64:128]", max_prompt_length=32),
        "sampling": SamplingConfig(max_completion_length=12),
        "estimator": EstimatorConfig(
            recipe="vopd",
            baseline="student_topk",
            support_top_k=5,
            aggregation="fixed_denominator",
        ),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "train": TrainConfig(num_steps=2, prompts_per_step=16, gradient_accumulation_steps=2),
        "evaluation": EvaluationConfig(source=None),
        "checkpoint": CheckpointConfig(every=1),
        "log": LogConfig(samples_every=0, diagnostics_every=1),
    }
    models = {
        "student": ModelConfig(str(directory / "student")),
        "teacher": ModelConfig(str(directory / "teacher")),
    }
    return Config(**models, mesh=mesh, **given | sections)
