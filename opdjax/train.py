"""The loop: sample, pack, score, update, report.

`train(config, workdir)` runs a config to its end, or continues it: what is in the work directory is
the whole state of a run, and everything drawn is a pure function of (seed, step), so a run that was
killed ends where an unbroken one does.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from opdjax.config import Config
from opdjax.engine.update import (
    init_state,
    make_behavior_kl,
    make_examine,
    make_optimizer,
    make_update,
)
from opdjax.models.decoder import Params
from opdjax.models.hf import Checkpoint
from opdjax.models.hf_export import export, export_adapter
from opdjax.models.lora import combine
from opdjax.models.partitioning import shardings_of
from opdjax.ops.multihost import (
    InterruptedRunError,
    agreed,
    join,
    on_all,
    on_process_zero,
    stop_requests,
)
from opdjax.ops.sharding import is_process_zero, shard_rows
from opdjax.rollouts.checks import check_first_step, check_settings
from opdjax.rollouts.findings import enforce
from opdjax.rollouts.near_policy.continuous import open_source
from opdjax.rollouts.on_policy import rollout_metrics, scored, token_counts
from opdjax.rollouts.samples import _sample_rows
from opdjax.rollouts.setup import (
    Setup,
    facts,
    load_student,
    prepare,
    published,
    update_spec,
    with_current_teacher,
)
from opdjax.rollouts.source import RolloutSource, SourceStoppedError
from opdjax.runs.checkpoint import Checkpointer
from opdjax.runs.metrics import MetricWriter, Progress, Timer
from opdjax.runs.mirror import WorkdirMirror, open_workdir, scratch_workdir
from opdjax.runs.object_store import is_remote, url_of
from opdjax.runs.results import read_result, result_table
from opdjax.runs.statistics import paired_difference
from opdjax.runs.workdir import (
    WorkdirError,
    append_lines,
    claim,
    cut_lines,
    locked,
    read_lines,
    write_json,
)
from opdjax.types import Metrics

_ALTERNATIVES = 5  # of the teacher, written scratch_workdir each token of the samples


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def train(config: Config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Run `config` in `workdir` and return its result, which is also `result.json`; a finished run
    is only reported.
    """
    join(config.mesh.processes)
    with contextlib.ExitStack() as opened:
        _require_home(config, workdir)
        mirror = on_process_zero(
            lambda: opened.enter_context(open_workdir(workdir))
        ) or scratch_workdir(workdir, jax.process_index())
        workdir = mirror.directory
        if config.near_policy.schedule != "none" and config.near_policy.generator != "process":
            on_process_zero(
                lambda: opened.enter_context(locked(workdir, "generator"))
            )  # it draws itself
        setup = on_all(lambda: prepare(config))
        described = on_all(lambda: facts(setup))
        is_finished = agreed(bool(on_process_zero(lambda: _open(mirror, setup, described))))
        if not is_finished:
            enforce(check_settings(setup))
            _run(setup, mirror, opened)
        mirror.download_result()
        return read_result(workdir)


def _require_home(config: Config, workdir: str | os.PathLike) -> None:
    """WorkdirError where processes would have to see each other's files in a directory that each
    has by itself.
    """
    near, num_processes = config.near_policy, jax.process_count()
    is_shared = near.generator == "process" or (
        num_processes > 1 and (near.schedule != "none" or config.is_judged)
    )
    if is_remote(workdir) and is_shared:
        expected = "expected one process (mesh.processes) and near_policy.generator inline or thread, or a mounted bucket"
        raise WorkdirError(
            f"--workdir {url_of(workdir)}: processes that share rollouts or rubrics need a file system; {expected}"
        )


def _open(mirror: WorkdirMirror, setup: Setup, described: dict[str, Any]) -> bool:
    """Claim the directory and say what is to be said before a run; whether it holds a finished one."""
    claim(mirror.directory, setup.config, described)
    for prompts in (setup.prompts, setup.evaluator.prompts if setup.evaluator else None):
        if prompts is not None and prompts.skipped:
            print(
                f"left out {prompts.num_skipped} prompts over {setup.config.data.max_prompt_length} tokens, first {prompts.skipped[0]}"
            )
    if not (mirror.directory / "result.json").exists():
        mirror.upload()  # others see that it has begun
        return False
    print(f"{mirror.name} holds a finished run")
    result = read_result(mirror.directory)
    if "eval_after" in result:
        print(result_table(result))
    return True


def _run(setup: Setup, mirror: WorkdirMirror, opened: contextlib.ExitStack) -> None:
    config, workdir = setup.config, mirror.directory
    spec = update_spec(setup)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    checkpointer = Checkpointer(
        mirror.checkpoints, keep=config.checkpoint.keep, best_metric=config.checkpoint.best_metric
    )
    opened.callback(checkpointer.close)

    trained, frozen = load_student(setup)
    state = init_state(trained, optimizer, setup.mesh, spec.split_over)
    del trained  # the state holds copies of its own
    update = make_update(
        spec, config.optimizer, config.train.num_steps, jax.tree.map(lambda x: x.sharding, state)
    )
    first = checkpointer.latest_step or 0
    if first:
        state = checkpointer.restore(first, state)
    on_process_zero(lambda: _cut_back(setup, workdir, first))
    writer = on_process_zero(
        lambda: MetricWriter(workdir, last_step=first, tensorboard=config.log.tensorboard)
    )
    if writer is not None:
        opened.callback(writer.close)
    # Copied even in the same type: the update writes over the state's arrays, and may read what was
    # published as its teacher's head.
    copied = jax.jit(partial(published, setup))
    scratch_workdir = frozen and jax.device_put(
        frozen, shardings_of(frozen, setup.mesh, config.sampling.split_over)
    )  # no copy where they lie so
    weights = lambda: combine(scratch_workdir, copied(state.params))
    evaluate = partial(_evaluate, setup, workdir)
    # Drawing rollouts for epochs to come takes long: what comes before it is kept first.
    is_kept = lambda step: step % config.checkpoint.every == 0 or step in config.refresh_steps

    def save(step: int, scores: dict[str, float] | None = None) -> None:
        on_process_zero(mirror.upload)  # first: a checkpoint stands for all that came before it
        checkpointer.save(step, state, scores)

    examine, behavior_kl = make_examine(spec, _ALTERNATIVES), make_behavior_kl(spec)

    progress, timer = Progress(first, config.train.num_steps), Timer()
    opened.callback(progress.close)
    is_stop_asked = opened.enter_context(stop_requests())
    source = opened.enter_context(_open_source(setup, workdir, first, is_stop_asked))
    evaluate(0, weights)
    source.publish(first, weights, timer)
    for step in range(first, config.train.num_steps):
        done = step + 1
        try:
            drawn = source.next(step, timer)
        except SourceStoppedError:
            if step > (checkpointer.latest_step or 0) and not int(state.nonfinite_streak):
                save(step)
            checkpointer.wait()
            raise
        current = with_current_teacher(setup, source.params)
        if config.log.samples_every and (done % config.log.samples_every == 0 or done == 1):
            rows = _sample_rows(current, examine, _shown(source, weights), drawn, done)
            # called at once
            on_process_zero(lambda: append_lines(workdir / "samples.jsonl", rows))  # noqa: B023
        with timer.phase("teacher"):
            batch, teacher_head = jax.block_until_ready(
                scored(current, drawn.rows, spec.estimator.teacher)
            )
        told = _probed(source, behavior_kl, state.params, frozen, setup, step, timer)
        with timer.phase("update"):
            state, metrics = update(state, batch, teacher_head, frozen)
            # The update is only dispatched: while the device works, the host does what does not
            # wait for it.
            told |= (
                rollout_metrics(setup, drawn.rollouts, step)
                | drawn.told
                | token_counts(setup, drawn)
            )
            source.prefetch(done)
            metrics = jax.tree.map(float, jax.device_get(metrics)) | told
        # Weights that have been trained since the rollouts were drawn must disagree with them.
        if step == first and np.all(np.asarray(drawn.rollouts.policy_version) == step):
            enforce(check_first_step(setup, drawn.batch, drawn.rollouts, drawn.prompts, metrics))

        # called at once
        on_process_zero(lambda: _keep_spans(setup, workdir, timer, done))  # noqa: B023
        metrics |= (seconds := timer.take())
        metrics["perf/tokens_per_second"] = metrics["perf/trained_tokens"] / seconds["time/step"]
        on_process_zero(lambda: writer.write(done, metrics))  # noqa: B023 (called at once)
        mirror.record_progress(step=done, num_steps=config.train.num_steps)
        if is_process_zero():
            progress.show(done, metrics)
        del (
            current,
            teacher_head,
            batch,
            drawn,
        )  # what was made with the old weights is let go before there are new ones
        streak = int(state.nonfinite_streak)
        if streak >= config.train.max_nonfinite_steps:
            checkpointer.wait()
            raise NonFiniteLossError(
                f"steps {done - config.train.max_nonfinite_steps + 1} to {done} had no finite loss or gradient; the last good checkpoint "
                f"in {mirror.checkpoints} is step {checkpointer.latest_step or 'none'}. Lower the learning rate or check the models"
            )
        is_last = done == config.train.num_steps
        is_evaluated = is_last or (config.evaluation.every and done % config.evaluation.every == 0)
        scores = evaluate(done, weights) if is_evaluated else None
        is_stopped = is_stop_asked(done) and not is_last
        # In the middle of a streak nothing new is worth keeping, and the last good step must not be
        # pushed out.
        if is_last or (streak == 0 and (is_evaluated or is_stopped or is_kept(done))):
            source.commit(done, timer)
            save(done, scores)
        if is_stopped:
            checkpointer.wait()
            raise InterruptedRunError(
                f"stopped after step {done}, as asked by a signal; the same command continues {mirror.name}"
            )
        if not is_last:
            source.publish(done, weights, timer)
    progress.close()
    checkpointer.wait()
    on_process_zero(lambda: _clear_exports(workdir))
    exported = on_all(
        lambda: _export_student(
            config, setup.student, combine(frozen, state.params), workdir / "student", spec.dtype
        )
    )
    on_process_zero(lambda: _finish(setup, workdir, exported, int(state.num_skipped)))
    on_process_zero(mirror.finish)


def _open_source(
    setup: Setup, workdir: pathlib.Path, first: int, is_stop_asked: Callable[[int], bool]
):
    """Where the batches come from, until it is closed."""
    if not setup.config.is_judged:
        return open_source(setup, workdir, first, is_stop_asked)
    from opdjax.rollouts.judged import open_judged  # its packages are an extra

    return open_judged(setup, workdir, first)


def _shown(source: RolloutSource, weights: Callable[[], Params]) -> Params:
    """The student's weights as they were published, copied only where the source keeps none."""
    return weights() if source.params is None else source.params


def _probed(
    source: RolloutSource,
    behavior_kl: Callable,
    params: Params,
    frozen: Params | None,
    setup: Setup,
    step: int,
    timer: Timer,
) -> Metrics:
    """How far the student has come from the policy that drew, on rollouts of which none was left
    out; every few steps.
    """
    every = setup.config.log.diagnostics_every
    if setup.config.near_policy.filter == "none" or not every:
        return {}
    if step % every:
        return {"staleness/kl_all": math.nan}
    with timer.phase("probe"):
        return {
            "staleness/kl_all": float(
                behavior_kl(params, shard_rows(source.probe(step), setup.mesh), frozen)
            )
        }


def _keep_spans(setup: Setup, workdir: pathlib.Path, timer: Timer, step: int) -> None:
    """What the learner did and when, where somebody else works scratch_workdir it."""
    if setup.config.near_policy.schedule != "none":
        append_lines(
            workdir / "timeline-learner.jsonl",
            [span | {"step": step, "version": step} for span in timer.spans],
        )


def _cut_back(setup: Setup, workdir: pathlib.Path, step: int) -> None:
    """Drop the rows after the checkpoint that the run continues from; nothing is touched where what
    must be there before it is not.
    """
    config, names = (
        setup.config,
        ("metrics.jsonl", "samples.jsonl", "eval.jsonl", "timeline-learner.jsonl", "rubrics.jsonl"),
    )
    if step:
        print(f"continuing from step {step}")
    metrics, _, evaluations, *_ = (read_lines(workdir / name) for name in names)
    # One checkpoint may be in the making and one streak of skipped steps behind it when a run is
    # killed.
    reached, within = (
        max([row["step"] for row in metrics], default=0),
        2 * config.checkpoint.every + config.train.max_nonfinite_steps,
    )
    if step == 0 and reached > within:
        raise WorkdirError(
            f"{workdir} has metrics up to step {reached} and no checkpoint; put checkpoints back or start in a new work directory"
        )
    evaluation, found = (
        config.evaluation,
        {(row["step"], row["temperature"]) for row in evaluations},
    )
    wanted = {
        (0, temperature) for temperature in (evaluation.temperature, *evaluation.extra_temperatures)
    }
    if step and setup.evaluator is not None and not wanted <= found:
        raise WorkdirError(
            f"{workdir / 'eval.jsonl'} lacks the evaluation of step 0, whose parameters are gone; put it back or use a new work directory"
        )
    for name in names:
        cut_lines(workdir / name, step)


def _evaluate(
    setup: Setup, workdir: pathlib.Path, step: int, weights: Callable[[], Params]
) -> dict[str, float] | None:
    """Append this step's scores to eval.jsonl unless they are there; at step 0 the extra
    temperatures as well.
    """
    if setup.evaluator is None:
        return None
    file, config = workdir / "eval.jsonl", setup.config.evaluation
    found = {(row["step"], row["temperature"]): row for row in read_lines(file)}
    measured = setup.evaluator, setup.evaluator.sampled
    wanted = [(config.temperature, measured[0])]
    wanted += [
        (at, partial(measured[1], temperature=at))
        for at in (config.extra_temperatures if step == 0 else ())
    ]
    missing = [(at, measure) for at, measure in wanted if agreed((step, at) not in found)]
    if missing:
        params = weights()
        for temperature, measure in missing:
            found[step, temperature] = {"step": step, **measure(params)}
            # called at once
            on_process_zero(lambda: append_lines(file, [found[step, temperature]]))  # noqa: B023
            if temperature == config.temperature and is_process_zero():
                print(f"evaluation at step {step}: {_score_line(found[step, temperature])}")
    return {name: found[step, config.temperature][name] for name in ("avg@k", "pass@k", "greedy")}


def _score_line(scores: dict[str, Any]) -> str:
    return "  ".join(f"{name} {scores[name]:.3f}" for name in ("avg@k", "pass@k", "greedy"))


def _clear_exports(workdir: pathlib.Path) -> None:
    """Remove what a run wrote that was killed before it had its result."""
    for name in ("student", "student_adapter"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def _export_student(
    config: Config, source: Checkpoint, params: Params, out: pathlib.Path, dtype: str | None
) -> pathlib.Path:
    """The student as a Hugging Face checkpoint, and its adapters, where it has any, as
    `OUT_adapter` scratch_workdir it.
    """
    export(params, source, out, dtype)
    if config.lora.rank:
        export_adapter(
            params, source, config.lora, config.student, out.with_name(f"{out.name}_adapter")
        )
    return out


def _finish(setup: Setup, workdir: pathlib.Path, exported: pathlib.Path, num_skipped: int) -> None:
    """Write result.json, last of all, and print what changed."""
    config = setup.config
    result: dict[str, Any] = {
        "recipe": config.estimator.recipe,
        "num_steps": config.train.num_steps,
        "rows_per_step": config.rows_per_step,
        "skipped_steps": num_skipped,
        "skipped_prompts": setup.prompts.num_skipped,
        "student": str(exported.relative_to(workdir)),
        "seconds": sum(row["time/step"] for row in read_lines(workdir / "metrics.jsonl")),
    }
    if setup.evaluator is not None:
        at = {(row["step"], row["temperature"]): row for row in read_lines(workdir / "eval.jsonl")}
        temperature = config.evaluation.temperature
        before, after = at[0, temperature], at[config.train.num_steps, temperature]
        difference = {}
        for name, counts, k in (
            ("avg@k", "per_prompt", before["k"]),
            ("greedy", "per_prompt_greedy", 1),
        ):
            mean, interval = paired_difference(
                np.array(before[counts]) / k, np.array(after[counts]) / k
            )
            difference |= {name: mean, f"{name}_interval": interval}
        result |= {"eval_before": before, "eval_after": after, "paired_difference": difference}
        result["eval_before_sharpened"] = [at[0, t] for t in config.evaluation.extra_temperatures]
        print(result_table(result))
    write_json(workdir / "result.json", result)
