"""Answers to instructions, graded by if-verifiable."""

import importlib.util
import json

import pytest

from opdjax.config.validation import MissingExtraError
from opdjax.data import isolated
from opdjax.data.grading import grader_named, require_readable, votes
from opdjax.data.sources import DataError

ROW = {
    "key": 1000,
    "prompt": "Describe rain in lower case without a comma, in 20 words or more.",
    "instruction_id_list": [
        "punctuation:no_comma",
        "change_case:english_lowercase",
        "length_constraints:number_words",
    ],
    "kwargs": [
        {"relation": None, "num_words": None},
        {"relation": None, "num_words": None},
        {"relation": "at least", "num_words": 20},
    ],
}
GOOD = "rain falls from grey clouds onto the roofs and fills the small streams that lead the water "
GOOD += "down to the sea"


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    grader_named.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'opdjax\[ifeval\]'"):
        grader_named("ifeval")


@pytest.fixture
def grade():
    pytest.importorskip("if_verifiable")
    yield grader_named("ifeval")
    isolated.stop()


def test_all_instructions_must_be_followed(grade):
    row = json.dumps(ROW)
    require_readable("ifeval", [row], "ifeval")
    assert grade(GOOD, row)
    assert grade(f"<think>A, B</think>{GOOD}", row)
    for answer in ("rain is wet", GOOD.upper(), GOOD.replace(" onto", ", onto"), ""):
        assert not grade(answer, row)
    assert votes("ifeval", [GOOD, "", GOOD]) == [0, None, 0]
    with pytest.raises(DataError, match="reads no answer in 1 of 2 rows of ifeval"):
        require_readable("ifeval", [row, "42"], "ifeval")
