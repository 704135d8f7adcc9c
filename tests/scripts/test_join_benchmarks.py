"""Several sources are joined into one file of benchmarks, which an evaluation can read."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

from opdjax.data.prompt_rows import read_prompts
from opdjax.data.sources import ColumnMap

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "join_benchmarks.py"


def join(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True
    )


def test_sources_of_any_kind_become_one_file(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"problem": "1+1=", "value": 2})
        + "\n"
        + json.dumps({"problem": "2+1=", "value": "3"})
        + "\n"
    )
    output = tmp_path / "all.jsonl"
    done = join(
        output,
        "sums=arithmetic:test[:3],prompt,answer",
        f"a b/c={rows},problem,value",
        f"sums={rows},problem,value",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sums: 5 prompts\na b/c: 2 prompts\n"
    found = read_prompts(str(output), ColumnMap(benchmark="benchmark"))
    assert [row.benchmark for row in found] == ["sums"] * 3 + ["a b/c"] * 2 + ["sums"] * 2
    assert (found[3].prompt, found[3].answer) == ("1+1=", "2")


@pytest.mark.long
def test_nothing_is_written_if_a_source_cannot_be_read(tmp_path, monkeypatch):
    output = tmp_path / "all.jsonl"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "answer": None}) + "\n")
    for argument, expected in (
        ("sums", "expected NAME=SOURCE,PROMPT_COLUMN,ANSWER_COLUMN"),
        ("=arithmetic:test,prompt,answer", "expected NAME=SOURCE,PROMPT_COLUMN,ANSWER_COLUMN"),
        (f"sums={tmp_path / 'none.jsonl'},prompt,answer", "none.jsonl"),
        (f"sums={rows},prompt,answer", "has no 'answer'"),
    ):
        words = [SCRIPT, output, "first=arithmetic:test[:3],prompt,answer", argument]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert expected in end.value.code  # one message, and no traceback
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
