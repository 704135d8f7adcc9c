"""Suites: records that an interrupted evaluation continues, scores, and paired differences."""

import dataclasses
import json

import numpy as np
import pytest

from opdjax.cli.models import suites
from opdjax.config import Config, EvaluationConfig, ModelConfig, SamplingConfig
from opdjax.config.validation import ConfigError
from opdjax.engine import evaluate
from opdjax.rollouts.suites import _completed, records_of, scores_of_records
from opdjax.runs.workdir import read_lines

SUMS = [("1+2=", "3"), ("34-17+25=", "42"), ("2+2=", "4"), ("61-20=", "41")]
EVALUATION = EvaluationConfig(
    num_samples=4, max_completion_length=20, grader="gsm8k", temperatures=(0.8,)
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in SUMS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(model="@mini_student", **own):
    sampling = SamplingConfig(slots=8)  # two problems at a time
    evaluation = {**vars(EVALUATION), **own}
    return Config(
        student=ModelConfig(model), sampling=sampling, evaluation=EvaluationConfig(**evaluation)
    )


class Prompts(list):
    digest = "d"


class Answering:
    """An evaluator of five problems, two at a time; it is interrupted after some of them."""

    slots, prompts = 8, Prompts(range(5))

    def __init__(self, last=5, **own):
        self.last, self.asked, self.config = last, [], dataclasses.replace(EVALUATION, **own)

    def records(self, params, indices):
        if indices[0] >= self.last:
            raise KeyboardInterrupt
        self.asked += [*indices]
        return [{"problem": index, "params": params} for index in indices]


def test_what_was_recorded_is_not_sampled_again(tmp_path):
    file, header, loaded = tmp_path / "a.jsonl", {"student": "s"}, []
    weights = lambda: loaded.append(1) or "weights"
    with pytest.raises(KeyboardInterrupt):
        _completed(Answering(3), file, header, weights)
    with file.open("a") as rows:
        rows.write('{"problem": 4, "par')  # a write that was cut off
    rest = Answering()
    found = _completed(rest, file, header, weights)
    assert [row["problem"] for row in found] == [0, 1, 2, 3, 4]
    assert (rest.asked, len(loaded)) == ([4], 4)
    first, *others = read_lines(file)
    assert (first["temperature"], first["prompts"], others) == (0.8, "d", found)
    assert _completed(Answering(0), file, header, weights) == found
    assert len(loaded) == 4  # no weights are read where nothing is left to do
    with pytest.raises(
        ConfigError, match=r"another evaluation \(grader: 'gsm8k' -> 'exact'\); exp"
    ):
        _completed(Answering(grader="exact"), file, header, weights)


@pytest.mark.long
def test_an_interrupted_evaluation_continues_and_loses_nothing(file, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    expected = records_of(config_of(), [str(file)], whole)
    (name,) = expected
    assert [row["prompt"] for row in expected[name]] == [prompt for prompt, _ in SUMS]
    for row in expected[name]:
        assert len(row["completions"]) == len(row["votes"]) == len(row["correct"]) == 4
    # Cut in the middle of the third record, the first of the second part.
    lines = (whole / f"{name}.jsonl").read_bytes().split(b"\n")
    part = b"\n".join([*lines[:3], lines[3][:50]])
    (cut / f"{name}.jsonl").write_bytes(part)
    asked, records = [], evaluate.Evaluator.records

    def noted(evaluator, params, indices):
        asked.extend(indices)
        return records(evaluator, params, indices)

    monkeypatch.setattr(evaluate.Evaluator, "records", noted)
    assert records_of(config_of(), [str(file)], cut) == expected
    assert asked == [2, 3]
    assert (cut / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes()
    # Another way of sampling is another evaluation.
    with pytest.raises(ConfigError, match=r"another evaluation \(temperature: 0.8 -> 0.5\); exp"):
        records_of(config_of(temperatures=(0.5,)), [str(file)], cut)
    with pytest.raises(ConfigError, match=r"another evaluation \(student: "):
        records_of(config_of("@mini_teacher"), [str(file)], cut)


def record(correct, votes, truncated=0, prompt="p"):
    given = {"correct": correct, "votes": votes, "truncated": [truncated] * len(correct)}
    return given | {"prompt": prompt}


def test_scores_and_differences_by_hand():
    after = {
        "a": [record([1, 0], [0, 1], prompt="1"), record([1, 1], [0, 0], 1, "2")],
        "b": [record([0, 0], [None, 0], prompt="3"), record([0, 0], [None, None], prompt="4")],
    }
    found = scores_of_records(after)
    scores = {name: row["avg@k"] for name, row in found.items()}
    assert scores == {"a": 0.75, "b": 0.0, "mean": 0.375}
    assert [found["a"][name] for name in ("pass@k", "maj@k", "truncated")] == [1.0, 0.75, 0.5]
    assert (found["b"]["no answer"], found["mean"]["no answer"]) == (0.75, 0.375)
    before = {name: [row | {"correct": [0, 0]} for row in part] for name, part in after.items()}
    difference = scores_of_records(after, before)
    assert difference["a"]["avg@k"] == 0.75
    # Two problems: Student's t with one degree of freedom.
    assert difference["a"]["avg@k_interval"] == pytest.approx(12.7062047 * np.std([0.5, 1.0]))
    assert difference["mean"]["truncated"] == 0.0
    with pytest.raises(ConfigError, match="answered different problems; expected the same ones"):
        scores_of_records(after, {"a": before["a"]})


@pytest.mark.long
def test_the_command_compares_checkpoints_in_pairs(file, tmp_path, capsys):
    options = {
        "--output": tmp_path / "out",
        "--suites": f"gsm8k={published(tmp_path)}",
        "--protocol": "vopd_math",
        "--evaluation.num-samples": 2,
        "--evaluation.max-completion-length": 20,
        "--evaluation.grader": "last_number",
        "--data.prompt-format": "{prompt}",
    }
    arguments = [str(word) for pair in options.items() for word in pair]
    suites(["@mini_student", "@mini_teacher", *arguments])
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    pair = "@mini_teacher - @mini_student"
    assert list(found) == ["@mini_student", "@mini_teacher", pair]
    assert pair in out
    gain = found["@mini_teacher"]["gsm8k"]["avg@k"] - found["@mini_student"]["gsm8k"]["avg@k"]
    assert found[pair]["gsm8k"]["avg@k"] == pytest.approx(gain)
    assert len(read_lines(tmp_path / "out" / "@mini_teacher" / "gsm8k.jsonl")) == 1 + len(SUMS)
    suites(["@mini_student", "@mini_teacher", *arguments])  # nothing is left to do
    assert "of 4 problems" not in capsys.readouterr().out


def published(tmp_path):
    """The sums as GSM8K publishes its rows."""
    path = tmp_path / "published.jsonl"
    rows = [{"question": prompt, "answer": f"so\n#### {answer}"} for prompt, answer in SUMS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
