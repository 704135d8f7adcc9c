"""Answers to instructions, graded by if-verifiable."""

import json
import sys

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
    # Tables hold null for each argument that an instruction does not have.
    "kwargs": [
        {"relation": None, "num_words": None},
        {"relation": None, "num_words": None},
        {"relation": "at least", "num_words": 20},
    ],
}
GOOD = "rain falls from grey clouds onto the roofs and fills the small streams that lead the water "
GOOD += "down to the sea"


@pytest.fixture(autouse=True)
def fresh():
    grader_named.cache_clear()
    yield
    grader_named.cache_clear()


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "if_verifiable", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'opdjax\[ifeval\]'"):
        grader_named("ifeval")


def missing(name):
    raise LookupError(name)


def test_without_the_file_that_sentences_are_counted_with_it_is_refused(monkeypatch):
    pytest.importorskip("if_verifiable")
    monkeypatch.setattr("nltk.data.find", missing)
    with pytest.raises(MissingExtraError, match="python -m nltk.downloader punkt_tab"):
        grader_named("ifeval")


def test_all_instructions_must_be_followed(monkeypatch):
    pytest.importorskip("if_verifiable")
    monkeypatch.setattr("nltk.data.find", lambda name: name)  # no sentences are counted here
    grade, row = grader_named("ifeval"), json.dumps(ROW)
    require_readable("ifeval", [row], "ifeval")
    assert grade(GOOD, row)
    assert grade(f"<think>A, B</think>{GOOD}", row)
    for answer in ("rain is wet", GOOD.upper(), GOOD.replace(" onto", ", onto"), ""):
        assert not grade(answer, row)
    unknown = {"instruction_id_list": ["punctuation:no_comma", "no:such_instruction", "a:b"]}
    assert not grade(GOOD, json.dumps(ROW | unknown))
    assert votes("ifeval", [GOOD, "", GOOD]) == [0, None, 0]
    with pytest.raises(DataError, match="reads no answer in 1 of 2 rows of ifeval"):
        require_readable("ifeval", [row, "42"], "ifeval")
    isolated.stop()
