"""Several benchmarks in one evaluation: scores of each benchmark and of all prompts; no such scores
without a column of benchmarks.
"""

import json
import math
import shutil

import numpy as np
import pytest
from tiny_runs import TINY, vary

from opdjax.cli.models import evaluate
from opdjax.data.prompt_rows import first_of_each, read_prompts
from opdjax.data.sources import ColumnMap, DataError
from opdjax.report.papers.cells import reader
from opdjax.rollouts.setup import prepare
from opdjax.rollouts.weights import initial_weights
from opdjax.runs.results import read_run
from opdjax.runs.statistics import benchmark_lines, by_benchmark
from opdjax.runs.workdir import read_lines
from opdjax.train import train

SUMS = [
    ("1+2=", "3", "small"),
    ("34-17+25=", "42", "large"),
    ("2+2=", "4", "small"),
    ("61-20=", "41", "large"),
    ("5-4=", "1", "small"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p, "answer": a, "of": b}) + "\n" for p, a, b in SUMS)
    )
    return path


def config_of(file, column):
    """One step of TINY, evaluated on the sums."""
    columns = (f"benchmark={column}",) if column else ()
    evaluation = {"source": str(file), "num_samples": 4, "columns": columns}
    return vary(train={"num_steps": 1}, evaluation=evaluation)


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """A run with a column of benchmarks."""
    workdir = tmp_path_factory.mktemp("runs") / "named"
    train(config_of(file, "of"), workdir)
    return workdir


def test_scores_of_benchmarks_by_hand():
    scores = np.array([0.0, 1.0, 0.5, 1.0, 1.0])
    found = by_benchmark(["a", "b", "a", "b", "a"], {"avg@k": scores})
    # a: 0, 0.5, 1, with standard deviation 0.5, t of two degrees of freedom; b: 1, 1, of which two
    # prompts say nothing.
    half = 4.302653 * 0.5 / math.sqrt(3)
    assert found["a"] == {"num_prompts": 3, "avg@k": 0.5, "avg@k_interval": pytest.approx(half)}
    assert found["b"] == {"num_prompts": 2, "avg@k": 1.0, "avg@k_interval": 1.0}
    assert found["mean"] == {
        "num_prompts": 5,
        "avg@k": 0.75,
        "avg@k_interval": pytest.approx(math.hypot(half, 1.0) / 2),
    }
    assert math.isinf(by_benchmark(["a", "b"], {"avg@k": scores[:2]})["mean"]["avg@k_interval"])


@pytest.mark.long
def test_every_evaluation_holds_the_scores_of_each_benchmark(run):
    for row in read_lines(run / "eval.jsonl"):
        right = np.array(row["per_prompt"]) / 4
        small = np.array([name == "small" for _, _, name in SUMS])
        found = row["benchmarks"]
        assert list(found) == ["small", "large", "mean"]
        assert found["small"]["avg@k"] == pytest.approx(right[small].mean())
        assert found["large"]["avg@k"] == pytest.approx(right[~small].mean())
        assert found["mean"]["avg@k"] == pytest.approx(
            (right[small].mean() + right[~small].mean()) / 2
        )
        assert ("greedy" in found["mean"]) == (row["temperature"] == 1.0)
    found = read_run(run)
    assert (
        reader("avg@k:large")(found) == found.result["eval_after"]["benchmarks"]["large"]["avg@k"]
    )
    assert (
        reader("greedy:mean", "before")(found)
        == found.result["eval_before"]["benchmarks"]["mean"]["greedy"]
    )


@pytest.mark.long
def test_a_column_of_benchmarks_changes_no_other_number(run, file):
    setup = prepare(config_of(file, None))
    plain = setup.evaluator(initial_weights(setup))
    assert "benchmarks" not in plain
    named = read_lines(run / "eval.jsonl")[0]
    del named["benchmarks"], named["step"]
    assert plain == named


@pytest.mark.long
def test_a_run_from_before_the_column_existed_is_continued(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    del saved["config"]["evaluation"]["columns"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    train(TINY, tmp_path / "run")
    assert "holds a finished run" in capsys.readouterr().out
    assert reader("avg@k:large")(read_run(tmp_path / "run")) is None


def test_the_command_prints_them(file, tmp_path, capsys):
    output = tmp_path / "scores.json"
    short = (
        "--evaluation.num-samples",
        "2",
        "--evaluation.max-completion-length",
        "20",
        "--data.max-prompt-length",
        "32",
    )
    evaluate(
        [
            "@mini_student",
            "--evaluation.source",
            str(file),
            "--evaluation.columns",
            "benchmark=of",
            *short,
            "--output",
            str(output),
        ]
    )
    printed, found = capsys.readouterr().out, json.loads(output.read_text())["benchmarks"]
    for line in benchmark_lines(found, 2):
        assert line in printed
        assert "avg@2" in line
    assert found["small"]["num_prompts"] == 3


def test_num_prompts_counts_those_of_each_benchmark(file):
    rows = read_prompts(str(file), ColumnMap(benchmark="of"))
    assert [row.prompt for row in first_of_each(rows, 1)] == ["1+2=", "34-17+25="]
    assert [row.prompt for row in first_of_each(rows, 2)] == ["1+2=", "34-17+25=", "2+2=", "61-20="]
    assert [row.prompt for row in first_of_each(read_prompts(str(file)), 2)] == [
        "1+2=",
        "34-17+25=",
    ]


@pytest.mark.parametrize("value", [None, "", " ", 7, "mean"])
def test_an_invalid_name_of_a_benchmark_is_refused(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "1+2=", "answer": "3", "of": value}) + "\n")
    with pytest.raises(DataError, match="the benchmark 'of' is"):
        read_prompts(str(path), ColumnMap(benchmark="of"))
    with pytest.raises(DataError, match="'source'"):
        read_prompts(str(path), ColumnMap(benchmark="source"))


def test_the_column_is_read_from_parquet(tmp_path, file):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": p, "answer": a, "of": b, "long": "x" * 100} for p, a, b in SUMS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = read_prompts(f"parquet:{tmp_path / 'rows.parquet'}", ColumnMap(benchmark="of"))
    assert [row.benchmark for row in found] == [name for _, _, name in SUMS]
