"""The papers' files: every label that they name exists, and a wrong entry is named."""

import dataclasses
import pathlib

import pytest
import yaml

from opdjax.config.validation import ConfigError
from opdjax.report.papers import tables
from opdjax.report.papers.compare import reader
from opdjax.report.papers.tables import MARKS, load, paper_tables

GOOD = {
    "paper": "a paper",
    "tables": [
        {
            "name": "t",
            "title": "title",
            "settings": "settings",
            "columns": [{"label": "score"}, {"label": "prompts", "until": "b"}],
            "rows": [
                {"label": "a", "arm": "opd", "values": ["58.7 N", None]},
                {"label": "b", "arm": "vopd"},
                {"label": "start", "arm": "opd", "when": "before"},
            ],
            "claims": [
                {"kind": "more", "text": "c", "left": "a", "right": "b", "column": "score"},
                {
                    "kind": "gap",
                    "text": "d",
                    "left": "a",
                    "right": "b",
                    "base": "start",
                    "column": "score",
                },
            ],
        }
    ],
}


@pytest.fixture
def written(tmp_path):
    """Writes the good file with one value changed at a path."""

    def write(path, value):
        file = tmp_path / "paper.yaml"
        found = yaml.safe_load(yaml.safe_dump(GOOD))
        place = found["tables"][0] if path else found
        for part in path[:-1]:
            place = place[part]
        if path:
            place[path[-1]] = value
        file.write_text(yaml.safe_dump(found))
        return file

    return write


def test_a_good_file_is_read(written):
    (table,) = load(written((), None))
    assert (table.name, table.paper, len(table.rows), len(table.claims)) == ("t", "a paper", 3, 2)
    assert table.rows[0].value(0) == tables.Value(58.7, "N")
    assert [table.rows[0].value(1), table.rows[1].value(0)] == [None, None]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("claims", 0, "left"), "A", r"claims\[0\].left is 'A'; did you mean 'a'|expected one of"),
        (("claims", 0, "right"), "zz", r"claims\[0\].right is 'zz'; expected one of"),
        (("claims", 0, "column"), "scores", r"claims\[0\].column is .*did you mean 'score'"),
        (("claims", 0, "base"), "start", r"claims\[0\].base is 'start'"),
        (("claims", 1, "base"), "begin", r"claims\[1\].base is 'begin'; expected one of"),
        (("claims", 0, "mark"), "Z", r"claims\[0\].mark is 'Z'"),
        (("claims", 0, "kind"), "better", r"claims\[0\].kind is 'better'; expected one of"),
        (("claims", 0, "margin"), "0.1 %", r"claims\[0\].margin is '0.1 %'; expected float"),
        (("claims", 0), {"kind": "more"}, r"claims\[0\].text is not given"),
        (("columns", 1, "until"), "c", r"columns\[1\].until is 'c'; expected one of"),
        (("columns", 0, "read"), "speed", r"columns\[0\].read is 'speed'; expected a score"),
        (("columns", 0, "reads"), "avg@k", r"columns\[0\].reads'; did you mean 'read'"),
        (("columns", 1, "label"), "score", r"columns is \['score', 'score'\]; expected labels"),
        (("rows", 1, "label"), "a", r"rows is \['a', 'a', 'start'\]; expected labels that differ"),
        (("rows", 0, "values"), ["1 N"] * 3, r"rows\[0\].values .*a value a column at most"),
        (("rows", 0, "values"), ["58.7"], r"rows\[0\].values .*expected numbers with a mark"),
        (("rows", 0, "values"), ["58.7 Z"], r"rows\[0\].values .*expected numbers with a mark"),
        (("rows", 1, "arm"), "", r"rows\[1\] is 'b'; expected an arm, or a note"),
        (("rows",), "none", r"rows is 'none'; expected a list"),
    ],
)
def test_a_wrong_entry_is_named_with_its_file_and_what_was_expected(written, path, value, message):
    with pytest.raises(ConfigError, match=rf"paper.yaml: t\..*({message})"):
        load(written(path, value))


def test_a_file_that_is_no_yaml(tmp_path):
    (tmp_path / "paper.yaml").write_text("paper: [")
    with pytest.raises(ConfigError, match="paper.yaml.*(.|\n)*expected YAML"):
        load(tmp_path / "paper.yaml")


@pytest.mark.parametrize("name", paper_tables())
def test_a_papers_table_is_whole(name):
    found = paper_tables()[name]
    assert found.name == name
    for column in found.columns:
        reader(column.read)
    # Scores on the mini pair do not compare with a paper's numbers.
    mini = [i for i, column in enumerate(found.columns) if column.pair == "mini"]
    values = [row.value(i) for row in found.rows for i in range(len(found.columns))]
    assert all(row.value(i) is None for row in found.rows for i in mini)
    assert all(value.mark in MARKS for value in values if value)


def test_every_file_of_a_paper_is_read():
    files = pathlib.Path(tables.__file__).parent.glob("*.yaml")
    assert {file.stem for file in files} == set(tables.PAPERS)
    assert all(dataclasses.asdict(table)["rows"] for table in paper_tables().values())
