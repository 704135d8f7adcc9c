"""The loop on the mini pair: it runs, resumes bit for bit, survives SIGKILL and non-finite losses,
and exports what it trained.
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import opdjax.rollouts.on_policy
import opdjax.train
from opdjax.cli.export import export_step
from opdjax.config import (
    MINI_PAIR,
    MINI_STUDENT,
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import ConfigError
from opdjax.data.chat import TokenizerMismatchError, load_tokenizer
from opdjax.engine.update import make_update
from opdjax.models.hf import fingerprint, load_params, open_checkpoint
from opdjax.rollouts.setup import make_evaluator
from opdjax.runs.checkpoint import CheckpointShapeError
from opdjax.runs.workdir import WorkdirError, read_lines
from opdjax.train import NonFiniteLossError, train

ROOT = pathlib.Path(__file__).parents[1]
TINY = Config(
    data=DataConfig(max_prompt_length=32),
    sampling=SamplingConfig(max_completion_length=20),
    estimator=EstimatorConfig(recipe="vopd", tile=64),
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=2),
    train=TrainConfig(num_steps=6, prompts_per_step=8),
    evaluation=EvaluationConfig(
        num_prompts=16,
        num_samples=2,
        max_completion_length=20,
        batch_size=32,
        extra_temperatures=(0.5,),
    ),
    checkpoint=CheckpointConfig(every=2),
    log=LogConfig(samples_every=2, num_samples=2),
    mesh=MeshConfig(data=1),
)


def vary(**sections):
    """TINY with some fields of some sections replaced."""
    return dataclasses.replace(
        TINY,
        **{
            name: dataclasses.replace(getattr(TINY, name), **fields)
            for name, fields in sections.items()
        },
    )


def without_times(workdir):
    """The rows of metrics.jsonl, timing aside."""
    rows = read_lines(workdir / "metrics.jsonl")
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith("time/") and name != "perf/tokens_per_second"
        }
        for row in rows
    ]


def final_weights(workdir):
    return load_params(open_checkpoint(workdir / "student"), "float32")


def assert_same_run(left, right):
    assert without_times(left) == without_times(right)
    assert read_lines(left / "eval.jsonl") == read_lines(right / "eval.jsonl")
    assert read_lines(left / "samples.jsonl") == read_lines(right / "samples.jsonl")
    jax.tree.map(np.testing.assert_array_equal, final_weights(left), final_weights(right))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train(TINY, workdir)
    return workdir


def test_a_run_leaves_a_whole_work_directory(straight):
    result = json.loads((straight / "result.json").read_text())
    for name in ("eval_before", "eval_after"):
        assert {"avg@k", "pass@k", "greedy", "n", "k", "num_prompts"} <= result[name].keys()
        assert result[name]["num_prompts"] == 16
    assert [scores["temperature"] for scores in result["eval_before_sharpened"]] == [0.5]
    assert [row["step"] for row in read_lines(straight / "metrics.jsonl")] == list(range(1, 7))
    assert sorted({row["step"] for row in read_lines(straight / "samples.jsonl")}) == [1, 2, 4, 6]
    config = json.loads((straight / "config.json").read_text())
    assert config["data"]["num_prompts"] == 16384
    assert config["environment"]["jax"] == jax.__version__
    for row in read_lines(straight / "metrics.jsonl"):
        assert (
            row["rollout/logprob_gap"] < 1e-5
        )  # the sampler and the trainer speak of one distribution
        assert row["kl/student_teacher"] > 0
        assert row["grad/skipped_steps"] == 0


def test_the_teachers_most_likely_ids_are_read_step_by_step_where_nothing_is_stored(tmp_path):
    """Recipe npd on-policy, in packed rows and two micro-batches: what it tells of its tokens, and
    that it learns.
    """
    config = vary(
        estimator={"recipe": "npd"},
        train={"num_steps": 2, "gradient_accumulation_steps": 2, "pack_length": 52},
        evaluation={"source": None},
        log={"diagnostics_every": 1},
    )
    train(config, tmp_path / "run")
    for row in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert row["staleness/kl"] < 1e-9
        assert row["staleness/effective_sample_size"] > 0.999
        assert row["kl/student_teacher"] > 0
        assert row["entropy/student"] > 0
        assert row["grad/norm"] > 0
    teller = read_lines(tmp_path / "run" / "samples.jsonl")[0]
    assert {"student_logprobs", "teacher_logprobs", "kl"} <= teller.keys()
    moved = jax.tree.map(
        lambda x, y: float(np.abs(x - y).max()),
        final_weights(tmp_path / "run"),
        load_params(open_checkpoint(MINI_STUDENT), "float32"),
    )
    assert max(jax.tree.leaves(moved)) > 1e-6


def test_a_finished_run_is_reported_not_repeated(straight, capsys):
    before = (straight / "metrics.jsonl").read_bytes()
    assert train(TINY, straight) == json.loads((straight / "result.json").read_text())
    assert (straight / "metrics.jsonl").read_bytes() == before
    assert "finished run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stop_at", [pytest.param(1, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)]
)
def test_an_interrupted_run_ends_as_the_straight_one(stop_at, straight, tmp_path, monkeypatch):
    real, seen = opdjax.rollouts.on_policy.collate, []

    def interrupting(prompts, indices, num_rows=None):
        if num_rows is None:  # a training batch
            seen.append(1)
            if len(seen) > stop_at:
                raise KeyboardInterrupt
        return real(prompts, indices, num_rows)

    monkeypatch.setattr(opdjax.rollouts.on_policy, "collate", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run")
    monkeypatch.setattr(opdjax.rollouts.on_policy, "collate", real)
    train(TINY, tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


def test_a_run_killed_at_random_moments_ends_as_the_straight_one(straight, tmp_path):
    """SIGKILL in a process of its own, twice, then once to the end."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import conftest, pathlib\n"
        "from test_train import TINY\n"
        "from opdjax.train import train\n"
        "train(TINY, pathlib.Path(sys.argv[1]))\n"
    )
    workdir, rng = tmp_path / "run", random.Random(0)
    command = [sys.executable, str(script), str(workdir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for kill_after in (rng.randint(1, 2), rng.randint(3, 5)):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while len(read_lines(workdir / "metrics.jsonl")) < kill_after:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (workdir / "result.json").exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert_same_run(straight, workdir)


def test_rollouts_from_a_cache_in_fewer_bits_are_no_fault(tmp_path):
    """Its log-probs are a little off those of the update, which would be a fault where both are
    float32.
    """
    train(
        vary(sampling={"kv_dtype": "int8"}, train={"num_steps": 1}, evaluation={"source": None}),
        tmp_path,
    )
    (row,) = without_times(tmp_path)
    assert 1e-4 < row["rollout/logprob_gap"] < 0.05


def test_several_samples_micro_batches_and_a_teacher_view_of_its_own(tmp_path):
    """Raw text for the student, the chat template for the teacher: the teacher's scores still land
    on the student's tokens.
    """
    config = vary(
        data={"format": "raw", "teacher_format": "chat"},
        sampling={"num_generations": 4},
        train={"num_steps": 1, "prompts_per_step": 4, "gradient_accumulation_steps": 2},
        evaluation={"source": None},
    )
    train(config, tmp_path / "run")
    (row,) = without_times(tmp_path / "run")
    # The same tokens seen through the student's own bare view are out of the teacher's
    # distribution.
    train(
        dataclasses.replace(config, data=dataclasses.replace(config.data, teacher_format="raw")),
        tmp_path / "raw",
    )
    (raw,) = without_times(tmp_path / "raw")
    assert raw["rollout/length_mean"] == row["rollout/length_mean"]
    assert raw["kl/k1"] != row["kl/k1"]


def test_export_of_any_checkpoint(straight, tmp_path):
    latest = export_step(straight, "latest", tmp_path / "latest", None)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(open_checkpoint(latest), "float32"),
        final_weights(straight),
    )
    earlier = export_step(straight, "4", tmp_path / "four", "bfloat16")
    assert open_checkpoint(earlier).stored_dtype == "bfloat16"
    with pytest.raises(ConfigError, match="no checkpoint '3'.*there are"):
        export_step(straight, "3", tmp_path / "three", None)


def test_best_checkpoint_outlives_newer_ones(tmp_path):
    config = vary(
        evaluation={"every": 1, "num_samples": 4},
        checkpoint={"every": 1, "keep": 1},
        train={"num_steps": 4},
    )
    train(config, tmp_path / "run")
    scores = {
        row["step"]: row["avg@k"]
        for row in read_lines(tmp_path / "run" / "eval.jsonl")
        if row["step"]
    }
    kept = sorted(
        int(path.name)
        for path in (tmp_path / "run" / "checkpoints").iterdir()
        if path.name.isdecimal()
    )
    assert 4 in kept
    assert len(kept) <= 2
    assert max(scores.values()) == max(scores[step] for step in kept)


def test_exporting_leaves_alone_what_a_run_is_writing(straight, tmp_path):
    unfinished = straight / "checkpoints" / "5.orbax-checkpoint-tmp"
    unfinished.mkdir()
    export_step(straight, "latest", tmp_path / "out", None)
    assert unfinished.exists()
    unfinished.rmdir()


def test_the_update_is_compiled_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        opdjax.train,
        "make_update",
        lambda *arguments: made.append(make_update(*arguments)) or made[0],
    )
    train(vary(train={"num_steps": 3}, evaluation={"source": None}), tmp_path / "run")
    assert made[0]._cache_size() == 1


def test_a_student_that_equals_its_teacher_has_nothing_to_learn_at_any_temperature(tmp_path):
    config = vary(
        estimator={"recipe": "full_kl"},
        sampling={"temperature": 0.7},
        train={"num_steps": 1},
        evaluation={"source": None},
    )
    train(dataclasses.replace(config, teacher=config.student), tmp_path / "run")
    (row,) = without_times(tmp_path / "run")
    assert abs(row["loss/objective"]) < 1e-6
    assert row["grad/norm"] < 1e-4


def of_itself(recipe="full_kl", teacher="@student", **sections):
    """TINY without evaluation, with the student as its own teacher, which also sees the worked
    answer.
    """
    shown = {"teacher_prompt_format": "{reference}\n{prompt}", "max_prompt_length": 64}
    config = vary(data=shown, estimator={"recipe": recipe}, evaluation={"source": None}, **sections)
    return dataclasses.replace(config, teacher=ModelConfig(teacher))


@pytest.mark.parametrize("recipe", ["full_kl", pytest.param("opd", marks=pytest.mark.long)])
def test_a_student_that_is_its_own_teacher_learns_from_what_only_the_teacher_sees(recipe, tmp_path):
    """The first update is that of a frozen copy, so no gradient flows through the teacher; the
    second is that of a teacher that moved.
    """
    rows = {}
    for teacher in ("@student", MINI_STUDENT):
        train(
            of_itself(recipe, teacher, train={"num_steps": 2}, optimizer={"warmup_steps": 0}),
            tmp_path / teacher,
        )
        rows[teacher] = without_times(tmp_path / teacher)
    (first, second), (frozen_first, frozen_second) = rows.values()
    assert first["kl/student_teacher"] > 0.1
    assert first["grad/norm"] > 0.01
    assert first == frozen_first
    sampled = [
        name for name in second if name.startswith("rollout/") and name != "rollout/logprob_gap"
    ]
    assert {name: second[name] for name in sampled} == {
        name: frozen_second[name] for name in sampled
    }
    assert second["kl/k1"] != frozen_second["kl/k1"]
    assert (
        json.loads((tmp_path / "@student" / "config.json").read_text())["data"]["teacher"]
        == "@student"
    )


@pytest.mark.long
def test_a_student_that_is_its_own_teacher_resumes_and_is_compiled_once(tmp_path, monkeypatch):
    config, made, real, seen = (
        of_itself(train={"num_steps": 3}, checkpoint={"every": 1}),
        [],
        opdjax.rollouts.on_policy.collate,
        [],
    )
    monkeypatch.setattr(
        opdjax.train,
        "make_update",
        lambda *arguments: made.append(make_update(*arguments)) or made[0],
    )
    train(config, tmp_path / "straight")
    assert made[0]._cache_size() == 1

    def interrupting(*arguments):
        seen.append(1)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(opdjax.rollouts.on_policy, "collate", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    monkeypatch.setattr(opdjax.rollouts.on_policy, "collate", real)
    train(config, tmp_path / "run")
    assert without_times(tmp_path / "straight") == without_times(tmp_path / "run")
    assert read_lines(tmp_path / "straight" / "samples.jsonl") == read_lines(
        tmp_path / "run" / "samples.jsonl"
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        final_weights(tmp_path / "straight"),
        final_weights(tmp_path / "run"),
    )


def test_the_evaluation_shows_nothing_of_what_the_teacher_is_shown(tmp_path):
    """Not even rows with a reference are asked for."""
    source = tmp_path / "bare.jsonl"
    source.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    config = dataclasses.replace(of_itself(), evaluation=EvaluationConfig(str(source)))
    tokenizer = load_tokenizer(MINI_PAIR / "student")
    prompts = make_evaluator(config, open_checkpoint(MINI_STUDENT), tokenizer, None).prompts
    assert prompts.teacher_ids is None
    assert (
        tokenizer.decode(prompts.student_ids[0])
        == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.long
def test_a_student_can_be_taught_what_it_writes_when_it_sees_more(tmp_path):
    train(
        of_itself("sft", sampling={"source": "teacher"}, train={"num_steps": 1}), tmp_path / "run"
    )
    (row,) = without_times(tmp_path / "run")
    assert row["perf/teacher_tokens"] > row["perf/trained_tokens"]
    with pytest.raises(ConfigError, match="has nothing to teach"):
        train(dataclasses.replace(TINY, teacher=ModelConfig("@student")), tmp_path / "same")
    assert not (tmp_path / "same" / "config.json").exists()


def test_a_prompt_that_stands_twice_in_a_step_is_answered_twice(tmp_path):
    """Three prompts for eight rows: equal prompts draw from different random streams."""
    source = tmp_path / "three.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"4{n}-17+25="}) + "\n" for n in range(3)))
    config = vary(
        data={"source": str(source)},
        train={"num_steps": 1},
        evaluation={"source": None},
        log={"num_samples": 8},
    )
    train(config, tmp_path / "run")
    rows = read_lines(tmp_path / "run" / "samples.jsonl")
    assert len({(row["prompt_id"], row["sample_id"]) for row in rows}) == 8
    assert len({(row["prompt_id"], row["completion"]) for row in rows}) > 3


class TestBadInput:
    def test_weights_that_changed_under_a_run(self, straight, tmp_path):
        config = json.loads((straight / "config.json").read_text())
        shutil.copytree(straight, tmp_path / "run")
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

    def test_a_checkpoint_of_another_shape(self, straight, tmp_path):
        """A work directory whose student has since been replaced by one of another width."""
        other = tmp_path / "run"
        shutil.copytree(straight, other)
        (other / "result.json").unlink()
        small = tmp_path / "small"
        make_small_student(small)
        config = json.loads((other / "config.json").read_text())
        config["config"]["student"]["path"] = str(small)
        config["data"]["student"] = fingerprint(open_checkpoint(small))
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            CheckpointShapeError,
            match=r"layers\.down_kernel has shape \(3, 96, 288\), this model needs \(3, 96, 64\)",
        ):
            train(dataclasses.replace(TINY, student=ModelConfig(str(small))), other)


def make_small_student(out):
    """The mini student with a narrower MLP."""
    from opdjax.models.decoder import init_params
    from opdjax.models.hf_export import export

    source = open_checkpoint(MINI_STUDENT)
    source = dataclasses.replace(
        source,
        raw_config=source.raw_config | {"intermediate_size": 64},
        config=dataclasses.replace(source.config, intermediate_size=64),
    )
    export(init_params(source.config, jax.random.key(0)), source, out)


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
    config = vary(
        train={"num_steps": 20, "max_nonfinite_steps": 3},
        checkpoint={"every": 2},
        evaluation={"source": None},
        log={"samples_every": 0},
    )
    with pytest.raises(
        NonFiniteLossError, match=r"steps 5 to 7 .*last good checkpoint in .* is step 4"
    ):
        train(config, tmp_path / "run")
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["grad/skipped_steps"] for row in rows] == [0, 1, 1, 1, 2, 3, 4]
    monkeypatch.setattr(opdjax.train, "scored", real)
    result = train(dataclasses.replace(config), tmp_path / "run")
    assert result["skipped_steps"] == 1
