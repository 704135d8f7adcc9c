"""A run with stop strings: its rollouts, its evaluation, and what its export makes others do."""

import dataclasses

import pytest
from tiny_runs import column, samples, vary
from transformers import GenerationConfig

from opdjax.config import Config, ModelConfig
from opdjax.models.hf import open_checkpoint
from opdjax.rollouts.one_model import load, sample, scores_of
from opdjax.runs.workdir import read_lines
from opdjax.train import train

pytestmark = pytest.mark.long
STOPPED = vary(
    sampling={"stop_strings": ("=1", ";")},
    train={"num_steps": 1},
    log={"samples_every": 1},
    evaluation={"temperatures": (1.0,)},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    train(STOPPED, workdir)
    return workdir


def is_at_end(text):
    """Whether the text contains a stop string, first in its last token."""
    first = min((text.find(each) for each in ("=1", ";") if each in text), default=None)
    return first is not None and len(text) - first <= 4


def test_rollouts_end_at_a_stop_string(run):
    rows = samples(run)
    assert len(rows) == 4
    for row in rows:
        assert (
            row["tokens"][-1] == "<|im_end|>" or row["is_truncated"] or is_at_end(row["completion"])
        )
    assert any(is_at_end(row["completion"]) for row in rows)
    assert column(run, "rollout/truncated_ratio")[0] + column(run, "rollout/eos_rate")[0] == 1
    assert column(run, "rollout/eos_rate")[0] > 0.5


def test_the_library_stops_where_the_run_stops(run):
    prompts = [row["prompt"] for row in read_lines(run / "eval.jsonl")[-1]["answers"]]
    texts = sample(load(run / "student"), prompts, temperature=0, max_completion_length=20)
    answers = [row["completion"] for row in read_lines(run / "eval.jsonl")[-1]["answers"]]
    assert [text for (text,) in texts] == answers


def test_the_export_says_where_it_stops(run):
    checkpoint = open_checkpoint(run / "student")
    assert checkpoint.stop_strings == ("=1", ";")
    theirs = GenerationConfig.from_pretrained(run / "student")
    assert theirs.stop_strings == ["=1", ";"]
    assert theirs.eos_token_id == 2
    answers = read_lines(run / "eval.jsonl")[-1]["answers"]
    assert any(is_at_end(each["completion"]) for each in answers)


def test_the_evaluation_of_the_export_is_that_of_the_run(run):
    last = read_lines(run / "eval.jsonl")[-1]
    config = Config(
        student=ModelConfig(str(run / "student")), data=STOPPED.data, evaluation=STOPPED.evaluation
    )
    again = scores_of(dataclasses.replace(config, mesh=STOPPED.mesh))
    for name in ("avg@k", "greedy", "length_mean", "truncated_ratio", "answers"):
        assert again[name] == last[name], name
