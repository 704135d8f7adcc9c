"""The loop: sample, pack, score, update, report.

`train(config, workdir)` runs a config to its end, or continues it: what is in the work directory is the whole state of a
run, and everything drawn is a pure function of (seed, step), so a run that was killed ends where an unbroken one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opdjax.checkpoint import Checkpointer
from opdjax.checks import enforce
from opdjax.config import Config, ConfigError, DataConfig, ModelConfig
from opdjax.data.chat import check_same_vocabulary, load_tokenizer, valid_vocab
from opdjax.data.packing import to_train_batch
from opdjax.data.prompts import DataError, PromptSet, collate, encode_prompts, indices_at, read_prompts
from opdjax.doctor import Subject, check_first_step, check_settings
from opdjax.estimators import RECIPES, bind
from opdjax.evals.evaluate import Evaluator, completions
from opdjax.evals.grading import require_grader
from opdjax.evals.passk import paired_difference
from opdjax.metrics import MetricWriter, Progress, Timer
from opdjax.models.decoder import Params, head_of
from opdjax.models.hf import Checkpoint, CheckpointError, export, fingerprint, load_params, open_checkpoint
from opdjax.ops.vocab import Head
from opdjax.sampler import Decoding, sample
from opdjax.scoring.local import score
from opdjax.sharding import make_mesh, replicated, shard_rows
from opdjax.train_state import TrainState, UpdateSpec, init_state, make_optimizer, make_update
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch
from opdjax.workdir import WorkdirError, append_lines, claim, cut_lines, environment, locked, read_config, read_lines, write_json


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen model that supervises."""

    checkpoint: Checkpoint
    tokenizer: Any
    params: Params
    head: Head


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run works with and never changes."""

    config: Config
    mesh: Mesh
    student: Checkpoint
    dtype: str  # of the student's forward pass
    tokenizer: Any
    teacher: Teacher
    prompts: PromptSet
    decoding: Decoding
    evaluator: Evaluator | None


def train(config: Config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Run `config` in `workdir` and return its result, which is also `result.json`; a finished run is only reported."""
    if "://" in str(workdir) or str(workdir).startswith("gs:"):
        raise WorkdirError(
            f"--workdir {workdir} is not a local path; bucket paths are not supported yet, mount the bucket or copy afterwards"
        )
    workdir = pathlib.Path(workdir)
    bind(config.estimator.recipe, config.estimator.options)
    with locked(workdir), contextlib.ExitStack() as opened:
        setup = prepare(config)
        claim(workdir, config, _facts(setup))
        for prompts in (setup.prompts, setup.evaluator.prompts if setup.evaluator else None):
            if prompts is not None and prompts.skipped:
                print(f"left out {prompts.num_skipped} prompts over {config.data.max_prompt_length} tokens, first {prompts.skipped[0]}")
        if (workdir / "result.json").exists():
            print(f"{workdir} holds a finished run")
            result = json.loads((workdir / "result.json").read_text())
            if "eval_after" in result:
                print(result_table(result))
            return result
        enforce(check_settings(subject_of(setup)))
        return _run(setup, workdir, opened)


def _run(setup: Setup, workdir: pathlib.Path, opened: contextlib.ExitStack) -> dict[str, Any]:
    config = setup.config
    spec = UpdateSpec(
        model=setup.student.config,
        estimator=config.estimator,
        dtype=setup.dtype,
        max_completion_length=config.sampling.max_completion_length,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        temperature=config.sampling.temperature,
        valid_vocab=setup.decoding.valid_vocab,
        remat=config.train.remat,
        mesh=setup.mesh,
    )
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    update = make_update(spec, config.optimizer, config.train.num_steps)
    checkpointer = Checkpointer(workdir / "checkpoints", keep=config.checkpoint.keep, best_metric=config.checkpoint.best_metric)
    opened.callback(checkpointer.close)

    # Placed as `update` returns it, or the second step would compile again.
    state = init_state(load_params(setup.student, "float32", replicated(setup.mesh)), optimizer)
    state = jax.device_put(state, replicated(setup.mesh))
    first = checkpointer.latest_step or 0
    if first:
        state = checkpointer.restore(first, state)
        print(f"continuing from step {first}")
    for name in ("samples.jsonl", "eval.jsonl"):
        cut_lines(workdir / name, first)
    writer = MetricWriter(workdir, last_step=first, tensorboard=config.log.tensorboard)
    opened.callback(writer.close)
    publish = jax.jit(partial(jax.tree.map, lambda x: x.astype(setup.dtype)))
    evaluate = partial(_evaluate, setup, workdir)

    evaluate(0, publish(state.params) if first == 0 else None)
    progress, timer = Progress(first, config.train.num_steps), Timer()
    opened.callback(progress.close)
    for step in range(first, config.train.num_steps):
        prompts = collate(setup.prompts, indices_at(step, config.train.prompts_per_step, len(setup.prompts), config.seed))
        with timer.phase("sample"):
            rollouts = jax.block_until_ready(_sample(setup, publish(state.params), prompts, step))
        with timer.phase("teacher"):
            batch, teacher_head = jax.block_until_ready(_score(setup, to_train_batch(rollouts, prompts)))
        with timer.phase("update"):
            state, metrics = update(state, batch, teacher_head)
            metrics = jax.tree.map(float, jax.device_get(metrics))
        if step == first:
            enforce(check_first_step(batch, rollouts, prompts, metrics, setup.decoding, setup.dtype))

        done = step + 1
        metrics |= _rollout_metrics(rollouts)
        metrics |= (seconds := timer.take())
        metrics["perf/tokens_per_second"] = metrics["rollout/num_tokens"] / seconds["time/step"]
        writer.write(done, metrics)
        progress.show(done, metrics)
        if config.log.samples_every and (done % config.log.samples_every == 0 or done == 1):
            append_lines(workdir / "samples.jsonl", _sample_rows(setup, rollouts, done))
        streak = int(state.nonfinite_streak)
        if streak >= config.train.max_nonfinite_steps:
            checkpointer.wait()
            raise NonFiniteLossError(
                f"steps {done - config.train.max_nonfinite_steps + 1} to {done} had no finite loss or gradient; the last good checkpoint "
                f"in {workdir / 'checkpoints'} is step {checkpointer.latest_step or 'none'}. Lower the learning rate or check the models"
            )
        is_last = done == config.train.num_steps
        is_evaluated = is_last or (config.evaluation.every and done % config.evaluation.every == 0)
        scores = evaluate(done, publish(state.params)) if is_evaluated else None
        # In the middle of a streak nothing new is worth keeping, and the last good step must not be pushed out.
        if is_last or (streak == 0 and (is_evaluated or done % config.checkpoint.every == 0)):
            checkpointer.save(done, state, scores)
    progress.close()
    checkpointer.wait()
    exported = _export_student(setup, state, workdir / "student", spec.dtype)
    return _finish(setup, workdir, exported, int(state.num_skipped))


def prepare(config: Config) -> Setup:
    """Read and check everything a run needs, before anything is computed."""
    mesh = make_mesh(config.mesh.data)
    rows = config.rows_per_step
    if rows % (mesh.size * config.train.gradient_accumulation_steps):
        raise ConfigError(
            f"{rows} rows a step (train.prompts_per_step x sampling.num_generations) do not divide into "
            f"{config.train.gradient_accumulation_steps} micro-batches on {mesh.size} devices; change one of them"
        )
    student = open_checkpoint(config.student.path, config.student.revision)
    teacher = open_checkpoint(config.teacher.path, config.teacher.revision)
    tokenizer = load_tokenizer(student.path)
    teacher_tokenizer = load_tokenizer(teacher.path)
    check_same_vocabulary(tokenizer, teacher_tokenizer, config.estimator.recipe)
    width = valid_vocab(tokenizer)
    for name, checkpoint in (("student", student), ("teacher", teacher)):
        if checkpoint.config.vocab_size < width:
            raise CheckpointError(f"the {name}'s embedding has {checkpoint.config.vocab_size} rows, its tokenizer {width} ids")
    sampling = config.sampling
    beyond = [token for token in sampling.stop_token_ids if not 0 <= token < width]
    if beyond:
        raise ConfigError(f"sampling.stop_token_ids has {beyond}; expected ids from 0 to {width - 1}")
    decoding = Decoding(
        sampling.max_completion_length, stop_ids(student, tokenizer, sampling.stop_token_ids), sampling.temperature,
        sampling.top_k, sampling.top_p, sampling.min_p, valid_vocab=width,
    )  # fmt: skip
    prompts = encode_prompts(read_prompts(config.data.source), config.data, tokenizer, teacher_tokenizer)
    evaluator = make_evaluator(config, student, tokenizer, mesh)
    # The weights come last: what is wrong with the data is said before gigabytes are read.
    teacher_params = load_params(teacher, compute_dtype(config.teacher), replicated(mesh))
    # Both are compared at the sampling temperature: a student that equals its teacher has nothing to learn at any.
    teacher_head = head_of(teacher_params, valid_vocab=width, temperature=sampling.temperature)
    return Setup(
        config=config,
        mesh=mesh,
        student=student,
        dtype=compute_dtype(config.student),
        tokenizer=tokenizer,
        teacher=Teacher(teacher, teacher_tokenizer, teacher_params, teacher_head),
        prompts=prompts,
        decoding=decoding,
        evaluator=evaluator,
    )


def subject_of(setup: Setup) -> Subject:
    """The parts of a run that the doctor looks at."""
    teacher = setup.teacher
    return Subject(
        setup.config, setup.student, teacher.checkpoint, setup.tokenizer, teacher.tokenizer, setup.dtype, teacher.params, teacher.head,
        setup.prompts, setup.decoding,
    )  # fmt: skip


def make_evaluator(config: Config, student: Checkpoint, tokenizer: Any, mesh: Mesh | None) -> Evaluator | None:
    """The evaluation of a config, on the prompts that it names; None where it names none."""
    if config.evaluation.source is None:
        return None
    require_grader(config.evaluation.grader)
    student_view = {"teacher_format": None, "teacher_enable_thinking": None}
    if config.data.format == "raw":
        student_view["system_prompt"] = None  # it was the teacher's
    data: DataConfig = dataclasses.replace(config.data, source=config.evaluation.source, **student_view)
    rows = read_prompts(data.source)[: config.evaluation.num_prompts]
    unanswered = [number for number, row in enumerate(rows) if row.answer is None]
    if unanswered:
        raise DataError(f"prompt {unanswered[0]} of {data.source} has no 'answer' ({len(unanswered)} such rows); evaluation needs them")
    prompts = encode_prompts(rows, data, tokenizer, tokenizer)
    stop = stop_ids(student, tokenizer, config.sampling.stop_token_ids)
    return Evaluator(student.config, prompts, tokenizer, config.evaluation, stop, valid_vocab(tokenizer), mesh)


def stop_ids(checkpoint: Checkpoint, tokenizer: Any, more: tuple[int, ...] = ()) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config and of the tokenizer (ValueError where there are none), and `more`."""
    ids = {*checkpoint.stop_token_ids} | ({tokenizer.eos_token_id} - {None})
    if not ids:
        raise ConfigError(f"{checkpoint.path} names no end-of-sequence id; set eos_token_id in its generation_config.json")
    return tuple(sorted(ids | set(more)))


def compute_dtype(model: ModelConfig) -> str:
    """The type of a model's forward pass on this machine."""
    if model.dtype != "auto":
        return model.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _facts(setup: Setup) -> dict[str, Any]:
    evaluation = setup.evaluator.prompts.digest if setup.evaluator else None
    data = {
        "prompts": setup.prompts.digest,
        "evaluation": evaluation,
        "num_prompts": len(setup.prompts),
        "num_skipped": setup.prompts.num_skipped,
        "student": fingerprint(setup.student),
        "teacher": fingerprint(setup.teacher.checkpoint),
    }
    devices = [device.device_kind for device in setup.mesh.devices.flat]
    return {"data": data, "environment": environment(devices)}


def _sample(setup: Setup, params: Params, prompts: PromptBatch, step: int) -> Rollouts:
    sampling = setup.config.sampling
    return sample(
        params, prompts, setup.config.seed, step, config=setup.student.config, decoding=setup.decoding,
        num_generations=sampling.num_generations, mesh=setup.mesh,
    )  # fmt: skip


def _score(setup: Setup, batch: TrainBatch) -> tuple[TrainBatch, Head | None]:
    """The batch with what its recipe needs of the teacher, and the teacher's head where the recipe wants to use it."""
    batch = shard_rows(batch, setup.mesh)
    needs = RECIPES[setup.config.estimator.recipe].teacher
    teacher, tile = setup.teacher, setup.config.estimator.tile
    parts = setup.config.train.gradient_accumulation_steps
    scores = score(
        teacher.params, teacher.head, batch, config=teacher.checkpoint.config, needs=needs, tile=tile, parts=parts, mesh=setup.mesh
    )
    return dataclasses.replace(batch, teacher=scores), teacher.head if needs == "vocabulary" else None


def _rollout_metrics(rollouts: Rollouts) -> Metrics:
    lengths = np.asarray(rollouts.mask).sum(axis=1)
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_ratio": float(np.asarray(rollouts.is_truncated).mean()),
        "rollout/num_tokens": float(lengths.sum()),
    }


def _sample_rows(setup: Setup, rollouts: Rollouts, step: int) -> list[dict[str, Any]]:
    count = min(setup.config.log.num_samples, rollouts.tokens.shape[0])
    first = jax.tree.map(lambda x: np.asarray(x)[:count], rollouts)
    texts = completions(first, setup.tokenizer)
    return [
        {"step": step, "prompt_id": int(prompt), "sample_id": int(number), "prompt": setup.prompts.prompts[prompt].prompt,
         "completion": text, "length": int(row.sum()), "is_truncated": bool(truncated)}
        for prompt, number, text, row, truncated in zip(first.prompt_id, first.sample_id, texts, first.mask, first.is_truncated)
    ]  # fmt: skip


def _evaluate(setup: Setup, workdir: pathlib.Path, step: int, params: Params | None) -> dict[str, float] | None:
    """Append this step's scores to eval.jsonl unless they are there; at step 0 the extra temperatures as well."""
    if setup.evaluator is None:
        return None
    file = workdir / "eval.jsonl"
    found = {(row["step"], row["temperature"]): row for row in read_lines(file)}
    evaluation = setup.config.evaluation
    if (step, evaluation.temperature) not in found:
        if params is None:
            raise ValueError(f"{file} lacks the evaluation of step {step}, whose parameters are gone; start in a new work directory")
        scores = setup.evaluator(params)
        append_lines(file, [{"step": step, **scores}])
        found[step, evaluation.temperature] = scores
        print(f"evaluation at step {step}: {_score_line(scores)}")
    for temperature in evaluation.extra_temperatures if step == 0 else ():
        if (step, temperature) not in found:
            append_lines(file, [{"step": step, **setup.evaluator.sampled(params, temperature)}])
    return {name: found[step, evaluation.temperature][name] for name in ("avg@k", "pass@k", "greedy")}


def _score_line(scores: dict[str, Any]) -> str:
    return "  ".join(f"{name} {scores[name]:.3f}" for name in ("avg@k", "pass@k", "greedy"))


def _export_student(setup: Setup, state: TrainState, out: pathlib.Path, dtype: str) -> pathlib.Path:
    """The trained student as a Hugging Face checkpoint, in the type of its forward pass."""
    params = jax.tree.map(lambda x: np.asarray(x.astype(jnp.dtype(dtype))), state.params)
    shutil.rmtree(out, ignore_errors=True)  # of a run killed before it wrote its result
    return export(params, setup.student, out, dtype)


def export_step(workdir: pathlib.Path, step: str, out: pathlib.Path, dtype: str | None) -> pathlib.Path:
    """Write the student of one checkpoint (`latest`, `best` or a step) of a run as a Hugging Face checkpoint."""
    config = read_config(workdir)
    source = open_checkpoint(config.student.path, config.student.revision)
    checkpointer = Checkpointer(
        workdir / "checkpoints", keep=config.checkpoint.keep, best_metric=config.checkpoint.best_metric, is_read_only=True
    )
    named = {"latest": checkpointer.latest_step, "best": checkpointer.best_step}
    wanted = named[step] if step in named else int(step) if step.isdecimal() else None
    if wanted not in checkpointer.steps:
        raise ConfigError(f"{workdir} has no checkpoint {step!r}; there are {checkpointer.steps} (best: {named['best']})")
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    like = jax.eval_shape(partial(init_state, optimizer=optimizer), load_params(source, "float32"))
    return export(checkpointer.restore(wanted, like).params, source, out, dtype)


def _finish(setup: Setup, workdir: pathlib.Path, exported: pathlib.Path, num_skipped: int) -> dict[str, Any]:
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
        for name, counts, k in (("avg@k", "per_prompt", before["k"]), ("greedy", "per_prompt_greedy", 1)):
            mean, interval = paired_difference(np.array(before[counts]) / k, np.array(after[counts]) / k)
            difference |= {name: mean, f"{name}_interval": interval}
        result |= {"eval_before": before, "eval_after": after, "paired_difference": difference}
        result["eval_before_sharpened"] = [at[0, t] for t in config.evaluation.extra_temperatures]
        print(result_table(result))
    write_json(workdir / "result.json", result)
    return result


def result_table(result: dict[str, Any]) -> str:
    """Before and after, as a person reads it."""
    before, after, change = result["eval_before"], result["eval_after"], result["paired_difference"]
    k = before["k"]
    lines = [f"{'':32}{f'avg@{k}':>15}{f'pass@{k}':>15}{'greedy':>15}"]

    def row(title, scores):
        cells = [f"{scores[n]:.3f} ± {scores[n + '_interval']:.3f}" if n in scores else "" for n in ("avg@k", "pass@k", "greedy")]
        lines.append(f"{title:32}" + "".join(f"{cell:>15}" for cell in cells))

    row(f"student before, T = {before['temperature']:g}", before)
    for scores in result["eval_before_sharpened"]:
        row(f"student before, T = {scores['temperature']:g}", scores)
    row(f"student after, T = {after['temperature']:g}", after)
    gains = {name: f"{change[name]:+.3f} ± {change[name + '_interval']:.3f}" for name in ("avg@k", "greedy")}
    lines.append(f"{'gain, paired by prompt':32}{gains['avg@k']:>15}{'':>15}{gains['greedy']:>15}")
    lines.append(f"{before['num_prompts']} held-out prompts; ± is half a 95 % interval over prompts")
    return "\n".join(lines)
