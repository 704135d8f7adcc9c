"""A tiny pair of random models that every mesh of eight devices divides, runs of it on the built-in
task, and runs of several processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

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
from opdjax.config.validation import to_dict
from opdjax.models.decoder import init_params
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.models.hf_export import export
from opdjax.runs.workdir import read_lines

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
}


def make_pair(directory: pathlib.Path) -> None:
    """`student` and `teacher`, Hugging Face directories with the built-in pair's tokenizer."""
    built_in = open_checkpoint(str(MINI_PAIR / "student"))
    for seed, name in enumerate(("student", "teacher")):
        described = directory / f"{name}_config"
        described.mkdir(parents=True)
        (described / "config.json").write_text(
            json.dumps(built_in.raw_config | SIZES | {"layer_types": ["full_attention"] * 2})
        )
        config = open_checkpoint(described).config
        source = dataclasses.replace(
            built_in, raw_config=json.loads((described / "config.json").read_text()), config=config
        )
        # Larger than at the start of training, so that the two differ and distributions are not
        # flat.
        params = jax.tree.map(
            lambda x: 3 * x if x.ndim > 1 else x,
            init_params(config, jax.random.key(seed), jnp.float32),
        )
        export(params, source, directory / name, "float32")


def mesh_config(directory: pathlib.Path, mesh: MeshConfig, **sections) -> Config:
    """Two steps of `vopd` on the pair; sections replace."""
    given = {
        "data": DataConfig(max_prompt_length=32),
        "sampling": SamplingConfig(max_completion_length=12),
        "estimator": EstimatorConfig(
            recipe="vopd",
            baseline="student_topk",
            baseline_top_k=5,
            aggregation="fixed_denominator",
            tile=16,
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


def numbers(workdir):
    """The rows of metrics.jsonl, without times."""
    rows = read_lines(workdir / "metrics.jsonl")
    timed = ("time/", "perf/tokens_per_second")
    return [
        {name: value for name, value in row.items() if not name.startswith(timed)} for row in rows
    ]


def weights(workdir):
    """The student that a finished run wrote."""
    return load_params(open_checkpoint(workdir / "student"), "float32")


def assert_same_run(workdir, other, rtol=1e-5):
    """Weights and loss agree to `rtol`; other metrics, which may be differences of large numbers,
    to 10 `rtol`.
    """
    for one, eight in zip(numbers(other), numbers(workdir), strict=True):
        assert one.keys() == eight.keys()
        for name in one:
            if one[name] is None:  # no token has these positions
                assert eight[name] is None
                continue
            tolerance = rtol * (10 if name != "loss/objective" else 1)
            np.testing.assert_allclose(
                eight[name], one[name], rtol=tolerance, atol=rtol, err_msg=name
            )
    norm = lambda leaves: sum(np.sum(x**2) for x in leaves) ** 0.5
    found, expected = jax.tree.leaves(weights(workdir)), jax.tree.leaves(weights(other))
    assert norm([a - b for a, b in zip(found, expected)]) <= rtol * norm(expected)


def start(config, workdir, count=2, devices=2):
    """Start `count` processes of one run with `devices` devices each; their stdout goes to files
    next to the work directory.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    saved = workdir.with_suffix(".json")
    saved.write_text(json.dumps({"config": to_dict(config)}))
    started = []
    for number in range(count):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PROCESS_ID": str(number),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        }
        output = workdir.with_suffix(f".{number}.txt").open("w")
        command = [sys.executable, "-m", "opdjax", "train", str(saved), "--workdir", str(workdir)]
        started.append(
            subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        )
    return started


def finish(processes, workdir):
    """Exit statuses and output of each process."""
    try:
        statuses = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return statuses, [
        workdir.with_suffix(f".{number}.txt").read_text() for number in range(len(processes))
    ]
