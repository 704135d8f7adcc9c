"""Runs on given answers: text that the teacher writes, or that the data holds, in place of the
student's rollouts.
"""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
from answer_runs import copy_of, swap_two_ids, taught
from tiny_runs import (
    assert_equal_trees,
    assert_same_run,
    column,
    interrupted_at,
    samples,
    vary,
    without_times,
)

from opdjax.config import MINI_PAIR, MeshConfig, ModelConfig
from opdjax.data.chat import TokenizerMismatchError
from opdjax.data.sources import DataError
from opdjax.data.tokenizer import load_tokenizer
from opdjax.ops.sharding import to_host
from opdjax.rollouts.checks import check_mask
from opdjax.rollouts.on_policy import OnPolicySource, prompts_of, step_rollouts
from opdjax.rollouts.rows import student_rows
from opdjax.rollouts.setup import prepare
from opdjax.rollouts.weights import initial_weights
from opdjax.runs.metrics import Timer
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


MIXED = {"sampling": {"student_fraction": 0.5, "num_generations": 2}, "recipe": "full_kl"}


@pytest.mark.parametrize("source", ["teacher", "references"])
def test_each_row_of_a_mixed_step_is_the_students_or_the_given_one(source, data):
    """A row has the tokens that it has where the student, or the other, writes all rows."""
    config = taught(source, **MIXED, data={"source": str(data)})
    setup = prepare(config)
    params = initial_weights(setup)
    prompts = prompts_of(setup.prompts, config, 3)

    def rollouts(**sampling):
        changed = dataclasses.replace(setup, config=vary(config, sampling=sampling))
        return to_host(step_rollouts(changed, params, prompts, 3))

    mixed, given = rollouts(), rollouts(student_fraction=0.0)
    own = rollouts(completions_from="student", student_fraction=0.0)
    is_own = student_rows(config, 3)
    assert 0 < is_own.sum() < len(is_own) == len(mixed.tokens) == 8
    for name in ("tokens", "mask", "segment_ids", "sample_id", "is_truncated"):
        found, students, others = (getattr(each, name) for each in (mixed, own, given))
        np.testing.assert_array_equal(found[is_own], students[is_own])
        np.testing.assert_array_equal(found[~is_own], others[~is_own])
    assert mixed.behavior_logprobs is None
    everything = rollouts(student_fraction=1.0)
    assert_equal_trees(everything, own)


def test_the_share_of_the_students_rows_is_that_of_the_config():
    config = taught(**MIXED)
    shares = [student_rows(config, step) for step in range(500)]
    assert abs(np.mean(shares) - 0.5) < 0.03
    assert any((shares[0] != share).any() for share in shares)
    other = dataclasses.replace(config, seed=1)
    assert any((student_rows(other, step) != shares[step]).any() for step in range(5))


@pytest.mark.long
def test_a_mixed_run_counts_its_tokens_and_continues_bit_for_bit(tmp_path):
    config = taught(**MIXED, checkpoint={"every": 1})
    train(config, tmp_path / "straight")
    with interrupted_at(1):
        train(config, tmp_path / "broken")
    train(config, tmp_path / "broken")
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    for step, row in enumerate(without_times(tmp_path / "straight")):
        assert row["rollout/student_ratio"] == student_rows(config, step).mean()
        assert 0 < row["perf/generated_tokens"] < row["perf/trained_tokens"]
        assert row["perf/trained_tokens"] < row["perf/teacher_tokens"]


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


def test_given_answers_are_cut_at_their_first_stop_token(tmp_path):
    """Be it a special token in the text, or a word at which the run stops."""
    texts = ["3+1=4#4", "3+1=4#4<|im_end|>", "3+1=4#4<|im_end|>\n7", "3+1=4#4;5", "3+1=4#4;5;"]
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}+1+1=", "reference": text} for n, text in enumerate(texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    semicolon = load_tokenizer(MINI_PAIR / "student").encode(";")
    config = taught(
        "references",
        data={"source": str(file)},
        sampling={"stop_token_ids": tuple(semicolon)},
        train={"num_steps": 1, "prompts_per_step": len(texts)},
    )
    setup = prepare(config)
    data = OnPolicySource(setup).next(0, Timer())
    mask, tokens = np.asarray(data.rollouts.mask), np.asarray(data.rollouts.tokens)
    words = ["3", "+", "1", "=", "4", "#", "4", "<|im_end|>"]
    for row, keep in zip(tokens, mask):
        assert setup.tokenizer.convert_ids_to_tokens(row[keep].tolist()) == words
    width = tokens.shape[1] - config.sampling.max_completion_length
    check = partial(check_mask, data.batch, prompt_width=width)
    stops = setup.decoding.stop_token_ids
    assert check(data.rollouts, decoding=setup.decoding).status == "ok"
    # With an earlier stop token, the same rows are trained on past the end.
    earlier = dataclasses.replace(setup.decoding, stop_token_ids=(*stops, int(tokens[mask][0])))
    found = check(data.rollouts, decoding=earlier)
    assert found.status == "fault"
    assert "the mask is 1 on a token that was not sampled" in found.message


def test_given_answers_are_cut_after_their_first_stop_string(data):
    """It ends them by itself, as it ends sampled ones."""
    config = taught(
        "references",
        data={"source": str(data)},
        sampling={"stop_strings": ("#", ";4")},
        train={"num_steps": 1, "prompts_per_step": 2},
    )
    setup = prepare(config)
    assert setup.prompts.prompts[0].references == ("3+1=4", "3+1=4;4")
    batches = [OnPolicySource(setup).next(step, Timer()) for step in (0, 1)]
    rows = [
        setup.tokenizer.decode(row[keep].tolist())
        for batch in batches
        for row, keep in zip(batch.rollouts.tokens, batch.rollouts.mask)
    ]
    end = "<|im_end|>"
    assert sorted(rows) == ["3+1=4;4", f"3+1=4{end}", "5+1=6;6+1=7#", f"5+1=6{end}"]
    for batch in batches:
        width = batch.rollouts.tokens.shape[1] - config.sampling.max_completion_length
        found = check_mask(batch.batch, batch.rollouts, width, setup.decoding)
        assert found.status == "ok", found


@pytest.mark.long
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
