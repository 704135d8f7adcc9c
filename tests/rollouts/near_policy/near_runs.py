"""TINY with asynchronous or near-policy rollouts, and how two such runs are compared."""

import dataclasses

import numpy as np
from safetensors.numpy import load_file
from tiny_runs import vary, without_times

from opdjax.config import EstimatorConfig, NearPolicyConfig
from opdjax.rollouts.near_policy import shards

BASE = dataclasses.replace(
    vary(
        optimizer={"learning_rate": 5e-3, "warmup_steps": 1},
        evaluation={"source": None},
        log={"samples_every": 0, "diagnostics_every": 0},
    ),
    estimator=EstimatorConfig("npd"),
)
LAG = {"schedule": "continuous", "max_staleness": 2}
REFRESH = {"schedule": "refresh", "num_epochs": 2, "refresh_epochs": (1,)}
FILTERED = {"filter": "ifd", "ifd_min": None, "ifd_quantile": 0.7}
ONE_THREAD = {"generator": "thread"}
PACKED = {"train": {"pack_length": 60}}


def near(given, config=BASE, **sections):
    """The config with this near_policy; sections replace fields."""
    return dataclasses.replace(vary(config, **sections), near_policy=NearPolicyConfig(**given))


def weights(workdir):
    """The trained student."""
    return load_file(workdir / "student" / "model.safetensors")


def assert_same_weights(left, right, **tolerance):
    """Bit for bit, or within a tolerance."""
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if tolerance:
            np.testing.assert_allclose(right[name], value, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(right[name], value, err_msg=name)


def assert_same_steps(left, right):
    """Metrics of all steps and the trained weights agree bit for bit."""
    assert without_times(left) == without_times(right)
    assert_same_weights(left, right)


def stored_samples(workdir):
    """(version, number) -> every shard of samples; each of them is complete."""
    return {
        (version, number): shards.read_shard(path)
        for version in shards.versions(workdir)
        for number, path in shards.shard_paths(
            shards.version_directory(workdir, version), "samples"
        ).items()
    }


def shard_names(workdir):
    """The path of every shard; its name holds a digest of its bytes."""
    return sorted(
        str(path.relative_to(workdir)) for path in (workdir / "rollouts").glob("*/*.parquet")
    )
