"""The training loop: next, score, update, publish, evaluate, save.

`train(config, workdir)` runs a config to its end or continues it. The work directory holds the
whole state of a run, and all random numbers are functions of (seed, step), so a run that was killed
ends with the same results as one that was not.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import pathlib
import shutil
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from opdjax.config import Config
from opdjax.engine.evaluation_log import evaluate
from opdjax.engine.update import (
    TrainState,
    UpdateSpec,
    init_state,
    make_behavior_kl,
    make_examine,
    make_optimizer,
    make_update,
)
from opdjax.models.decoder import Params
from opdjax.models.lora import combine
from opdjax.models.partitioning import SAMPLER_AXES, shardings_of
from opdjax.ops.multihost import (
    InterruptedRunError,
    agreed,
    from_process_zero,
    join,
    on_all,
    on_process_zero,
    stop_requests,
)
from opdjax.ops.sharding import is_process_zero, shard_rows
from opdjax.rollouts.checks import check_first_step, check_settings
from opdjax.rollouts.export import export_student
from opdjax.rollouts.findings import enforce
from opdjax.rollouts.rows import rollout_metrics, token_counts
from opdjax.rollouts.samples import sample_rows
from opdjax.rollouts.scoring import scored
from opdjax.rollouts.setup import (
    Setup,
    facts,
    load_student,
    prepare,
    sampling_copy,
    update_spec,
    with_current_teacher,
)
from opdjax.rollouts.source import SourceStoppedError, open_source
from opdjax.runs.checkpoint import Checkpointer
from opdjax.runs.metrics import MetricWriter, Progress, Timer
from opdjax.runs.mirror import WorkdirMirror, open_workdir, scratch_workdir
from opdjax.runs.object_store import is_remote, url_of
from opdjax.runs.results import make_result, read_result, result_table
from opdjax.runs.startup import Startup
from opdjax.runs.workdir import (
    WorkdirError,
    append_lines,
    claim,
    cut_lines,
    first_day,
    locked,
    read_lines,
    write_json,
)
from opdjax.types import TrainBatch

# Consecutive steps without a finite loss and gradient that end a run: single ones are skipped.
MAX_NONFINITE_STEPS = 5
_NUM_ALTERNATIVES = 5  # teacher's tokens shown with each token of samples.jsonl
_LOGS = (
    *("metrics.jsonl", "samples.jsonl", "eval.jsonl"),
    *("timeline-learner.jsonl", "rubrics.jsonl"),
)


class NonFiniteLossError(RuntimeError):
    """Too many consecutive steps had a loss or gradient that is not finite."""


def train(config: Config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Run `config` in `workdir` and return its result, which is also `result.json`. The result of a
    finished run is only read.
    """
    join(config.mesh.processes)
    machine = jax.__version__, jax.devices()[0].device_kind, jax.device_count()
    startup = Startup(config, machine, jax.config.jax_compilation_cache_dir)
    with contextlib.ExitStack() as resources:
        _check_storage(config, workdir)
        mirror = on_process_zero(
            lambda: resources.enter_context(open_workdir(workdir))
        ) or scratch_workdir(workdir, jax.process_index())
        if config.near_policy.schedule != "none" and config.near_policy.generator != "process":
            # This run is its own generator: no other one may write rollouts here.
            on_process_zero(lambda: resources.enter_context(locked(mirror.directory, "generator")))
        today = _first_day(mirror.directory)
        setup = on_all(lambda: prepare(config, today))
        run_facts = on_all(lambda: facts(setup))
        is_finished = agreed(bool(on_process_zero(lambda: _open(mirror, setup, run_facts))))
        if not is_finished:
            enforce(check_settings(setup))
            _run(setup, mirror, resources, startup)
        mirror.download_result()
        return read_result(mirror.directory)


def _first_day(workdir: pathlib.Path) -> str:
    """`first_day` of process zero, in every process: a run may begin at midnight."""
    number = lambda: np.int32(datetime.date.fromisoformat(first_day(workdir)).toordinal())
    found = from_process_zero(number, np.int32(0))
    return datetime.date.fromordinal(int(found)).isoformat()


def _check_storage(config: Config, workdir: str | os.PathLike) -> None:
    """WorkdirError if processes would share files on gs://, where each has a copy of its own."""
    near, num_processes = config.near_policy, jax.process_count()
    is_shared = near.generator == "process" or (
        num_processes > 1 and (near.schedule != "none" or config.is_judged)
    )
    if is_remote(workdir) and is_shared:
        raise WorkdirError(
            f"--workdir {url_of(workdir)}: processes that share rollouts or rubrics need a file "
            "system; expected one process (mesh.processes) and near_policy.generator inline or "
            "thread, or a mounted bucket"
        )


def _open(mirror: WorkdirMirror, setup: Setup, run_facts: dict[str, Any]) -> bool:
    """Claim the work directory; return whether it holds a finished run."""
    claim(mirror.directory, setup.config, run_facts)
    for prompts in (setup.prompts, setup.evaluator.prompts if setup.evaluator else None):
        if prompts is not None and prompts.skipped:
            print(
                f"left out {prompts.num_skipped} prompts over {setup.config.data.max_prompt_length}"
                f" tokens, first {prompts.skipped[0]}"
            )
    if not (mirror.directory / "result.json").exists():
        mirror.upload()  # other processes see that the run has started
        return False
    print(f"{mirror.name} holds a finished run")
    result = read_result(mirror.directory)
    if "eval_after" in result:
        print(result_table(result))
    return True


def _run(
    setup: Setup, mirror: WorkdirMirror, resources: contextlib.ExitStack, startup: Startup
) -> None:
    """Train from the latest checkpoint to the last step, and write the result."""
    config, workdir = setup.config, mirror.directory
    num_steps, spec = config.train.num_steps, update_spec(setup)
    checkpointer = Checkpointer(mirror.checkpoints, keep=config.checkpoint.keep)
    resources.callback(checkpointer.close)
    state, frozen = _initial_state(setup, spec)
    layout = jax.tree.map(lambda x: x.sharding, state)
    update = make_update(spec, config.optimizer, num_steps, layout)
    examine, behavior_kl = make_examine(spec, _NUM_ALTERNATIVES), make_behavior_kl(spec)
    first = checkpointer.latest_step or 0
    if first:
        state = checkpointer.restore(first, state)
    on_process_zero(lambda: _truncate_logs(setup, workdir, first))
    writer = on_process_zero(
        lambda: MetricWriter(workdir, last_step=first, tensorboard=config.log.tensorboard)
    )
    if writer is not None:
        resources.callback(writer.close)
    sampling_weights = _sampling_weights(setup, frozen)
    copy_weights = lambda: sampling_weights(state.params)
    kl_of = lambda rows: behavior_kl(state.params, shard_rows(rows, setup.mesh), frozen)

    def save(step: int, scores: dict[str, float] | None = None) -> None:
        on_process_zero(mirror.upload)  # first: a checkpoint implies all logs before it
        checkpointer.save(step, state, scores)

    progress, timer = Progress(first, num_steps), Timer()
    resources.callback(progress.close)
    is_stop_requested = resources.enter_context(stop_requests())
    source = resources.enter_context(open_source(setup, workdir, first, is_stop_requested))
    on_process_zero(startup.announce)
    evaluate(setup.evaluator, workdir, 0, copy_weights)
    source.publish(first, copy_weights, timer)
    for step in range(first, num_steps):
        done = step + 1
        try:
            data = source.next(step, timer)
        except SourceStoppedError:
            if step > (checkpointer.latest_step or 0) and not int(state.nonfinite_streak):
                save(step)
            checkpointer.wait()
            raise

        current = with_current_teacher(setup, source.params)
        if _is_due(done, config.log.samples_every) or (config.log.samples_every and done == 1):
            params = copy_weights() if source.params is None else source.params
            rows = sample_rows(current, examine, params, data, done)
            on_process_zero(partial(append_lines, workdir / "samples.jsonl", rows))
            del params
        with timer.phase("teacher"):
            batch, teacher_head = jax.block_until_ready(
                scored(current, data.rows, spec.estimator.teacher)
            )
        extra = _unfiltered_kl(config, source.probe, kl_of, step, timer)
        with timer.phase("update"):
            state, metrics = update(state, batch, teacher_head, frozen)
            # The update runs asynchronously: the host works while the device computes.
            extra |= rollout_metrics(data.rollouts, setup.decoding.stop_token_ids, step)
            extra |= data.metrics | token_counts(config, data)
            source.prefetch(done)
            metrics = jax.tree.map(float, jax.device_get(metrics)) | extra
        if step == first:
            on_process_zero(startup.first_step_done)
        # Only rollouts of the current weights must have the log-probs that the update computes.
        if step == first and np.all(np.asarray(data.rollouts.policy_version) == step):
            enforce(check_first_step(setup, data.batch, data.rollouts, data.prompts, metrics))
        # Frees what was computed with the old weights before the new ones are copied.
        del current, teacher_head, batch, data

        on_process_zero(partial(_write_timeline, config, workdir, timer, done))
        metrics |= timer.take()
        metrics["perf/tokens_per_second"] = metrics["perf/trained_tokens"] / metrics["time/step"]
        on_process_zero(lambda step=done, row=metrics: writer.write(step, row))
        mirror.record_progress(step=done, num_steps=num_steps)
        if is_process_zero():
            progress.show(done, metrics)

        streak = int(state.nonfinite_streak)
        if streak >= MAX_NONFINITE_STEPS:
            checkpointer.wait()
            raise NonFiniteLossError(_nonfinite_message(done, streak, checkpointer, mirror))
        is_last = done == num_steps
        is_evaluated = is_last or _is_due(done, config.evaluation.every)
        scores = evaluate(setup.evaluator, workdir, done, copy_weights) if is_evaluated else None
        is_stopped = is_stop_requested(done) and not is_last
        # Sampling for coming epochs takes long, so a checkpoint is saved before it.
        is_due = _is_due(done, config.checkpoint.every) or done in config.refresh_steps
        # In a streak there is nothing new to save, and the last good step must not be deleted.
        if is_last or (streak == 0 and (is_evaluated or is_stopped or is_due)):
            source.commit(done, timer)
            save(done, scores)
        if is_stopped:
            checkpointer.wait()
            raise InterruptedRunError(
                f"stopped after step {done}, as asked by a signal; the same command continues "
                f"{mirror.name}"
            )
        if not is_last:
            source.publish(done, copy_weights, timer)
    progress.close()
    checkpointer.wait()
    _finish(setup, mirror, combine(frozen, state.params), int(state.num_skipped), spec.dtype)


def _is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after this step."""
    return bool(every) and step % every == 0


def _initial_state(setup: Setup, spec: UpdateSpec) -> tuple[TrainState, Params | None]:
    """(the state before the first step, parameters that stay frozen)."""
    trained, frozen = load_student(setup)
    optimizer = make_optimizer(setup.config.optimizer, setup.config.train.num_steps)
    return init_state(trained, optimizer, setup.mesh), frozen


def _sampling_weights(setup: Setup, frozen: Params | None) -> Callable[[Params], Params]:
    """Trained parameters -> the whole student's weights for sampling.

    The trained part is copied even if its dtype stays: the update overwrites the state's arrays,
    and may read the copy as its teacher's head. The frozen part is not copied if it is in place.
    """
    copied = jax.jit(partial(sampling_copy, setup))
    layout = frozen and shardings_of(frozen, setup.mesh, SAMPLER_AXES)
    own_frozen = frozen and jax.device_put(frozen, layout)
    return lambda params: combine(own_frozen, copied(params))


def _unfiltered_kl(
    config: Config,
    probe: Callable[[int], TrainBatch],
    kl_of: Callable[[TrainBatch], jax.Array],
    step: int,
    timer: Timer,
) -> dict[str, float]:
    """KL(student || behaviour) on rollouts that no filter chose, every few steps; NaN between."""
    every = config.log.diagnostics_every
    if config.near_policy.filter == "none" or not every:
        return {}
    if step % every:
        return {"staleness/kl_all": math.nan}
    with timer.phase("probe"):
        return {"staleness/kl_all": float(kl_of(probe(step)))}


def _write_timeline(config: Config, workdir: pathlib.Path, timer: Timer, step: int) -> None:
    """Write the learner's activities of a step, if rollouts are sampled ahead."""
    if config.near_policy.schedule != "none":
        rows = [span | {"step": step, "version": step} for span in timer.spans]
        append_lines(workdir / "timeline-learner.jsonl", rows)


def _nonfinite_message(
    done: int, streak: int, checkpointer: Checkpointer, mirror: WorkdirMirror
) -> str:
    latest = checkpointer.latest_step
    kept = f"the last good checkpoint in {mirror.checkpoints} is step {latest}"
    if latest is None:
        kept = "there is no good checkpoint yet"
    return (
        f"steps {done - streak + 1} to {done} had no finite loss or gradient; {kept}. Lower the "
        "learning rate or check the models"
    )


def _truncate_logs(setup: Setup, workdir: pathlib.Path, step: int) -> None:
    """Drop log rows written after the checkpoint we resume from. WorkdirError, before anything is
    dropped, if the checkpoint or the first evaluation is missing.
    """
    config, evaluation = setup.config, setup.config.evaluation
    if step:
        print(f"continuing from step {step}")
    logs = {name: read_lines(workdir / name) for name in _LOGS}
    reached = max([row["step"] for row in logs["metrics.jsonl"]], default=0)
    # A run may be killed while it saves its first checkpoint, after a streak of skipped steps.
    possible = 2 * config.checkpoint.every + MAX_NONFINITE_STEPS
    if step == 0 and reached > possible:
        raise WorkdirError(
            f"{workdir} has metrics up to step {reached} and no checkpoint; put checkpoints back "
            "or start in a new work directory"
        )
    found = {(row["step"], row["temperature"]) for row in logs["eval.jsonl"]}
    temperatures = evaluation.temperatures
    if step and setup.evaluator is not None and not {(0, t) for t in temperatures} <= found:
        raise WorkdirError(
            f"{workdir / 'eval.jsonl'} lacks the evaluation of step 0, whose parameters are gone; "
            "put it back or use a new work directory"
        )
    for name in _LOGS:
        cut_lines(workdir / name, step)


def _finish(
    setup: Setup, mirror: WorkdirMirror, params: Params, num_skipped: int, dtype: str
) -> None:
    """Export the student, write result.json last, and print the scores."""
    config, out = setup.config, mirror.directory / "student"
    names = ("student", "student_adapter")

    def clear() -> None:  # a run that was killed may have left parts of them
        for name in names:
            shutil.rmtree(mirror.directory / name, ignore_errors=True)

    def write() -> None:
        counts = {"skipped_steps": num_skipped, "skipped_prompts": setup.prompts.num_skipped}
        result = make_result(config, mirror.directory, counts, out.name)
        if "eval_after" in result:
            print(result_table(result))
        write_json(mirror.directory / "result.json", result)

    on_process_zero(clear)
    step = config.train.num_steps
    export = partial(export_student, params, setup.student, config, mirror.directory, out)
    on_all(lambda: export(dtype, step))
    on_process_zero(write)
    on_process_zero(mirror.finish)


class _CallableModule(types.ModuleType):
    """`opdjax.train` is this module and, for users of the library, its function."""

    def __call__(self, config: Config, workdir: str | pathlib.Path) -> dict[str, Any]:
        return train(config, workdir)


sys.modules[__name__].__class__ = _CallableModule
