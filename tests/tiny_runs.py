"""The one small run that end-to-end tests share, variations of it, and how two runs are compared.

All whole runs have TINY's shapes where a test allows it, so that one process compiles the sampler,
the scorer and the evaluation once.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
from waiting import HANG

import opdjax.rollouts.on_policy
import opdjax.train
from opdjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import to_dict
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.runs.workdir import read_lines

ROOT = pathlib.Path(__file__).parents[1]
TINY = Config(
    data=DataConfig(source="arithmetic:train[:64]", max_prompt_length=32),
    sampling=SamplingConfig(max_completion_length=20),
    estimator=EstimatorConfig(recipe="vopd"),
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=2),
    train=TrainConfig(num_steps=6, prompts_per_step=8),
    evaluation=EvaluationConfig(
        num_prompts=16,
        num_samples=2,
        max_completion_length=20,
        temperatures=(1.0, 0.5),
    ),
    checkpoint=CheckpointConfig(every=2),
    log=LogConfig(samples_every=2),
    mesh=MeshConfig(data=1),
)
SHORT = {"evaluation": {"source": None}, "train": {"num_steps": 1}}  # one step, no evaluation


def vary(config=TINY, **sections):
    """The config with some fields of some sections replaced."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(config, **changed)


# What a run computed


def without_times(workdir):
    """The rows of metrics.jsonl without what is measured in seconds."""
    timed = ("time/", "perf/tokens_per_second")
    rows = read_lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def column(workdir, name):
    """One metric of every step."""
    return [row[name] for row in read_lines(workdir / "metrics.jsonl")]


def samples(workdir):
    return read_lines(workdir / "samples.jsonl")


def final_weights(workdir):
    return load_params(open_checkpoint(workdir / "student"), "float32")


def assert_equal_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_same_run(left, right):
    """Metrics, evaluations, samples and trained weights agree bit for bit."""
    assert without_times(left) == without_times(right)
    for name in ("eval.jsonl", "samples.jsonl"):
        assert read_lines(left / name) == read_lines(right / name)
    assert_equal_trees(final_weights(left), final_weights(right))


def assert_close_run(workdir, other, rtol=1e-5):
    """Metrics and weights agree to `rtol`; a metric other than the loss to ten times that, because
    it may be a difference of large numbers.
    """
    for one, eight in zip(without_times(other), without_times(workdir), strict=True):
        assert one.keys() == eight.keys()
        for name in one:
            if one[name] is None:  # no token stands at these positions
                assert eight[name] is None
                continue
            scale = 1 if name == "loss/objective" else 10
            np.testing.assert_allclose(
                eight[name], one[name], rtol=scale * rtol, atol=rtol, err_msg=name
            )
    leaves = [jax.tree.leaves(final_weights(run)) for run in (workdir, other)]
    norm = lambda arrays: sum(np.sum(x**2) for x in arrays) ** 0.5
    assert norm([a - b for a, b in zip(*leaves)]) <= rtol * norm(leaves[1])


@contextlib.contextmanager
def recorded_updates():
    """The compiled updates of the runs inside; `_cache_size()` counts the programs of one."""
    made, real = [], opdjax.train.make_update

    def make_update(*arguments):
        made.append(real(*arguments))
        return made[-1]

    opdjax.train.make_update = make_update
    try:
        yield made
    finally:
        opdjax.train.make_update = real


@contextlib.contextmanager
def interrupted_at(batch):
    """Ctrl-C when the on-policy source collates training batch number `batch`, from 0."""
    module = opdjax.rollouts.on_policy
    real, seen = module.collate, []

    def collate(prompts, indices, num_rows=None):
        if num_rows is None:  # a training batch
            seen.append(1)
            if len(seen) > batch:
                raise KeyboardInterrupt
        return real(prompts, indices, num_rows)

    module.collate = collate
    try:
        yield
    except KeyboardInterrupt:
        assert len(seen) > batch
    else:
        raise AssertionError("the run ended before it was interrupted")
    finally:
        module.collate = real


@contextlib.contextmanager
def shared_programs():
    """Runs inside that have equal settings share the update and the examination of samples that the
    first of them traced: tracing takes most of the time of a short run.
    """
    made = {}

    def sharing(make):
        def shared(*arguments):
            leaves, structure = jax.tree.flatten(arguments)
            key = (make, structure, *leaves)
            if key not in made:
                made[key] = make(*arguments)
            return made[key]

        return shared

    names = ("make_update", "make_examine", "make_behavior_kl")
    real = {name: getattr(opdjax.train, name) for name in names}
    for name, make in real.items():
        setattr(opdjax.train, name, sharing(make))
    try:
        yield
    finally:
        for name, make in real.items():
            setattr(opdjax.train, name, make)


def rewound(run, workdir, step):
    """A copy of a finished run as a kill after this step, which has a checkpoint, left it."""
    shutil.copytree(run, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)
    shutil.rmtree(workdir / "student")
    (workdir / "result.json").unlink()
    return workdir


# Processes


def save(config, file):
    """The config as a file that the commands of `opdjax` take."""
    file.write_text(json.dumps({"config": to_dict(config)}))
    return file


def environment(devices=None, **variables):
    """Environment of a process with this many simulated devices; None: as many as this one has.
    With another number the same program may round differently, because fewer threads compute it.
    """
    devices = devices or jax.device_count()
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | variables


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(config, workdir, *, files=None, devices=None, count=1, command="train", **variables):
    """`opdjax train` (or `opdjax sample --store`) on this config in `count` processes of one run.

    The config and the output of each process lie next to `files`, by default the work directory.
    `{number}` in an environment variable stands for the number of the process. A single process
    has as many devices as this one, one of several has one.
    """
    devices = devices or (1 if count > 1 else None)
    files = pathlib.Path(files or workdir)
    saved = save(config, files.with_suffix(".json"))
    flag = "--workdir" if command == "train" else "--store"
    arguments = [sys.executable, "-m", "opdjax", command, str(saved), flag, str(workdir)]
    address = f"localhost:{free_port()}"
    started = []
    for number in range(count):
        of_group = {"JAX_PROCESS_ID": str(number), "JAX_COORDINATOR_ADDRESS": address}
        own = {name: value.format(number=number) for name, value in variables.items()}
        given = environment(devices, **(of_group if count > 1 else {}), **own)
        with files.with_suffix(f".{number}.txt").open("w") as output:
            started.append(
                subprocess.Popen(arguments, env=given, stdout=output, stderr=subprocess.STDOUT)
            )
    return started


def finish(processes, files):
    """Exit statuses and what each process printed; none of them outlives this call."""
    try:
        statuses = [process.wait(timeout=HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    files = pathlib.Path(files)
    return statuses, [
        files.with_suffix(f".{number}.txt").read_text() for number in range(len(processes))
    ]
