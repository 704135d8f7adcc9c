"""Runs on given answers: text that the teacher writes, or that the data holds, in place of the
student's rollouts.
"""

import dataclasses
import json

import numpy as np
import pytest
from answer_runs import copy_of, swap_two_ids, taught
from tiny_runs import assert_same_run, column, interrupted_at, samples, without_times

from opdjax.config import MINI_PAIR, MeshConfig, ModelConfig
from opdjax.data.chat import TokenizerMismatchError
from opdjax.data.sources import DataError
from opdjax.train import train

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def data(tmp_path):
    """Two prompts with two references each, as JSON lines."""
    rows = [
        {
            "prompt": f"{n}+1+1=",
            "references": [f"{n}+1={n + 1}", f"{n}+1={n + 1};{n + 1}+1={n + 2}#{n + 2}"],
        }
        for n in (3, 5)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.long
def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path):
    config = taught(train={"num_steps": 3, "prompts_per_step": 4}, checkpoint={"every": 1})
    train(config, tmp_path / "straight")
    with interrupted_at(2):
        train(config, tmp_path / "broken")
    train(config, tmp_path / "broken")
    assert_same_run(tmp_path / "straight", tmp_path / "broken")


def test_the_student_trains_on_what_the_teacher_writes(tmp_path):
    train(taught(), tmp_path / "run")
    for row in samples(tmp_path / "run"):
        assert row["completion"].startswith(row["prompt"].split("=")[0][:2])
        assert row["tokens"][-1] == "<|im_end|>"
        assert not row["is_truncated"]
        assert row["advantages"] is None
        assert len(row["teacher_top"]) == len(row["kl"]) == row["length"]
    rows = without_times(tmp_path / "run")
    for row in rows:
        assert row["perf/generated_tokens"] == 0
        assert 0 < row["perf/trained_tokens"] < row["perf/teacher_tokens"]
    assert "kl/student_teacher" not in rows[0]
    assert rows[-1]["loss/objective"] > 0


@pytest.mark.long
def test_an_answer_that_was_cut_off_counts_as_truncated(tmp_path):
    train(taught(sampling={"max_completion_length": 4}), tmp_path / "run")
    assert column(tmp_path / "run", "rollout/truncated_ratio") == [1, 1]
    for row in samples(tmp_path / "run"):
        assert row["is_truncated"]
        assert row["tokens"][-1] != "<|im_end|>"


def test_references_are_used_in_turn_and_need_no_teacher(data, tmp_path):
    config = taught(
        "references", data={"source": str(data)}, train={"num_steps": 2, "prompts_per_step": 2}
    )
    config = dataclasses.replace(config, teacher=ModelConfig("no/teacher/here"))
    train(config, tmp_path / "run")
    written = {}
    for row in samples(tmp_path / "run"):
        written.setdefault(row["prompt"], []).append(row["completion"])
    assert written == {"3+1+1=": ["3+1=4", "3+1=4;4+1=5#5"], "5+1+1=": ["5+1=6", "5+1=6;6+1=7#7"]}
    assert all(row["perf/teacher_tokens"] == 0 for row in without_times(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["teacher"] is None


@pytest.mark.parametrize("references", [[], [""], ["3+1=4", " "]])
def test_a_prompt_without_an_answer_is_refused(references, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "3+1+1=", "references": references}))
    with pytest.raises(DataError, match=r"prompt 0 of .* has no 'references' \(1 such rows\)"):
        train(taught("references", data={"source": str(tmp_path / "rows.jsonl")}), tmp_path / "run")


def test_a_teacher_of_another_vocabulary_writes_answers_that_end_as_the_students(tmp_path):
    """A chat teacher ends its turn with a token that a base student does not stop at: if it stayed,
    the student would learn to run on. A foreign vocabulary rules out its scores, not its text.
    """
    pieces = json.loads((MINI_PAIR / "student" / "tokenizer.json").read_text())["added_tokens"]
    other = next(piece for piece in pieces if piece["content"] != "<|im_end|>")

    def end_otherwise(name, content):
        if name == "generation_config.json":
            content["eos_token_id"] = other["id"]
        if name == "tokenizer_config.json":
            content["eos_token"] = other["content"]

    student = copy_of(MINI_PAIR / "student", tmp_path / "student", end_otherwise)
    teacher = copy_of(MINI_PAIR / "teacher", tmp_path / "teacher", swap_two_ids)
    train(dataclasses.replace(taught(), student=student, teacher=teacher), tmp_path / "run")
    assert {row["tokens"][-1] for row in samples(tmp_path / "run")} == {other["content"]}
    assert all(row["teacher_top"] is None for row in samples(tmp_path / "run"))
    with pytest.raises(
        TokenizerMismatchError, match="recipe 'full_kl' compares their logits id by id"
    ):
        train(dataclasses.replace(taught(recipe="full_kl"), teacher=teacher), tmp_path / "refused")


@pytest.mark.long
def test_eight_devices_and_micro_batches_change_nothing(tmp_path):
    rows = []
    for devices, parts in ((1, 1), (8, 2)):
        sizes = {"num_steps": 1, "prompts_per_step": 8, "gradient_accumulation_steps": parts}
        config = dataclasses.replace(
            taught(sampling={"num_generations": 2}, train=sizes), mesh=MeshConfig(devices)
        )
        train(config, tmp_path / str(devices))
        rows += without_times(tmp_path / str(devices))
    assert rows[1].keys() - rows[0].keys() == {
        "grad/noise_squared",
        "grad/signal_squared",
    }  # what micro-batches tell beside
    for name in rows[0]:
        assert (rows[1][name] is None) == (rows[0][name] is None), (
            name
        )  # buckets of positions that no answer reaches
        np.testing.assert_allclose(
            rows[1][name] or 0, rows[0][name] or 0, rtol=1e-4, atol=1e-5, err_msg=name
        )
