"""The loop on the mini pair: a run is complete, resumes bit for bit, survives SIGKILL and
non-finite losses, and exports what it trained.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_runs import (
    SHORT,
    TINY,
    assert_equal_trees,
    assert_same_run,
    column,
    environment,
    final_weights,
    interrupted_at,
    recorded_updates,
    rewound,
    samples,
    start,
    vary,
    without_times,
)
from waiting import HANG, until

import opdjax.train
from opdjax.cli.export import export_step
from opdjax.config import MINI_PAIR, MINI_STUDENT, EvaluationConfig, ModelConfig
from opdjax.config.validation import ConfigError
from opdjax.data.chat import TokenizerMismatchError
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.evaluate import Evaluator
from opdjax.models.decoder import init_params
from opdjax.models.hf import fingerprint, load_params, open_checkpoint
from opdjax.models.hf_export import export
from opdjax.ops.multihost import InterruptedRunError
from opdjax.rollouts.setup import make_evaluator
from opdjax.runs.checkpoint import CheckpointShapeError, UnreadableCheckpointError
from opdjax.runs.metrics import MetricWriter
from opdjax.runs.results import read_run
from opdjax.runs.workdir import WorkdirError, cut_lines, read_lines
from opdjax.train import NonFiniteLossError, train

pytestmark = pytest.mark.usefixtures("shared_programs")

# An undisturbed run


def test_a_run_leaves_a_complete_work_directory(tiny_run):
    result = json.loads((tiny_run / "result.json").read_text())
    for name in ("eval_before", "eval_after"):
        assert {"avg@k", "pass@k", "greedy", "n", "k", "num_prompts"} <= result[name].keys()
        assert result[name]["num_prompts"] == 16
    assert [scores["temperature"] for scores in result["eval_before_sharpened"]] == [0.5]
    assert column(tiny_run, "step") == list(range(1, 7))
    assert sorted({row["step"] for row in samples(tiny_run)}) == [1, 2, 4, 6]
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["data"]["num_prompts"] == 64
    assert config["environment"]["jax"] == jax.__version__
    # The sampler and the trainer compute the same distribution.
    assert max(column(tiny_run, "rollout/logprob_gap")) < 1e-5
    assert min(column(tiny_run, "kl/student_teacher")) > 0
    assert set(column(tiny_run, "grad/skipped_steps")) == {0}


def test_the_update_is_compiled_once(tiny):
    _, num_programs = tiny
    assert num_programs == [1]


def test_a_finished_run_is_reported_not_repeated(tiny_run, capsys):
    before = (tiny_run / "metrics.jsonl").read_bytes()
    assert train(TINY, tiny_run) == json.loads((tiny_run / "result.json").read_text())
    assert (tiny_run / "metrics.jsonl").read_bytes() == before
    assert "finished run" in capsys.readouterr().out


def test_export_of_any_checkpoint(tiny_run, tmp_path):
    latest = export_step(tiny_run, "latest", tmp_path / "latest", None)
    assert_equal_trees(load_params(open_checkpoint(latest), "float32"), final_weights(tiny_run))
    earlier = export_step(tiny_run, "4", tmp_path / "four", "bfloat16")
    assert open_checkpoint(earlier).stored_dtype == "bfloat16"
    with pytest.raises(ConfigError, match="no checkpoint '3'.*there are"):
        export_step(tiny_run, "3", tmp_path / "three", None)


def test_exporting_keeps_what_a_run_is_writing(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    unfinished = run / "checkpoints" / "5.orbax-checkpoint-tmp"
    unfinished.mkdir()
    export_step(run, "latest", tmp_path / "out", None)
    assert unfinished.exists()


# Interrupted runs


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_an_interrupted_run_ends_like_an_undisturbed_one(batch, tiny_run, tmp_path):
    with interrupted_at(batch):
        train(TINY, tmp_path / "run")
    train(TINY, tmp_path / "run")
    assert_same_run(tiny_run, tmp_path / "run")


@pytest.mark.long
def test_a_damaged_checkpoint_stops_the_run_or_the_one_before_is_used(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "result.json").unlink()
    files = [file for file in run.glob("checkpoints/6/default/**/*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    for at in range(1000, len(data), 1000):
        data[at] ^= 4
    largest.write_bytes(data)
    with pytest.raises(UnreadableCheckpointError, match="checkpoint .*/6 is damaged: "):
        train(TINY, run)
    train(vary(checkpoint={"on_damage": "previous"}), run)
    assert "6.damaged; the one before it is used" in capsys.readouterr().out
    assert_same_run(tiny_run, run)


@pytest.mark.long
def test_lost_rows_of_a_log_are_said(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "result.json").unlink()
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:2] + rows[3:]))
    (run / "samples.jsonl").unlink()
    train(TINY, run)
    out = capsys.readouterr().out
    assert f"note: {run}/metrics.jsonl has 5 of the 6 rows up to step 6, others are lost" in out
    assert f"note: {run}/samples.jsonl has 0 of the " in out


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
    ids=["preemption", "Ctrl-C"],
)
def test_a_signal_stops_a_run_after_its_step_and_it_ends_like_an_undisturbed_one(
    number, tiny_run, tmp_path, monkeypatch
):
    """The step is kept, the error names it, and the same command continues."""
    real, handlers = MetricWriter.write, [signal.getsignal(n) for n in (number, signal.SIGTERM)]

    def write(self, step, metrics):
        real(self, step, metrics)
        if step == 3:
            os.kill(os.getpid(), number)

    expected = "stopped after step 3.*; step 3 is saved"
    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", write)
        with pytest.raises(InterruptedRunError, match=expected) as end:
            train(TINY, tmp_path / "run")
    assert end.value.exit_status == 128 + number
    assert handlers == [signal.getsignal(n) for n in (number, signal.SIGTERM)]
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    # Step 3 is not a multiple of `checkpoint.every`.
    assert sorted(name for name in names if name.isdigit()) == ["2", "3"]
    train(TINY, tmp_path / "run")
    assert_same_run(tiny_run, tmp_path / "run")


def test_a_killed_run_ends_like_an_undisturbed_one(tiny_run, tmp_path):
    run, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    [process] = start(TINY, run)
    try:
        until(lambda: process.poll() is not None or (log.exists() and read_lines(log)[2:]))
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, run.with_suffix(".0.txt").read_text()
    train(TINY, run)
    assert_same_run(tiny_run, run)


TWICE = """
import os, signal, time
from opdjax.ops.multihost import stop_requests

with stop_requests() as is_requested:
    os.kill(os.getpid(), signal.SIGINT)
    while not is_requested(0):
        time.sleep(0.01)
    print("saving", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(3600)
"""


def test_a_second_interrupt_ends_a_run_at_once():
    command = [sys.executable, "-c", TWICE]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert (ran.returncode, ran.stdout) == (130, "saving\n")
    assert "a second Ctrl-C ends the run at once" in ran.stderr


LATE = """
import os, signal, time
from opdjax.ops.multihost import stop_requests

with stop_requests():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_preemption_ends_a_step_that_takes_too_long():
    given = environment(OPDJAX_STOP_SECONDS="0.2")
    ran = subprocess.run([sys.executable, "-c", LATE], env=given, capture_output=True, text=True)
    assert ran.returncode == 143
    assert "the same command continues from the last checkpoint" in ran.stderr


def test_a_loss_that_stays_non_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    real, calls = opdjax.train.scored, []

    def poisoned(setup, batch, needs):
        batch, head = real(setup, batch, needs)
        calls.append(1)
        # Step 2 alone, then every step from 5 on.
        if len(calls) == 2 or len(calls) >= 5:
            batch = dataclasses.replace(
                batch, teacher=jax.tree.map(lambda x: x * np.nan, batch.teacher)
            )
        return batch, head

    monkeypatch.setattr(opdjax.train, "scored", poisoned)
    monkeypatch.setattr(opdjax.train, "MAX_NONFINITE_STEPS", 2)
    config = vary(evaluation={"source": None}, log={"samples_every": 0})
    with pytest.raises(
        NonFiniteLossError, match=r"steps 5 to 6 .*last good checkpoint in .* is step 4"
    ):
        train(config, tmp_path / "run")
    assert column(tmp_path / "run", "grad/skipped_steps") == [0, 1, 1, 1, 2, 3]
    monkeypatch.setattr(opdjax.train, "scored", real)
    assert train(config, tmp_path / "run")["skipped_steps"] == 1


# Runs that start from another run


def test_a_run_goes_on_from_another_as_if_it_were_that_run(tiny_run, tmp_path):
    """Weights, optimizer, logs and the evaluation before training are taken over."""
    train(vary(train={"start_from": f"{tiny_run}@4"}), tmp_path / "run")
    assert_same_run(tiny_run, tmp_path / "run")
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(steps) == [4, 6]


@pytest.mark.long
def test_a_run_takes_the_weights_or_the_optimizer_of_another(tiny_run, tmp_path):
    taken = {"start_from": f"{tiny_run}@4", "num_steps": 5}
    fresh = {"optimizer": {"warmup_steps": 0}, "checkpoint": {"every": 10}}
    weights = vary(train=taken | {"start_with": "student", "num_steps": 1}, **fresh)
    train(weights, tmp_path / "weights")
    export_step(tiny_run, "4", tmp_path / "four", None)
    again = dataclasses.replace(weights, student=ModelConfig(str(tmp_path / "four")))
    again = vary(again, train={"start_from": None, "start_with": "both"})
    train(again, tmp_path / "again")
    assert_same_run(tmp_path / "weights", tmp_path / "again")

    moments = vary(
        train=taken | {"start_with": "optimizer", "num_steps": 6}, evaluation={"source": None}
    )
    train(moments, tmp_path / "optimizer")
    row, _ = without_times(tmp_path / "optimizer")
    assert row["step"] == 5
    # The fifth step's prompts and learning rate, and the weights of the first.
    assert row["optimizer/learning_rate"] == column(tiny_run, "optimizer/learning_rate")[4]


def test_a_finished_run_is_evaluated_otherwise_in_another_directory(tiny_run, tmp_path):
    changed = vary(evaluation={"temperatures": (0.5,)})
    with pytest.raises(WorkdirError, match=r"--from .* to go on from this run[^$]*\[0.5\]"):
        train(changed, tiny_run)
    config = vary(changed, train={"start_from": str(tiny_run)})
    result = train(config, tmp_path / "run")
    scores = result["eval_before"], result["eval_after"]
    assert [row["temperature"] for row in scores] == [0.5, 0.5]
    assert result["eval_after"]["greedy"] == read_lines(tiny_run / "eval.jsonl")[-1]["greedy"]
    assert_equal_trees(final_weights(tiny_run), final_weights(tmp_path / "run"))
    assert without_times(tiny_run) == without_times(tmp_path / "run")


@pytest.mark.long
def test_an_evaluation_may_change_while_its_run_continues(tiny_run, tmp_path, capsys):
    """Its scores are made again, also those before training; the run is otherwise the same."""
    workdir = rewound(tiny_run, tmp_path / "run", 2)
    # Of the evaluations, a run that was killed there holds those before training.
    old = [row for row in read_lines(workdir / "eval.jsonl") if row["step"] == 0]
    cut_lines(workdir / "eval.jsonl", 2)
    assert read_lines(workdir / "eval.jsonl") == old
    changed = vary(evaluation={"temperatures": (0.5,)})
    result = train(changed, workdir)
    line = "evaluation.temperatures: [1.0, 0.5] -> [0.5]"
    assert f"note: continuing under another {line}" in capsys.readouterr().out
    assert read_lines(workdir / "eval-1.jsonl") == old
    assert (result["eval_before"]["temperature"], result["eval_after"]["temperature"]) == (0.5, 0.5)
    assert result["eval_before"]["greedy"] == old[0]["greedy"]
    assert without_times(tiny_run) == without_times(workdir)
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["evaluation"]["temperatures"] == [0.5]
    assert saved["evaluation_changes"] == [[line]]
    with pytest.raises(WorkdirError, match="evaluation.temperatures"):
        train(TINY, workdir)


def test_a_run_that_cannot_be_started_from_is_refused(tiny_run, tmp_path):
    for other, message in {
        f"{tiny_run}@7": "has no checkpoint '7'; there are",
        str(tmp_path): "has no config.json; expected the work directory of a run",
    }.items():
        with pytest.raises(ValueError, match=message):
            train(vary(train={"start_from": other}), tmp_path / "run")
    taken = {"start_from": str(tiny_run)}
    with pytest.raises(ConfigError, match=r"train\.num_steps is 5; expected at least 6"):
        train(vary(train=taken | {"num_steps": 5}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"trains other parameters \(lora\.rank: 0 -> 4\)"):
        train(vary(train=taken, lora={"rank": 4}), tmp_path / "run")
    with pytest.raises(ConfigError, match="start_with is 'student'; expected both where"):
        vary(train={"start_with": "student"})
    assert not (tmp_path / "run" / "config.json").exists()


# Other settings


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two steps of eight rows on three prompts: npd on-policy, in packed micro-batches."""
    directory = tmp_path_factory.mktemp("packed")
    config = vary(
        data={"source": three_prompts(directory)},
        estimator={"recipe": "npd"},
        train={"num_steps": 2, "gradient_accumulation_steps": 2, "pack_length": 52},
        evaluation={"source": None},
        log={"diagnostics_every": 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opdjax.rollouts.samples._NUM_SAMPLES", 8)
        train(config, directory / "run")
    return directory / "run"


def three_prompts(directory):
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"4{n}-17+25="}) + "\n" for n in range(3)))
    return str(rows)


@pytest.mark.long
def test_a_recipe_reads_the_teachers_top_k_in_packed_micro_batches(packed):
    """Nothing is stored: its metrics, and it trains."""
    for row in read_lines(packed / "metrics.jsonl"):
        assert row["staleness/kl"] < 1e-9
        assert row["staleness/effective_sample_size"] > 0.999
        assert row["kl/student_teacher"] > 0
        assert row["entropy/student"] > 0
        assert row["grad/norm"] > 0
    row = samples(packed)[0]
    assert {"student_logprobs", "teacher_logprobs", "kl"} <= row.keys()
    moved = jax.tree.map(
        lambda x, y: float(np.abs(x - y).max()),
        final_weights(packed),
        load_params(open_checkpoint(MINI_STUDENT), "float32"),
    )
    assert max(jax.tree.leaves(moved)) > 1e-6


@pytest.mark.long
def test_int8_keys_and_values_are_no_fault(tmp_path):
    """The sampler's log-probs differ a little from the update's, which would be a fault if both
    were float32.
    """
    data = {"source": three_prompts(tmp_path)}
    train(vary(**SHORT, data=data, sampling={"kv_dtype": "int8"}), tmp_path / "run")
    (gap,) = column(tmp_path / "run", "rollout/logprob_gap")
    assert 1e-4 < gap < 0.05


@pytest.mark.long
def test_equal_prompts_of_a_step_have_different_random_streams(packed):
    rows = [row for row in samples(packed) if row["step"] == 1]
    assert len({(row["prompt_id"], row["sample_id"]) for row in rows}) == 8
    assert len({(row["prompt_id"], row["completion"]) for row in rows}) > 3


@pytest.mark.long
def test_the_teachers_own_view_of_the_prompt_changes_its_scores_alone(tmp_path):
    """Raw text for the student, with several samples and micro-batches; the teacher's scores with
    and without the chat template are of the same tokens.
    """
    config = vary(
        data={"format": "raw", "teacher_format": "chat"},
        sampling={"num_generations": 4},
        train={"num_steps": 1, "prompts_per_step": 4, "gradient_accumulation_steps": 2},
        evaluation={"source": None},
    )
    train(config, tmp_path / "chat")
    train(vary(config, data={"teacher_format": "raw"}), tmp_path / "raw")
    (chat,), (raw,) = without_times(tmp_path / "chat"), without_times(tmp_path / "raw")
    assert raw["rollout/length_mean"] == chat["rollout/length_mean"]
    assert raw["kl/k1"] != chat["kl/k1"]


def scripted_scores(monkeypatch, scores):
    """Evaluations of step 0, 1, ... have these avg@k."""
    real = Evaluator.__call__

    def scored(self, params):
        return real(self, params) | {"avg@k": next(scores)}

    monkeypatch.setattr(Evaluator, "__call__", scored)


@pytest.mark.long
def test_a_run_stops_when_its_score_no_longer_rises(tmp_path, monkeypatch, capsys):
    """Best at step 1; then two evaluations that are worse or only equal it: it ends after step 3,
    also if it is interrupted before its result is written. An optimizer with a partitioned state.
    """
    scripted_scores(monkeypatch, iter([0.25, 0.75, 0.5, 0.75]))
    config = vary(
        optimizer={"name": "muon", "weight_decay": 0.1},
        train={"num_steps": 20, "early_stopping_patience": 2},
        evaluation={"every": 1, "temperatures": (1.0,)},
        checkpoint={"every": 1},
    )

    def killed(*_):
        raise KeyboardInterrupt

    finish = opdjax.train._finish
    monkeypatch.setattr(opdjax.train, "_finish", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    monkeypatch.setattr(opdjax.train, "_finish", finish)
    result = train(config, tmp_path / "run")
    assert (result["num_steps"], result["eval_after"]["avg@k"]) == (3, 0.75)
    assert column(tmp_path / "run", "step") == [1, 2, 3]
    message = "stopped after step 3: 2 evaluations without a better score; opdjax export "
    assert f"{message}{tmp_path / 'run'} --step best" in capsys.readouterr().out
    export_step(tmp_path / "run", "best", tmp_path / "best", None)


@pytest.mark.long
def test_passes_over_the_prompts_instead_of_steps(tmp_path):
    """64 prompts, 24 a step: two passes are six steps, whose learning rate ends at its minimum."""
    config = vary(
        train={"num_steps": 100, "num_epochs": 2, "prompts_per_step": 24},
        optimizer={"name": "lion", "schedule": "linear", "min_lr_ratio": 0.5, "warmup_steps": 0},
        evaluation={"source": None},
        log={"samples_every": 0},
    )
    assert train(config, tmp_path / "run")["num_steps"] == 6
    rates = column(tmp_path / "run", "optimizer/learning_rate")
    np.testing.assert_allclose(rates, 5e-4 * (1 - 0.5 * np.arange(6) / 6), rtol=1e-6)
    assert train(config, tmp_path / "run")["num_steps"] == 6  # the same config continues it
    assert read_run(tmp_path / "run").planned_steps == 6


@pytest.mark.long
@pytest.mark.parametrize("name", ["muon", "adafactor", "ademamix"])
def test_a_continued_run_has_the_state_of_any_optimizer(name, tmp_path):
    config = vary(
        optimizer={"name": name, "weight_decay": 0.1},
        train={"num_steps": 4},
        evaluation={"source": None},
    )
    train(config, tmp_path / "straight")
    with interrupted_at(3):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert without_times(tmp_path / "straight") == without_times(tmp_path / "run")
    assert_equal_trees(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"))


@pytest.mark.long
def test_the_best_checkpoint_outlives_newer_ones(tmp_path):
    config = vary(
        evaluation={"every": 1, "num_samples": 4},
        checkpoint={"every": 1, "keep": 1},
        train={"num_steps": 4},
    )
    train(config, tmp_path / "run")
    rows = read_lines(tmp_path / "run" / "eval.jsonl")
    scores = {row["step"]: row["avg@k"] for row in rows if row["step"]}
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    kept = sorted(int(name) for name in names if name.isdecimal())
    assert 4 in kept
    assert len(kept) <= 2
    assert max(scores.values()) == max(scores[step] for step in kept)


@pytest.mark.long
def test_a_student_that_equals_its_teacher_has_no_loss_at_any_temperature(tmp_path):
    config = vary(**SHORT, estimator={"recipe": "full_kl"}, sampling={"temperature": 0.7})
    train(dataclasses.replace(config, teacher=config.student), tmp_path / "run")
    (row,) = without_times(tmp_path / "run")
    assert abs(row["loss/objective"]) < 1e-6
    assert row["grad/norm"] < 1e-4


# A student that is its own teacher


def self_distillation(recipe="full_kl", teacher="@student", **sections):
    """TINY without evaluation; the teacher is the student, and its prompt shows the reference."""
    shown = {"teacher_prompt_format": "{reference}\n{prompt}", "max_prompt_length": 64}
    config = dataclasses.replace(TINY, teacher=ModelConfig(teacher))
    return vary(
        config,
        data=shown,
        estimator={"recipe": recipe},
        evaluation={"source": None},
        **sections,
    )


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["full_kl", "opd"])
def test_a_student_learns_from_what_only_its_teacher_view_shows(recipe, tmp_path):
    """The first update equals that of a frozen copy, so no gradient flows through the teacher; the
    second differs, because the teacher moved.
    """
    rows = {}
    for teacher in ("@student", MINI_STUDENT):
        config = self_distillation(
            recipe, teacher, train={"num_steps": 2}, optimizer={"warmup_steps": 0}
        )
        train(config, tmp_path / teacher)
        rows[teacher] = without_times(tmp_path / teacher)
    (first, second), (frozen_first, frozen_second) = rows.values()
    assert first["kl/student_teacher"] > 0.1
    assert first["grad/norm"] > 0.01
    assert first == frozen_first
    for name in second:
        if name.startswith("rollout/") and name != "rollout/logprob_gap":
            assert second[name] == frozen_second[name], name
    assert second["kl/k1"] != frozen_second["kl/k1"]
    written = json.loads((tmp_path / "@student" / "config.json").read_text())
    assert written["data"]["teacher"] == "@student"


@pytest.mark.long
@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_a_student_that_is_its_own_teacher_resumes_and_is_compiled_once(decay, tmp_path):
    config = self_distillation(
        train={"num_steps": 3}, checkpoint={"every": 1}, optimizer={"teacher_ema_decay": decay}
    )
    with recorded_updates() as updates:
        train(config, tmp_path / "straight")
    assert updates[0]._cache_size() == 1
    with interrupted_at(2):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.long
def test_an_averaged_teacher_moves_less_than_the_student(tmp_path):
    """The first update is the same; then the average is nearer to the start than the student is. Of
    adapters, the adapters are averaged.
    """
    learned = {}
    for decay in (0.0, 0.5, 0.999):
        config = self_distillation(
            train={"num_steps": 3},
            lora={"rank": 2},
            optimizer={"warmup_steps": 0, "learning_rate": 1e-2, "teacher_ema_decay": decay},
        )
        train(config, tmp_path / str(decay))
        learned[decay] = column(tmp_path / str(decay), "kl/student_teacher")
    assert learned[0.0][0] == learned[0.5][0] == learned[0.999][0]
    assert len({values[2] for values in learned.values()}) == 3


def test_the_evaluation_shows_nothing_of_what_the_teacher_is_shown(tmp_path):
    """It does not even require rows with a reference."""
    source = tmp_path / "bare.jsonl"
    source.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    config = dataclasses.replace(self_distillation(), evaluation=EvaluationConfig(str(source)))
    tokenizer = load_tokenizer(MINI_PAIR / "student")
    prompts = make_evaluator(config, open_checkpoint(MINI_STUDENT), tokenizer, None).prompts
    assert prompts.teacher_ids is None
    assert (
        tokenizer.decode(prompts.student_ids[0])
        == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.long
def test_a_student_can_be_taught_what_it_writes_when_it_sees_more(tmp_path):
    config = self_distillation(
        "sft", sampling={"completions_from": "teacher"}, train={"num_steps": 1}
    )
    train(config, tmp_path / "run")
    (row,) = without_times(tmp_path / "run")
    assert row["perf/teacher_tokens"] > row["perf/trained_tokens"]
    with pytest.raises(ConfigError, match="has nothing to teach"):
        train(dataclasses.replace(TINY, teacher=ModelConfig("@student")), tmp_path / "same")
    assert not (tmp_path / "same" / "config.json").exists()


# Refusals


class TestBadInput:
    def test_weights_that_changed_under_a_run(self, tiny_run, tmp_path):
        config = json.loads((tiny_run / "config.json").read_text())
        shutil.copytree(tiny_run, tmp_path / "run")
        config["data"]["teacher"] = "0" * 64
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        with pytest.raises(WorkdirError, match=r"data\.teacher"):
            train(TINY, tmp_path / "run")

    def test_tokenizers_that_differ(self, tmp_path):
        teacher = tmp_path / "teacher"
        shutil.copytree(MINI_PAIR / "teacher", teacher)
        file = teacher / "tokenizer.json"
        words = json.loads(file.read_text())
        vocab = words["model"]["vocab"]
        vocab["17"], vocab["18"] = vocab["18"], vocab["17"]
        file.write_text(json.dumps(words))
        with pytest.raises(
            TokenizerMismatchError, match="differ in 2 tokens.*'17'.*shares the student's tokenizer"
        ):
            train(dataclasses.replace(TINY, teacher=ModelConfig(str(teacher))), tmp_path / "run")

    def test_an_option_that_the_recipe_does_not_have(self, tmp_path):
        with pytest.raises(ValueError, match="recipe 'full_kl' has no option 'baseline'"):
            train(vary(estimator={"recipe": "full_kl", "baseline": "full"}), tmp_path / "run")

    def test_a_checkpoint_of_another_shape(self, tiny_run, tmp_path):
        """A work directory whose student has since been replaced by one of another width."""
        other = tmp_path / "run"
        shutil.copytree(tiny_run, other)
        (other / "result.json").unlink()
        small = tmp_path / "small"
        make_small_student(small)
        config = json.loads((other / "config.json").read_text())
        config["config"]["student"]["path"] = str(small)
        config["data"]["student"] = fingerprint(open_checkpoint(small))
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            CheckpointShapeError,
            match=r"layers\.down_kernel has shape \(3, 96, 288\); this model needs \(3, 96, 64\)",
        ):
            train(dataclasses.replace(TINY, student=ModelConfig(str(small))), other)


def make_small_student(out):
    """The mini student with a narrower MLP."""
    source = open_checkpoint(MINI_STUDENT)
    source = dataclasses.replace(
        source,
        raw_config=source.raw_config | {"intermediate_size": 64},
        config=dataclasses.replace(source.config, intermediate_size=64),
    )
    export(init_params(source.config, jax.random.key(0)), source, out)
