"""Starts a run from a checkpoint of another one, `train.start_from`, or of the run itself."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from opdjax.config import Config
from opdjax.config.validation import ConfigError, differences, to_dict
from opdjax.engine.update import TrainState, init_state, make_optimizer
from opdjax.judge.criteria import FROZEN
from opdjax.models.decoder import Params, abstract_params
from opdjax.models.hf import Checkpoint, fingerprint
from opdjax.models.lora import init_adapters
from opdjax.models.partitioning import shardings_of
from opdjax.ops.multihost import on_all
from opdjax.ops.sharding import abstract_like
from opdjax.runs.checkpoint import Checkpointer
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.workdir import append_lines, read_config, read_lines, read_run_config

# Logs with a row per step, which are cut where a run continues.
LOGS = (
    *("metrics.jsonl", "samples.jsonl", "eval.jsonl", "divergence.jsonl", "rubrics.jsonl"),
    "timeline-learner.jsonl",
)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A work directory whose checkpoints are read."""

    name: str
    directory: pathlib.Path  # with config.json and eval.jsonl
    config: Config
    environment: dict[str, Any]  # of the run, as it recorded it
    student: str  # fingerprint of the student that it started from
    checkpointer: Checkpointer

    def step(self, wanted: str) -> int:
        """The step of a checkpoint: a number, `latest`, or `best`; ConfigError for none."""
        best = self.checkpointer.best_step
        named = {"latest": self.checkpointer.latest_step, "best": best}
        step = named.get(wanted, int(wanted) if wanted.isdecimal() else None)
        if step not in self.checkpointer.steps:
            raise ConfigError(
                f"{self.name} has no checkpoint {wanted!r}; there are {self.checkpointer.steps} "
                f"(best: {best})"
            )
        return step

    def state(self, step: int, student: Checkpoint, mesh: Mesh) -> TrainState:
        """The training state of a step, on a mesh."""
        config = self.config
        adapters = partial(init_adapters, student.config, config.lora, config.seed)
        is_lora = config.lora.rank > 0
        params = jax.eval_shape(adapters) if is_lora else abstract_params(student.config, "float32")
        optimizer = make_optimizer(config.optimizer, config.train.num_steps)
        state = jax.eval_shape(partial(init_state, optimizer=optimizer, mesh=mesh), params)
        like = abstract_like(state, shardings_of(state, mesh))
        return self.checkpointer.restore(step, like, on_all)


@contextlib.contextmanager
def open_checkpoints(workdir: str | os.PathLike) -> Iterator[_Stored]:
    """The checkpoints of a run, to be read; WorkdirError if there is no run."""
    with contextlib.ExitStack() as stack:
        wanted = {"config.json", "eval.jsonl"}
        mirror = stack.enter_context(read_only_workdir(workdir, wanted.__contains__))
        saved, config = read_run_config(mirror.directory), read_config(mirror.directory)
        checkpointer = Checkpointer(mirror.checkpoints, keep=1, is_read_only=True)
        stack.callback(checkpointer.close)
        known = mirror.name, mirror.directory, config, saved["environment"]
        yield _Stored(*known, saved["data"].get("student"), checkpointer)


def with_start_step(config: Config, student: Checkpoint) -> Config:
    """The config whose `train.start_from` names a step, with the other run's day; ConfigError if
    that run lacks the step, or trains another student or other adapters.
    """
    train = config.train
    if train.start_from is None:
        return config
    run, wanted = train.start
    with open_checkpoints(run) as other:
        step = other.step(wanted)
    trained = {"student": other.student, "lora": to_dict(other.config.lora)}
    own = {"student": fingerprint(student), "lora": to_dict(config.lora)}
    if changed := differences(trained, own):
        raise ConfigError(
            f"train.start_from: {run} trains other parameters ({', '.join(changed)}); expected the "
            "same student.path and lora; another run starts from its student if student.path is "
            "what opdjax export writes"
        )
    train = dataclasses.replace(train, start_from=f"{run}@{step}")
    # A template that reads the clock is shown the day of the run that this one goes on with.
    data = dataclasses.replace(config.data, date=config.data.date or other.config.data.date)
    return dataclasses.replace(config, train=train, data=data)


def first_params(config: Config, student: Checkpoint, mesh: Mesh) -> Params | None:
    """The parameters of step 0, if they are another run's; None if they are the checkpoint's."""
    while config.train.start_from and config.train.start_with == "both":
        with open_checkpoints(config.train.start[0]) as other:
            config = other.config  # both runs have the same first steps
    if config.train.start_from is None or config.train.start_with != "student":
        return None
    return state_of_start(config, student, mesh).params


def state_of_start(config: Config, student: Checkpoint, mesh: Mesh) -> TrainState:
    """The training state that `train.start_from` names."""
    run, step = config.train.start
    with open_checkpoints(run) as other:
        return other.state(int(step), student, mesh)


def copy_logs(config: Config, workdir: pathlib.Path) -> None:
    """Begin a work directory with the logs of the run before; without evaluations of other kind."""
    files = {*LOGS, FROZEN, "config.json"}
    with read_only_workdir(config.train.start[0], files.__contains__) as mirror:
        if read_config(mirror.directory).evaluation != config.evaluation:
            files -= {"eval.jsonl", "divergence.jsonl"}
        for name in files - {"config.json"}:
            (workdir / name).unlink(missing_ok=True)
            if rows := read_lines(mirror.directory / name):
                append_lines(workdir / name, rows)
