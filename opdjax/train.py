"""The training loop: next, score, update, publish, evaluate, save. The work directory holds the
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

from opdjax.config import STUDENT, Config
from opdjax.data.references import ReferenceMissError
from opdjax.engine.divergence import measure
from opdjax.engine.evaluate import evaluate
from opdjax.engine.update import (
    TrainState,
    init_state,
    make_behavior_kl,
    make_examine,
    make_optimizer,
    make_update,
    teacher_weights,
)
from opdjax.models.decoder import Params
from opdjax.ops.multihost import (
    InterruptedRunError,
    OtherFailedError,
    agreed,
    from_process_zero,
    join,
    on_all,
    on_process_zero,
    stop_requests,
)
from opdjax.ops.sharding import is_process_zero, shard_rows
from opdjax.rollouts.checks import check_first_step, check_settings, enforce
from opdjax.rollouts.export import export_student
from opdjax.rollouts.rows import rollout_metrics, scored, token_counts
from opdjax.rollouts.samples import sample_rows
from opdjax.rollouts.setup import (
    Setup,
    as_recorded,
    facts,
    prepare,
    take_over,
    update_spec,
    with_current_teacher,
)
from opdjax.rollouts.source import SourceStoppedError, open_source
from opdjax.rollouts.start import LOGS
from opdjax.rollouts.weights import initial_weights, load_student, sampling_weights, whole_student
from opdjax.rollouts.write_references import teach as write_references
from opdjax.runs.checkpoint import Checkpointer, UnreadableCheckpointError, set_aside
from opdjax.runs.metrics import MetricWriter, Progress, Startup, Timer, require_trackers
from opdjax.runs.mirror import WorkdirMirror, open_workdir, scratch_workdir
from opdjax.runs.object_store import is_remote, local_copy, url_of
from opdjax.runs.results import evaluations_since_best, make_result, read_result, result_table
from opdjax.runs.workdir import (
    RowCounter,
    WorkdirError,
    append_lines,
    check_logs,
    claim,
    cut_lines,
    first_day,
    locked,
    read_lines,
    write_json,
)

# Consecutive steps without a finite loss and gradient that end a run: single ones are skipped.
MAX_NONFINITE_STEPS = 5
_NUM_ALTERNATIVES = 5  # teacher's tokens shown with each token of samples.jsonl
_TIMELINE = "timeline-learner.jsonl"  # the learner's activities, if rollouts are sampled ahead


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
        on_process_zero(lambda: require_trackers(config.log.trackers))
        today = _first_day(mirror.directory)
        setup = on_all(lambda: _prepared(config, today))
        run_facts = on_all(lambda: facts(setup))
        enforce(check_settings(setup))
        is_finished = agreed(bool(on_process_zero(lambda: _open(mirror, config, setup, run_facts))))
        if not is_finished:
            _run(setup, mirror, resources, startup)
        return read_result(local_copy(f"{mirror.name}/result.json").parent)


def _first_day(workdir: pathlib.Path) -> str:
    """`first_day` of process zero, in every process: a run may begin at midnight."""
    number = lambda: np.int32(datetime.date.fromisoformat(first_day(workdir)).toordinal())
    found = from_process_zero(number, np.int32(0))
    return datetime.date.fromordinal(int(found)).isoformat()


def _prepared(config: Config, today: str) -> Setup:
    """What the run works with; reference answers that are missing are written first, unless the
    teacher is behind an API and `teach.auto` is not set, or there are several processes.
    """
    try:
        return prepare(config, today)
    except ReferenceMissError as error:
        if config.teach.model and not config.teach.auto:
            raise ReferenceMissError(f"{error}, or let train do so with --teach.auto") from error
        teacher = config.teach.model or config.teacher.path
        if config.mesh.processes != 1 or teacher == STUDENT:
            raise
        print(f"{teacher} writes the missing answers of {config.data.references}", flush=True)
    write_references(config, today)
    return prepare(config, today)


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


def _open(mirror: WorkdirMirror, config: Config, setup: Setup, run_facts: dict[str, Any]) -> bool:
    """Claim the work directory; return whether it holds a finished run."""
    claim(mirror.directory, as_recorded(config, setup), run_facts)
    for prompts in (setup.prompts, setup.evaluator.prompts if setup.evaluator else None):
        if prompts is not None and prompts.skipped:
            print(
                f"left out {prompts.num_skipped} prompts over {setup.config.data.max_prompt_length}"
                f" tokens, or not readable, first {prompts.skipped[0]}"
            )
    if not (mirror.directory / "result.json").exists():
        mirror.upload()  # other processes see that the run has started
        return False
    print(f"{mirror.name} holds a finished run")
    result = read_result(mirror.directory)
    if config.evaluation.source is not None:
        print(result_table(result))
    return True


def _run(
    setup: Setup, mirror: WorkdirMirror, resources: contextlib.ExitStack, startup: Startup
) -> None:
    """Train from the latest checkpoint to the last step, and write the result."""
    config, workdir = setup.config, mirror.directory
    num_steps, spec = config.train.num_steps, update_spec(setup)
    trained, frozen = load_student(setup)
    state = init_state(trained, make_optimizer(config.optimizer, num_steps), setup.mesh)
    del trained  # copied
    layout = jax.tree.map(lambda x: x.sharding, state)
    update = make_update(spec, config.optimizer, num_steps, layout)
    examine, behavior_kl = make_examine(spec, _NUM_ALTERNATIVES), make_behavior_kl(spec)
    checkpointer, state = _open_checkpoints(config, mirror, state)
    resources.callback(checkpointer.close)
    first = (latest := checkpointer.latest_step) or config.train.first_step
    state = take_over(setup, workdir, state) if first and not latest else state
    on_process_zero(lambda: _truncate_logs(setup, workdir, first, checkpointer.logs(latest)))
    counter = RowCounter(workdir)
    writer = on_process_zero(lambda: MetricWriter(workdir, last_step=first, config=config))
    if writer is not None:
        resources.callback(writer.close)
    weights_of = sampling_weights(setup, frozen)
    copy_weights = lambda: weights_of(state.params)

    def save(step: int, scores: dict[str, float] | None = None) -> None:
        is_stop_requested(step, is_saving=True)
        logs = on_process_zero(partial(_upload_logs, counter, mirror, step))
        checkpointer.save(step, state, scores, logs)

    def unfiltered_kl(step: int) -> dict[str, float]:
        """KL(student || behaviour) on rollouts that no filter chose, or NaN if it is not due."""
        every = config.log.diagnostics_every
        if config.near_policy.filter == "none" or not every:
            return {}
        if step % every:
            return {"staleness/kl_all": math.nan}
        with timer.phase("probe"):
            rows = shard_rows(source.probe(step), setup.mesh)
            return {"staleness/kl_all": float(behavior_kl(state.params, rows, frozen))}

    progress, timer = Progress(first, num_steps), Timer()
    resources.callback(progress.close)
    is_stop_requested = resources.enter_context(stop_requests())
    source = resources.enter_context(open_source(setup, workdir, first, is_stop_requested))
    if config.optimizer.teacher_ema_decay:
        source.copy_teacher = lambda: weights_of(teacher_weights(state))
    on_process_zero(startup.announce)
    if not first:
        _evaluate(setup, workdir, 0, copy_weights, writer)
    else:
        _evaluate(setup, workdir, 0, partial(initial_weights, setup), None)
        if not latest:
            save(first)  # from now on the optimizer of the other run is not needed
    source.publish(first, copy_weights, timer)
    last = first if _is_out_of_patience(config, workdir, first) else num_steps
    for step in range(first, last):
        done = step + 1
        try:
            data = source.next(step, timer)
        except SourceStoppedError as error:
            if step > (checkpointer.latest_step or 0) and not int(state.nonfinite_streak):
                save(step)
            checkpointer.wait()
            stopped = is_stop_requested(step) and _stopped(step, checkpointer, mirror)
            raise (stopped or error) from error.__cause__
        current = with_current_teacher(setup, source.teacher_params)
        if _is_due(done, config.log.samples_every) or (config.log.samples_every and done == 1):
            params = copy_weights() if source.params is None else source.params
            rows = sample_rows(current, examine, params, data, done)
            on_process_zero(partial(append_lines, workdir / "samples.jsonl", rows))
            del params
        with timer.phase("teacher"):
            batch, teacher_head = jax.block_until_ready(
                scored(current, data.rows, spec.estimator.teacher)
            )
        extra = unfiltered_kl(step)
        with timer.phase("update"):
            state, metrics = update(state, batch, teacher_head, frozen)
            # The update runs asynchronously: the host works while the device computes.
            extra |= rollout_metrics(data.rollouts, setup.decoding, step)
            extra |= data.metrics | token_counts(config, data, step)
            source.prefetch(done)
            metrics = jax.tree.map(float, jax.device_get(metrics)) | extra
        if step == first:
            on_process_zero(startup.first_step_done)
        # Only rollouts of the current weights must have the log-probs that the update computes.
        if step == first and np.all(np.asarray(data.rollouts.policy_version) == step):
            enforce(check_first_step(setup, data.batch, data.rollouts, metrics))
        # Frees what was computed with the old weights before the new ones are copied.
        del current, teacher_head, batch, data

        if config.near_policy.schedule != "none":
            spans = [span | {"step": done, "version": done} for span in timer.spans]
            on_process_zero(partial(append_lines, workdir / _TIMELINE, spans))
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
        is_evaluated = done == num_steps or _is_due(done, config.evaluation.every)
        scores = _evaluate(setup, workdir, done, copy_weights, writer) if is_evaluated else None
        is_last = done == num_steps or _is_out_of_patience(config, workdir, done)
        is_stopped = is_stop_requested(done) and not is_last
        # Sampling for coming epochs takes long, so a checkpoint is saved before it.
        is_due = _is_due(done, config.checkpoint.every) or done in config.refresh_steps
        # In a streak there is nothing new to save, and the last good step must not be deleted.
        if is_last or (streak == 0 and (is_evaluated or is_stopped or is_due)):
            source.commit(done, timer)
            save(done, scores)
        if is_stopped:
            raise _stopped(done, checkpointer, mirror)
        if is_last:
            break
        source.publish(done, copy_weights, timer)
    progress.close()
    _evaluate(setup, workdir, int(state.step), copy_weights, None)  # if no step was taken
    checkpointer.wait()
    _finish(setup, mirror, whole_student(setup, state.params, frozen), state, spec.dtype)


def _open_checkpoints(
    config: Config, mirror: WorkdirMirror, state: TrainState
) -> tuple[Checkpointer, TrainState]:
    """The checkpoints of a run, and the state of the newest: `state` if there is none. With
    on_damage = previous, damaged ones are renamed.
    """
    while True:
        checkpointer = None
        try:
            make = partial(Checkpointer, mirror.checkpoints, keep=config.checkpoint.keep)
            checkpointer = on_all(make)
            if latest := checkpointer.latest_step:
                state = checkpointer.restore(latest, state, on_all)
            return checkpointer, state
        except (UnreadableCheckpointError, OtherFailedError) as error:
            if checkpointer is not None:
                checkpointer.close()
            if config.checkpoint.on_damage == "stop":
                raise
            if isinstance(error, UnreadableCheckpointError):
                path = error.path
            else:  # another process could not read it
                path = f"{mirror.checkpoints}/{checkpointer.latest_step}"
            moved = on_process_zero(partial(set_aside, path))
            if is_process_zero():
                print(f"note: {error}\nnote: it is now {moved}; the one before it is used")


def _is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after this step."""
    return bool(every) and step % every == 0


def _stopped(done: int, checkpointer: Checkpointer, mirror: WorkdirMirror) -> InterruptedRunError:
    checkpointer.wait()
    latest = checkpointer.latest_step
    kept = f"step {latest} is saved" if latest else "nothing is saved yet"
    return InterruptedRunError(
        f"stopped after step {done}, as asked by a signal; {kept}, and the same command continues "
        f"{mirror.name}"
    )


def _evaluate(
    setup: Setup,
    workdir: pathlib.Path,
    step: int,
    copy_weights: Callable[[], Params],
    writer: MetricWriter | None,
) -> dict[str, float] | None:
    """Evaluate the student of a step, unless that was done, and send the scores to the trackers.

    Return them, with the divergences from the teacher; None without an evaluation.
    """
    scores = evaluate(setup.evaluator, workdir, step, copy_weights) or {}
    scores = scores | measure(setup.divergence, workdir, step, copy_weights)
    sent = {f"eval/{name}": value for name, value in scores.items()}
    on_process_zero(lambda: writer.send(step, sent) if sent and writer is not None else None)
    return scores or None


def _is_out_of_patience(config: Config, workdir: pathlib.Path, step: int) -> bool:
    """Whether early stopping ends the run after this step."""
    patience = config.train.early_stopping_patience
    if not patience or not _is_due(step, config.evaluation.every):
        return False
    count = lambda: evaluations_since_best(workdir, config, step)
    return agreed((on_process_zero(count) or 0) >= patience)


def _nonfinite_message(
    done: int, streak: int, checkpointer: Checkpointer, mirror: WorkdirMirror
) -> str:
    kept = f"the last good checkpoint in {mirror.checkpoints} is step {checkpointer.latest_step}"
    if checkpointer.latest_step is None:
        kept = "there is no good checkpoint yet"
    return (
        f"steps {done - streak + 1} to {done} had no finite loss or gradient; {kept}. Lower "
        "optimizer.learning_rate or check the models"
    )


def _upload_logs(counter: RowCounter, mirror: WorkdirMirror, step: int) -> dict[str, Any]:
    """Upload all files, which a checkpoint of this step implies; returns the rows before it."""
    rows = counter.until(step)
    mirror.upload()
    return rows


def _truncate_logs(setup: Setup, workdir: pathlib.Path, step: int, before: dict[str, Any]) -> None:
    """Drop log rows written after the checkpoint we resume from, which has those `before` it.
    WorkdirError, before anything is dropped, if the checkpoint is missing.
    """
    if step:
        print(f"continuing from step {step} of {setup.config.train.num_steps}")
    check_logs(workdir, step, before)
    logs = {name: read_lines(workdir / name) for name in LOGS}
    reached = max([row["step"] for row in logs["metrics.jsonl"]], default=0)
    # A run may be killed while it saves its first checkpoint, after a streak of skipped steps.
    possible = 2 * setup.config.checkpoint.every + MAX_NONFINITE_STEPS
    if step == 0 and reached > possible:
        raise WorkdirError(
            f"{workdir} has metrics up to step {reached} and no checkpoint; put checkpoints back "
            "or start in a new work directory"
        )
    for name in LOGS:
        cut_lines(workdir / name, step)


def _finish(
    setup: Setup, mirror: WorkdirMirror, params: Params, state: TrainState, dtype: str
) -> None:
    """Export the student, write result.json last, and print the scores."""
    config, out = setup.config, mirror.directory / "student"
    done, skipped = int(state.step), int(state.num_skipped)

    def clear() -> None:  # a run that was killed may have left parts of them
        for name in ("student", "student_adapter"):
            shutil.rmtree(mirror.directory / name, ignore_errors=True)

    def write() -> None:
        counts = {"num_steps": done, "skipped_steps": skipped}
        counts["skipped_prompts"] = setup.prompts.num_skipped
        result = make_result(config, mirror.directory, counts, out.name)
        if done < config.train.num_steps:
            count = config.train.early_stopping_patience
            reason = f"step {done}: {count} evaluations without a better score"
            print(f"stopped after {reason}; opdjax export {mirror.name} --step best has the best")
        if config.evaluation.source is not None:
            print(result_table(result))
        write_json(mirror.directory / "result.json", result)

    on_process_zero(clear)
    export = partial(export_student, params, setup.student, config, mirror.directory, out)
    on_all(lambda: export(dtype, done))
    on_process_zero(write)
    on_process_zero(mirror.finish)


class _CallableModule(types.ModuleType):
    """`opdjax.train` is this module and, for users of the library, its function."""

    def __call__(self, config: Config, workdir: str | pathlib.Path) -> dict[str, Any]:
        return train(config, workdir)


sys.modules[__name__].__class__ = _CallableModule
