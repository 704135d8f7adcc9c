"""Built-in instructions: distinct sentences; the test split shares nothing with the others."""

import importlib.resources
import re

import pytest
import yaml

from opdjax.data.sources import ColumnMap, DataError, read_rows
from opdjax.data.tasks.instructions import SPLITS, instructions


def test_splits_are_distinct_and_fixed():
    found = {split: instructions(split) for split in SPLITS}
    assert {split: len(texts) for split, texts in found.items()} == {
        "train": 3384,
        "validation": 256,
        "test": 252,
    }
    everything = [text for texts in found.values() for text in texts]
    assert len(set(everything)) == len(everything)
    assert all(re.fullmatch(r"[A-Z].*[.?]", text) and "{" not in text for text in everything)
    assert found == {split: instructions(split) for split in SPLITS}


def test_topics_and_templates_of_the_test_split_occur_nowhere_else():
    file = importlib.resources.files("opdjax") / "assets" / "instructions.yaml"
    words = yaml.safe_load(file.read_text("utf-8"))
    topics = [topic for group in words["groups"].values() for topic in group["test"]]
    templates = words["general"]["test"] + [
        template for group in words["groups"].values() for template in group["templates"]["test"]
    ]
    shapes = [re.escape(template).replace(r"\{topic\}", ".*") for template in templates]
    for text in instructions("train") + instructions("validation"):
        assert not any(re.search(rf"\b{re.escape(topic)}\b", text) for topic in topics), text
        assert not any(re.fullmatch(shape, text) for shape in shapes), text


def test_they_are_a_source_of_rows():
    rows = list(read_rows("instructions:test[2:5]", ColumnMap()))
    assert [row["prompt"] for _, row in rows] == instructions("test")[2:5]
    assert rows[0][0] == "instructions:test, row 2"
    with pytest.raises(DataError, match="instructions has no split 'dev'; expected one of"):
        list(read_rows("instructions:dev", ColumnMap()))
