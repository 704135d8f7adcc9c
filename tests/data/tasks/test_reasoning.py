"""Tasks of reasoning-gym: splits that share nothing, and answers that their own scorers judge."""

import importlib.util
import json

import pytest

from opdjax.config import Config, DataConfig, EvaluationConfig
from opdjax.config.validation import MissingExtraError
from opdjax.data import isolated
from opdjax.data.grading import grader_named, require_readable
from opdjax.data.prompt_rows import read_prompts
from opdjax.data.sources import ColumnMap, DataError, read_rows
from opdjax.data.tasks import reasoning

TASK = "leg_counting"


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'opdjax\[tasks\]'"):
        list(read_rows("tasks:no_such_task#train", ColumnMap()))
    grader_named.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'opdjax\[tasks\]'"):
        grader_named("tasks")


def test_a_source_without_a_split_is_refused():
    with pytest.raises(DataError, match=r"tasks:leg_counting has no split; .*'validation', 'test'"):
        list(read_rows(f"tasks:{TASK}", ColumnMap()))


def test_auto_is_the_scorer_of_the_task():
    source = f"tasks:{TASK}#test"
    assert Config(evaluation=EvaluationConfig(source)).grader == "tasks"
    assert Config(data=DataConfig(source), evaluation=EvaluationConfig(None)).grader == "tasks"


@pytest.fixture
def rows():
    pytest.importorskip("reasoning_gym")
    yield lambda split: read_prompts(f"tasks:{TASK}#{split}")
    isolated.stop()


def test_splits_are_disjoint_and_always_the_same(rows):
    found = {split: rows(f"{split}[:128]") for split in reasoning.SPLITS}
    texts = [{row.prompt for row in part} for part in found.values()]
    assert [len(part) for part in found.values()] == [128, 128, 128]
    assert len(set.union(*texts)) == sum(map(len, texts))
    reasoning._task.cache_clear()
    assert rows("test[100:128]") == found["test"][100:]
    with pytest.raises(DataError, match=r"no task 'leg_count'; it has .*leg_counting"):
        list(read_rows("tasks:leg_count#train", ColumnMap()))


def test_answers_are_judged_by_the_scorer_of_the_task(rows):
    answers = [row.answer for row in rows("test[:8]")]
    require_readable("tasks", answers, "tasks")
    grade, right = grader_named("tasks"), json.loads(answers[0])["answer"]
    assert grade(f"<think>2 <answer>7</answer></think>so <answer> {right} </answer>", answers[0])
    assert grade(right, answers[0])
    assert not grade(f"<answer>{right}1</answer>", answers[0])
    assert not grade(f"The answer is {right}1", answers[0])
    # Another version of the package asks another question under this number.
    other = json.dumps(json.loads(answers[0]) | {"answer": "none"})
    for answer in (other, "42", "[]"):
        with pytest.raises(DataError, match="reads no answer in 1 of 1 rows"):
            require_readable("tasks", [answer], "tasks")
