"""Hostile input is answered by a named error, in seconds and megabytes, and runs nothing."""

import json
import pathlib
import subprocess
import sys

import pytest
from hostile_corpus import (
    ADDRESSES,
    ANSWERS,
    GROUPS,
    INDEXED,
    LINES,
    PATHS,
    TEMPLATES,
    TOKENIZERS,
    WEIGHTS,
    config_texts,
)

from opdjax.cli.main import _report

CORPUS = pathlib.Path(__file__).with_name("hostile_corpus.py")
SECONDS, MEGABYTES = 5.0, 500.0
# What is harmless, and is read.
READ = {"zero bytes as CSV"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """rows(group) -> what came of each case, from a process of its own."""
    made = {}

    def of(group):
        if group not in made:
            place = tmp_path_factory.mktemp(group)
            command = [sys.executable, str(CORPUS), group, str(place)]
            ran = subprocess.run(command, capture_output=True, text=True, cwd=place)
            assert ran.returncode == 0, ran.stderr[-3000:]
            made[group] = list(map(json.loads, ran.stdout.splitlines()))
            assert not list(place.rglob("hacked"))
        return made[group]

    return of


def test_the_corpus_is_large():
    kinds = (ADDRESSES, ANSWERS, INDEXED, LINES, PATHS, TEMPLATES, TOKENIZERS, WEIGHTS)
    assert sum(map(len, (*kinds, list(config_texts())))) >= 200


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(g, marks=pytest.mark.long if g in ("answers", "addresses") else ())
        for g in GROUPS
    ],
)
def test_hostile_input_ends_in_a_named_error(group, rows):
    found = rows(group)
    assert len(found) >= 10
    for row in found:
        assert row["seconds"] < SECONDS, row
        assert row["megabytes"] < MEGABYTES, row
        assert len(row["message"]) < 2500, row
        if row["words"] is None:  # graders answer
            assert row["error"] == "", row
            continue
        if row["name"] in READ:
            continue
        assert row["error"], row
        assert row["is_named"], row
        assert row["words"] in row["message"], row


def test_a_message_holds_no_command_to_a_terminal(capsys):
    _report("a\x1b[31mb\x07c\u202ed 你\ne")
    assert capsys.readouterr().err == "opdjax: a\\x1b[31mb\\x07c\\u202ed 你\ne\n"
