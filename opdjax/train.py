"""The loop: sample, pack, score, update, report.

`train(config, workdir)` runs a config to its end, or continues it: what is in the work directory is the whole state of a
run, and everything drawn is a pure function of (seed, step), so a run that was killed ends where an unbroken one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from opdjax.config import Config
from opdjax.data.packing import answer_rows, as_teacher_sees, filling, pack, to_train_batch
from opdjax.data.prompts import collate, indices_at
from opdjax.doctor import check_first_step, check_settings
from opdjax.estimators import RECIPES, bind
from opdjax.evals.evaluate import completions
from opdjax.evals.passk import paired_difference
from opdjax.fields import ConfigError
from opdjax.metrics import MetricWriter, Progress, Timer
from opdjax.models.decoder import Params, abstract_params
from opdjax.models.hf import Checkpoint, export, export_adapter, load_params
from opdjax.models.layout import constrain, shardings_of
from opdjax.models.lora import combine, init_adapters
from opdjax.ops.tile import Head
from opdjax.prepare import Setup, as_of_step, facts, load_student, open_student, prepare, update_spec, with_credit
from opdjax.processes import InterruptedRunError, agreed, join, on_all, on_lead, stop_requests
from opdjax.results import read_result
from opdjax.sampler import sample
from opdjax.scoring.local import score
from opdjax.sharding import is_lead, make_mesh, num_row_shards, shard_rows, to_host
from opdjax.train_state import init_state, make_examine, make_optimizer, make_update
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch
from opdjax.workdir import WorkdirError, append_lines, claim, cut_lines, locked, read_config, read_lines, require_local, write_json

_ALTERNATIVES = 5  # of the teacher, written beside each token of the samples


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def train(config: Config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Run `config` in `workdir` and return its result, which is also `result.json`; a finished run is only reported."""
    require_local(workdir, "--workdir")
    workdir = pathlib.Path(workdir)
    bind(config.estimator.recipe, config.estimator.options)
    join(config.mesh.processes)
    with contextlib.ExitStack() as opened:
        on_lead(lambda: opened.enter_context(locked(workdir)))
        setup = on_all(lambda: prepare(config))
        described = on_all(lambda: facts(setup))
        is_finished = agreed(bool(on_lead(lambda: _open(workdir, setup, described))))
        if not is_finished:
            enforce(check_settings(setup))
            _run(setup, workdir, opened)
        return read_result(workdir)


def _open(workdir: pathlib.Path, setup: Setup, described: dict[str, Any]) -> bool:
    """Claim the directory and say what is to be said before a run; whether it holds a finished one."""
    claim(workdir, setup.config, described)
    for prompts in (setup.prompts, setup.evaluator.prompts if setup.evaluator else None):
        if prompts is not None and prompts.skipped:
            print(f"left out {prompts.num_skipped} prompts over {setup.config.data.max_prompt_length} tokens, first {prompts.skipped[0]}")
    if not (workdir / "result.json").exists():
        return False
    print(f"{workdir} holds a finished run")
    result = read_result(workdir)
    if "eval_after" in result:
        print(result_table(result))
    return True


def _run(setup: Setup, workdir: pathlib.Path, opened: contextlib.ExitStack) -> None:
    config = setup.config
    spec, needs = update_spec(setup), bind(config.estimator.recipe, config.estimator.options)[0].teacher
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    checkpointer = Checkpointer(workdir / "checkpoints", keep=config.checkpoint.keep, best_metric=config.checkpoint.best_metric)
    opened.callback(checkpointer.close)

    trained, frozen = load_student(setup)
    state = init_state(trained, optimizer, setup.mesh, spec.split_over)
    del trained  # the state holds copies of its own
    update = make_update(spec, config.optimizer, config.train.num_steps, jax.tree.map(lambda x: x.sharding, state))
    first = checkpointer.latest_step or 0
    if first:
        state = checkpointer.restore(first, state)
    on_lead(lambda: _cut_back(setup, workdir, first))
    writer = on_lead(lambda: MetricWriter(workdir, last_step=first, tensorboard=config.log.tensorboard))
    if writer is not None:
        opened.callback(writer.close)
    # Copied even in the same type: the update writes over the state's arrays, and may read what was published as its teacher's head.
    copied = jax.jit(partial(_published, setup))
    beside = frozen and jax.device_put(frozen, shardings_of(frozen, setup.mesh, config.sampling.split_over))  # no copy where they lie so
    publish = lambda params: combine(beside, copied(params))  # noqa: E731
    evaluate = partial(_evaluate, setup, workdir)
    examine = make_examine(spec, _ALTERNATIVES)

    published = publish(state.params)
    evaluate(0, published)
    progress, timer = Progress(first, config.train.num_steps), Timer()
    opened.callback(progress.close)
    is_stop_asked = opened.enter_context(stop_requests())
    following = _prompts_of(setup, first)
    for step in range(first, config.train.num_steps):
        prompts, params = following, published
        current = as_of_step(setup, params)
        with timer.phase("sample"):
            rollouts = to_host(_rollouts(current, params, prompts, step))
        done = step + 1
        with timer.phase("pack"):
            unpacked, told = with_credit(setup, to_train_batch(rollouts, prompts), rollouts)
            unscored, filled = _packed(setup, unpacked)
        if config.log.samples_every and (done % config.log.samples_every == 0 or done == 1):
            rows = _sample_rows(current, examine, params, rollouts, unpacked, done)
            on_lead(lambda: append_lines(workdir / "samples.jsonl", rows))  # noqa: B023 (called at once)
        with timer.phase("teacher"):
            batch, teacher_head = jax.block_until_ready(_score(current, unscored, needs))
        with timer.phase("update"):
            state, metrics = update(state, batch, teacher_head, frozen)
            # The update is only dispatched: while the device works, the host does what does not wait for it.
            told |= filled | _rollout_metrics(setup, rollouts, step) | _token_counts(setup, unpacked)
            following = _prompts_of(setup, done)
            metrics = jax.tree.map(float, jax.device_get(metrics)) | told
        if step == first:
            enforce(check_first_step(setup, unpacked, rollouts, prompts, metrics))

        metrics |= (seconds := timer.take())
        metrics["perf/tokens_per_second"] = metrics["perf/trained_tokens"] / seconds["time/step"]
        on_lead(lambda: writer.write(done, metrics))  # noqa: B023 (called at once)
        if is_lead():
            progress.show(done, metrics)
        # Weights are published once a step, and the old ones let go before.
        del params, current, published, teacher_head, batch
        published = publish(state.params)
        streak = int(state.nonfinite_streak)
        if streak >= config.train.max_nonfinite_steps:
            checkpointer.wait()
            raise NonFiniteLossError(
                f"steps {done - config.train.max_nonfinite_steps + 1} to {done} had no finite loss or gradient; the last good checkpoint "
                f"in {workdir / 'checkpoints'} is step {checkpointer.latest_step or 'none'}. Lower the learning rate or check the models"
            )
        is_last = done == config.train.num_steps
        is_evaluated = is_last or (config.evaluation.every and done % config.evaluation.every == 0)
        scores = evaluate(done, published) if is_evaluated else None
        is_stopped = is_stop_asked(done) and not is_last
        # In the middle of a streak nothing new is worth keeping, and the last good step must not be pushed out.
        if is_last or (streak == 0 and (is_evaluated or is_stopped or done % config.checkpoint.every == 0)):
            checkpointer.save(done, state, scores)
        if is_stopped:
            checkpointer.wait()
            raise InterruptedRunError(f"stopped after step {done}, as asked by a signal; the same command continues {workdir}")
    progress.close()
    checkpointer.wait()
    on_lead(lambda: _clear_exports(workdir))
    exported = on_all(lambda: _export_student(config, setup.student, combine(frozen, state.params), workdir / "student", spec.dtype))
    on_lead(lambda: _finish(setup, workdir, exported, int(state.num_skipped)))


def _published(setup: Setup, params: Params) -> Params:
    """The weights that rollouts are drawn with, cast before they are sent."""
    copies = jax.tree.map(lambda x: jnp.array(x, setup.dtype, copy=True), params)
    return constrain(copies, setup.mesh, setup.config.sampling.split_over)


def _cut_back(setup: Setup, workdir: pathlib.Path, step: int) -> None:
    """Drop the rows after the checkpoint that the run continues from; nothing is touched where what must be there before it is not."""
    config, names = setup.config, ("metrics.jsonl", "samples.jsonl", "eval.jsonl")
    if step:
        print(f"continuing from step {step}")
    metrics, _, evaluations = (read_lines(workdir / name) for name in names)
    # One checkpoint may be in the making and one streak of skipped steps behind it when a run is killed.
    reached, within = max([row["step"] for row in metrics], default=0), 2 * config.checkpoint.every + config.train.max_nonfinite_steps
    if step == 0 and reached > within:
        raise WorkdirError(
            f"{workdir} has metrics up to step {reached} and no checkpoint; put checkpoints back or start in a new work directory"
        )
    evaluation, found = config.evaluation, {(row["step"], row["temperature"]) for row in evaluations}
    wanted = {(0, temperature) for temperature in (evaluation.temperature, *evaluation.extra_temperatures)}
    if step and setup.evaluator is not None and not wanted <= found:
        raise WorkdirError(
            f"{workdir / 'eval.jsonl'} lacks the evaluation of step 0, whose parameters are gone; put it back or use a new work directory"
        )
    for name in names:
        cut_lines(workdir / name, step)


def _prompts_of(setup: Setup, step: int) -> PromptBatch:
    config = setup.config
    return collate(setup.prompts, indices_at(step, config.train.prompts_per_step, len(setup.prompts), config.seed))


def _packed(setup: Setup, batch: TrainBatch) -> tuple[TrainBatch, Metrics]:
    """The rows that are scored and trained on, and how well they are filled; the batch itself where rows are not shared."""
    train = setup.config.train
    if train.pack_length is None:
        return batch, {}
    packed, source = pack(batch, train.pack_length, parts=train.gradient_accumulation_steps, shards=num_row_shards(setup.mesh))
    return packed, filling(source)


def _rollouts(setup: Setup, params: Params, prompts: PromptBatch, step: int) -> Rollouts:
    """The step's completions: drawn from the student, or answers written by the teacher or found in the data."""
    config, sampling = setup.config, setup.config.sampling
    columns = setup.prompts.columns(of_teacher=sampling.source == "teacher")
    draw = partial(
        sample, num_generations=sampling.num_generations, mesh=setup.mesh, slots=sampling.slots, prompt_columns=columns
    )  # fmt: skip
    if sampling.source == "student":
        return draw(params, prompts, config.seed, step, config=setup.student.config, decoding=setup.decoding)
    if sampling.source == "references":
        return answer_rows(prompts, _reference_answers(setup, prompts, step), sampling.max_completion_length, step)
    teacher = setup.teacher
    written = draw(teacher.params, as_teacher_sees(prompts), config.seed, step, config=teacher.checkpoint.config, decoding=teacher.decoding)
    written = to_host(written)
    rows = answer_rows(prompts, _as_student_ids(setup, written), sampling.max_completion_length, step)
    is_truncated = rows.is_truncated | np.asarray(written.is_truncated)
    return dataclasses.replace(rows, sample_id=np.asarray(written.sample_id), is_truncated=is_truncated)


def _reference_answers(setup: Setup, prompts: PromptBatch, step: int) -> list[list[int]]:
    """Each prompt's references in turn, over its generations and over the epochs."""
    answers, count = [], setup.config.sampling.num_generations
    for place, index in enumerate(np.asarray(prompts.prompt_id)):
        texts = setup.prompts.prompts[index].references
        epoch = (step * setup.config.train.prompts_per_step + place) // len(setup.prompts)
        chosen = [texts[(epoch * count + number) % len(texts)] for number in range(count)]
        answers += [[*setup.tokenizer.encode(text, add_special_tokens=False), _end_token(setup)] for text in chosen]
    return answers


def _as_student_ids(setup: Setup, written: Rollouts) -> list[list[int]]:
    """The teacher's answers as it wrote them, ended as the student ends; through their text where its tokenizer is another one."""
    teacher, answers = setup.teacher, []
    texts = [None] * written.tokens.shape[0] if teacher.shares_vocabulary else completions(written, teacher.tokenizer)
    for text, row, keep, is_cut in zip(texts, *map(np.asarray, (written.tokens, written.mask, written.is_truncated))):
        # An answer that was cut off has no end to teach; an end that the student does not stop at would teach it to run on.
        body = row[keep].tolist()[: None if is_cut else -1]
        body = body if text is None else setup.tokenizer.encode(text, add_special_tokens=False)
        answers.append(body if is_cut else [*body, _end_token(setup)])
    return answers


def _end_token(setup: Setup) -> int:
    """The stop token that the student ends its answers with."""
    stop, end = setup.decoding.stop_token_ids, setup.tokenizer.eos_token_id
    return end if end in stop else stop[0]


def _score(setup: Setup, batch: TrainBatch, needs: str) -> tuple[TrainBatch, Head | None]:
    """The batch with what its recipe needs of the teacher, and the teacher's head where the recipe wants to use it."""
    batch = shard_rows(batch, setup.mesh)
    if needs == "none":
        return batch, None
    teacher, tile = setup.teacher, setup.config.estimator.tile
    parts = setup.config.train.gradient_accumulation_steps if batch.tokens.shape[0] == setup.config.rows_per_step else 1
    scores = score(
        teacher.params, teacher.head, batch, config=teacher.checkpoint.config, needs=needs, tile=tile, parts=parts, mesh=setup.mesh
    )
    return dataclasses.replace(batch, teacher=scores), teacher.head if needs == "vocabulary" else None


def _rollout_metrics(setup: Setup, rollouts: Rollouts, step: int) -> Metrics:
    """Lengths in tokens, how completions ended, and by how many updates their policy is older than the one trained."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    lengths, staleness = mask.sum(axis=1), step - np.asarray(rollouts.policy_version)
    last = tokens[np.arange(len(tokens)), mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)]
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_min": float(lengths.min()),
        "rollout/length_p50": float(np.median(lengths)),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_ratio": float(np.asarray(rollouts.is_truncated).mean()),
        "rollout/eos_rate": float((np.isin(last, setup.decoding.stop_token_ids) & (lengths > 0)).mean()),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }


def _token_counts(setup: Setup, batch: TrainBatch) -> Metrics:
    """What the step cost in tokens: drawn from the student, trained on, and read or written by the teacher, prompts included."""
    config, trained = setup.config, float(np.asarray(batch.mask).sum())
    passes = (RECIPES[config.estimator.recipe].teacher != "none") + (config.sampling.source == "teacher")
    seen = (batch.teacher_view or batch).segment_ids
    return {
        "perf/generated_tokens": trained if config.sampling.source == "student" else 0.0,
        "perf/trained_tokens": trained,
        "perf/teacher_tokens": passes * float((np.asarray(seen) > 0).sum()),
    }


def _sample_rows(setup: Setup, examine, params: Params, rollouts: Rollouts, batch: TrainBatch, step: int) -> list[dict[str, Any]]:
    """The first rollouts of a step, each token with what the recipe makes of it and what the teacher would have preferred."""
    devices = num_row_shards(setup.mesh)
    count = min(-(-setup.config.log.num_samples // devices) * devices, rollouts.tokens.shape[0])
    first, few = jax.tree.map(lambda x: np.asarray(x)[:count], (rollouts, batch))
    is_comparable = setup.teacher is not None and setup.teacher.shares_vocabulary
    few, teacher_head = _score(setup, few, "vocabulary" if is_comparable else "none")
    seen = to_host(examine(params, few, teacher_head))
    texts = completions(first, setup.tokenizer)
    rows = []
    for row in range(min(setup.config.log.num_samples, count)):
        prompt = int(first.prompt_id[row])
        rows.append({
            "step": step, "prompt_id": prompt, "sample_id": int(first.sample_id[row]),
            "prompt": setup.prompts.prompts[prompt].prompt, "completion": texts[row], "length": int(first.mask[row].sum()),
            "is_truncated": bool(first.is_truncated[row]),
            **_token_columns(setup.tokenizer, first.tokens[row], first.mask[row], {name: value[row] for name, value in seen.items()}),
        })  # fmt: skip
    return rows


def _token_columns(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray, seen: dict[str, np.ndarray]) -> dict[str, Any]:
    """Lists over the completion's tokens: the pieces of text, nats, and the teacher's alternatives with their probabilities."""
    names = {"advantage": "advantages", "reward": "rewards", "kl": "kl"}
    names |= {"student_logprob": "student_logprobs", "teacher_logprob": "teacher_logprobs"}
    columns: dict[str, Any] = {"tokens": [tokenizer.decode([token]) for token in tokens[mask].tolist()]}
    for name, column in names.items():
        # JSON has no NaN and no infinity.
        columns[column] = [round(v, 4) if np.isfinite(v) else None for v in seen[name][mask].tolist()] if name in seen else None
    columns["teacher_top"] = None
    if "alternatives" in seen:
        pairs = zip(seen["alternatives"][mask].tolist(), np.exp(seen["alternative_logprobs"][mask]).tolist())
        columns["teacher_top"] = [[[tokenizer.decode([i]), round(p, 4)] for i, p in zip(ids, probs)] for ids, probs in pairs]
    return columns


def _evaluate(setup: Setup, workdir: pathlib.Path, step: int, params: Params | None) -> dict[str, float] | None:
    """Append this step's scores to eval.jsonl unless they are there; at step 0 the extra temperatures as well."""
    if setup.evaluator is None:
        return None
    file, config = workdir / "eval.jsonl", setup.config.evaluation
    found = {(row["step"], row["temperature"]): row for row in read_lines(file)}
    measured = setup.evaluator, setup.evaluator.sampled
    wanted = [(config.temperature, lambda: measured[0](params))]
    wanted += [(at, partial(measured[1], params, at)) for at in (config.extra_temperatures if step == 0 else ())]
    for temperature, measure in wanted:
        if agreed((step, temperature) not in found):
            found[step, temperature] = {"step": step, **measure()}
            on_lead(lambda: append_lines(file, [found[step, temperature]]))  # noqa: B023 (called at once)
            if temperature == config.temperature and is_lead():
                print(f"evaluation at step {step}: {_score_line(found[step, temperature])}")
    return {name: found[step, config.temperature][name] for name in ("avg@k", "pass@k", "greedy")}


def _score_line(scores: dict[str, Any]) -> str:
    return "  ".join(f"{name} {scores[name]:.3f}" for name in ("avg@k", "pass@k", "greedy"))


def _clear_exports(workdir: pathlib.Path) -> None:
    """Remove what a run wrote that was killed before it had its result."""
    for name in ("student", "student_adapter"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def _export_student(config: Config, source: Checkpoint, params: Params, out: pathlib.Path, dtype: str | None) -> pathlib.Path:
    """The student as a Hugging Face checkpoint, and its adapters, where it has any, as `OUT_adapter` beside it."""
    export(params, source, out, dtype)
    if config.lora.rank:
        export_adapter(params, source, config.lora, config.student, out.with_name(f"{out.name}_adapter"))
    return out


def export_step(workdir: pathlib.Path, step: str, out: pathlib.Path, dtype: str | None) -> pathlib.Path:
    """Write the student of one checkpoint (`latest`, `best` or a step) of a run as a Hugging Face checkpoint."""
    require_local(out, "the directory to export to,")
    config = read_config(workdir)
    source, lora = open_student(config), config.lora
    checkpointer = Checkpointer(
        workdir / "checkpoints", keep=config.checkpoint.keep, best_metric=config.checkpoint.best_metric, is_read_only=True
    )
    named = {"latest": checkpointer.latest_step, "best": checkpointer.best_step}
    wanted = named[step] if step in named else int(step) if step.isdecimal() else None
    if wanted not in checkpointer.steps:
        raise ConfigError(f"{workdir} has no checkpoint {step!r}; there are {checkpointer.steps} (best: {named['best']})")
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    mesh = _mesh_for_export(config)
    adapters = partial(init_adapters, source.config, lora, config.seed)
    trained = jax.eval_shape(adapters) if lora.rank else abstract_params(source.config, "float32")
    abstract = jax.eval_shape(partial(init_state, optimizer=optimizer, mesh=mesh), trained)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings_of(abstract, mesh))
    found = checkpointer.restore(wanted, like).params
    return _export_student(config, source, combine(load_params(source, "float32", mesh) if lora.rank else None, found), out, dtype)


def _mesh_for_export(config: Config) -> Mesh:
    """The run's own mesh where there are the devices for it, else one device."""
    try:
        return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ConfigError:
        return make_mesh(1)


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
        for name, counts, k in (("avg@k", "per_prompt", before["k"]), ("greedy", "per_prompt_greedy", 1)):
            mean, interval = paired_difference(np.array(before[counts]) / k, np.array(after[counts]) / k)
            difference |= {name: mean, f"{name}_interval": interval}
        result |= {"eval_before": before, "eval_after": after, "paired_difference": difference}
        result["eval_before_sharpened"] = [at[0, t] for t in config.evaluation.extra_temperatures]
        print(result_table(result))
    write_json(workdir / "result.json", result)


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
