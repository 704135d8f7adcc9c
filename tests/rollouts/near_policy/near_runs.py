"""Tiny runs on the mini pair whose rollouts are drawn ahead, and what tells two of them apart."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from safetensors.numpy import load_file

from opdjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    NearPolicyConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import to_dict
from opdjax.rollouts.near_policy import shards
from opdjax.runs.workdir import read_lines

ROOT = pathlib.Path(__file__).parents[3]
BASE = Config(
    data=DataConfig(max_prompt_length=32),
    sampling=SamplingConfig(max_completion_length=12),
    estimator=EstimatorConfig("npd", tile=64),
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=1),
    train=TrainConfig(num_steps=6, prompts_per_step=8),
    evaluation=EvaluationConfig(source=None),
    checkpoint=CheckpointConfig(every=2),
    log=LogConfig(samples_every=0, diagnostics_every=0),
    mesh=MeshConfig(1),
)
LAG = {"schedule": "continuous", "max_staleness": 2}
REFRESH = {"schedule": "refresh", "num_epochs": 2, "refresh_epochs": (1,), "shard_size": 16}
CHOSEN = {"filter": "ifd", "ifd_min": None, "ifd_quantile": 0.7}
ONE_THREAD = {"generator": "thread", "generator_devices": 1}


def near(given, config=BASE, **sections):
    """The config with this near_policy; sections replace fields."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(config, near_policy=NearPolicyConfig(**given), **changed)


def weights(workdir):
    """The trained student."""
    return load_file(workdir / "student" / "model.safetensors")


def without_times(workdir):
    """The rows of metrics.jsonl, timing aside."""
    rows = read_lines(workdir / "metrics.jsonl")
    return [
        {
            k: v
            for k, v in row.items()
            if not k.startswith("time/") and k != "perf/tokens_per_second"
        }
        for row in rows
    ]


def assert_same_weights(left, right, **tolerance):
    """Bit for bit, or within a tolerance."""
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if tolerance:
            np.testing.assert_allclose(right[name], value, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(right[name], value, err_msg=name)


def assert_same_run(left, right):
    """Everything that a run says of its steps, and its weights, bit for bit."""
    assert without_times(left) == without_times(right)
    assert_same_weights(left, right)


def drawn(workdir):
    """(version, number) -> shard of everything that was drawn; every shard is whole."""
    return {
        (version, number): shards.read_shard(path)
        for version in shards.versions(workdir)
        for number, path in shards.shard_paths(
            shards.version_directory(workdir, version), "samples"
        ).items()
    }


def stored_bytes(workdir):
    """Every shard by its place; the digest in its name is that of its bytes."""
    return sorted(
        str(path.relative_to(workdir)) for path in (workdir / "rollouts").glob("*/*.parquet")
    )


def environment(devices=1):
    """Of a process of its own, with so many simulated devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }


def save(config, workdir):
    """The config as a file beside the work directory, as the verbs take it."""
    saved = workdir.with_suffix(".json")
    saved.write_text(json.dumps({"config": to_dict(config)}))
    return saved


def start(verb, config, workdir):
    """`opdjax train` or `opdjax sample --store` on this config, in a process of its own on one
    device.
    """
    command = [sys.executable, "-m", "opdjax", verb, str(save(config, workdir))]
    command += ["--workdir" if verb == "train" else "--store", str(workdir)]
    return subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
