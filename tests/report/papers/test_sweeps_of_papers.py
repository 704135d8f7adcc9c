"""The sweeps that tables of papers are asked of: they load, every recipe takes its options, and
every row has its runs.
"""

import functools
import json
import pathlib
import subprocess
import sys

import pytest
import study

from opdjax.config.experiments import load_sweep
from opdjax.estimators import estimator_of
from opdjax.report.papers.compare import compare
from opdjax.report.papers.tables import paper_tables
from opdjax.runs.results import read_points

SWEEPS = pathlib.Path(__file__).parents[3] / "experiments" / "sweeps"
HUB = ("vopd_tables", "npd_tables", "ropd_black_box", "ropd_white_box", "rubricem_stages")
MINI = ("mini_vopd", "mini_npd", "mini_ropd")
ELSEWHERE = {
    # k = 1 and 2 are questions of a vocabulary as small as the mini pair's.
    *(("qwen3_1_7b", f"vopd_k{k}") for k in (1, 2)),
    ("qwen3_0_6b", "teacher"),  # the same model as that of qwen3_1_7b
    ("qwen3_4b_30b", "lopd"),  # its teacher is a mixture of experts
    ("qwen3_4b_30b", "teacher"),
}


@functools.cache
def points_of(name):
    return load_sweep(str(SWEEPS / f"{name}.py"))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Every point of the sweeps as it is asked for, none of them run."""
    directory = tmp_path_factory.mktemp("asked")
    for point in {point.id: point for name in (*HUB, *MINI) for point in points_of(name)}.values():
        study.write_point(directory, point, None)
    return read_points(directory)


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.py")), ids=lambda file: file.stem)
def test_every_recipe_of_a_sweep_takes_its_options(file):
    for config in {
        json.dumps(p.config.estimator.options, sort_keys=True): p.config
        for p in points_of(file.stem)
    }.values():
        estimator_of(config.estimator)


@pytest.mark.parametrize("name", paper_tables())
def test_every_row_of_a_table_has_its_runs(name, asked):
    table = paper_tables()[name]
    cells = {(column.pair, row.arm) for column in table.columns for row in table.rows}
    points = [
        point for point in asked if (point.overrides["pair"], point.overrides["arm"]) in cells
    ]
    # Raises where a cell has two configs, or rows of a column two evaluations.
    found = compare(table, points)
    for column in found.table.columns:
        for row in found.table.rows:
            wanted = bool(column.read and row.arm) and (column.pair, row.arm) not in ELSEWHERE
            assert bool(found.cells[row.label][column.label].digest) == wanted, (
                row.label,
                column.label,
            )
    assert found.is_run


@pytest.mark.parametrize("name", [*HUB, *MINI])
def test_every_run_of_a_sweep_stands_in_a_table(name):
    cells = {
        (column.pair, row.arm)
        for table in paper_tables().values()
        for column in table.columns
        for row in table.rows
        if row.arm
    }
    assert {(point.overrides["pair"], point.overrides["arm"]) for point in points_of(name)} <= cells


@pytest.mark.parametrize("name", HUB)
def test_what_a_sweep_says_of_its_runs_is_so(name):
    text = " ".join((SWEEPS / f"{name}.py").read_text().split())
    assert f"{len(points_of(name))} runs" in text
    for expected in ("Paper:", "Data", "Evaluation", "Hardware:", "Never run here", "Deviations:"):
        assert expected.lower() in text.lower(), expected
    assert any(f"--paper {table} " in text for table in paper_tables())


def test_a_dry_run_of_the_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "opdjax",
        "sweep",
        str(SWEEPS / "ropd_white_box.py"),
        "--workdir",
        str(tmp_path / "new"),
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "waiting pair=qwen3_4b_14b,arm=lopd,seed=0" in done.stdout
    assert "16 points, 16 not done" in done.stdout
    assert not (tmp_path / "new").exists()
