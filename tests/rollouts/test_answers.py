"""Runs on given answers: text that the teacher writes, or that the data holds, in place of the
student's rollouts.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from test_train import TINY, assert_same_run, without_times

import opdjax.rollouts.on_policy
import opdjax.train
from opdjax.config import MINI_PAIR, EstimatorConfig, MeshConfig, ModelConfig
from opdjax.data.chat import TokenizerMismatchError
from opdjax.data.sources import DataError
from opdjax.runs.workdir import read_lines
from opdjax.train import train


def taught(source="teacher", recipe="sft", **sections):
    """Two steps of four answers; some fields of some sections replaced."""
    changes = {
        "train": {"num_steps": 2, "prompts_per_step": 4},
        "log": {"samples_every": 1, "num_samples": 4},
        "evaluation": {"source": None},
    }
    changes |= sections
    changes["sampling"] = {"source": source} | sections.get("sampling", {})
    replaced = {
        name: dataclasses.replace(getattr(TINY, name), **fields) for name, fields in changes.items()
    }
    return dataclasses.replace(TINY, estimator=EstimatorConfig(recipe=recipe, tile=64), **replaced)


def samples(workdir):
    return read_lines(workdir / "samples.jsonl")


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
def test_an_interrupted_run_ends_as_the_straight_one(tmp_path, monkeypatch):
    config = taught(train={"num_steps": 3, "prompts_per_step": 4}, checkpoint={"every": 1})
    train(config, tmp_path / "straight")
    real, seen = opdjax.rollouts.on_policy.collate, []

    def interrupting(prompts, indices):
        seen.append(1)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return real(prompts, indices)

    monkeypatch.setattr(opdjax.rollouts.on_policy, "collate", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "broken")
    monkeypatch.setattr(opdjax.rollouts.on_policy, "collate", real)
    train(config, tmp_path / "broken")
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    rows = without_times(tmp_path / "straight")
    assert all(
        row["perf/generated_tokens"] == 0 < row["perf/trained_tokens"] < row["perf/teacher_tokens"]
        for row in rows
    )
    assert "kl/student_teacher" not in rows[0]
    assert rows[-1]["loss/objective"] > 0


def test_the_teacher_writes_good_answers_and_the_student_is_seen_through_them(tmp_path):
    train(taught(), tmp_path / "run")
    for row in samples(tmp_path / "run"):
        assert row["completion"].startswith(row["prompt"].split("=")[0][:2])
        assert row["tokens"][-1] == "<|im_end|>"
        assert not row["is_truncated"]
        assert row["advantages"] is None
        assert len(row["teacher_top"]) == len(row["kl"]) == row["length"]


def test_an_answer_that_was_cut_off_counts_as_truncated(tmp_path):
    train(taught(sampling={"max_completion_length": 4}), tmp_path / "run")
    assert [row["rollout/truncated_ratio"] for row in without_times(tmp_path / "run")] == [1, 1]
    assert all(
        row["is_truncated"] and row["tokens"][-1] != "<|im_end|>"
        for row in samples(tmp_path / "run")
    )


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


def copy_of(model, out, change):
    """A checkpoint directory with one of its JSON files changed by `change(file name, content)`."""
    shutil.copytree(model, out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((out / name).read_text())
        change(name, content)
        (out / name).write_text(json.dumps(content))
    return ModelConfig(str(out))


def test_answers_end_as_the_student_ends(tmp_path):
    """A chat teacher ends its turn with a token that a base student does not stop at: left in, the
    student would learn to run on.
    """
    pieces = json.loads((MINI_PAIR / "student" / "tokenizer.json").read_text())["added_tokens"]
    other = next(piece for piece in pieces if piece["content"] != "<|im_end|>")

    def end_otherwise(name, content):
        if name == "generation_config.json":
            content["eos_token_id"] = other["id"]
        if name == "tokenizer_config.json":
            content["eos_token"] = other["content"]

    config = dataclasses.replace(
        taught(), student=copy_of(MINI_PAIR / "student", tmp_path / "student", end_otherwise)
    )
    train(config, tmp_path / "run")
    assert {row["tokens"][-1] for row in samples(tmp_path / "run")} == {other["content"]}


def test_a_teacher_of_another_vocabulary_can_write_but_not_score(tmp_path):
    def swap(name, content):
        if name == "tokenizer.json":
            words = content["model"]["vocab"]
            words["98"], words["99"] = words["99"], words["98"]

    teacher = copy_of(MINI_PAIR / "teacher", tmp_path / "teacher", swap)
    train(dataclasses.replace(taught(), teacher=teacher), tmp_path / "run")
    assert all(
        row["teacher_top"] is None and row["tokens"][-1] == "<|im_end|>"
        for row in samples(tmp_path / "run")
    )
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
