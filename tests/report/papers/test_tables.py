"""The papers' files: every label that they name exists, and a wrong entry is named."""

import dataclasses
import pathlib

import pytest
import yaml

from opdjax.config.validation import ConfigError
from opdjax.report.papers import tables
from opdjax.report.papers.cells import reader
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
        (("claims", 0, "kind"), "better", r"claims\[0\].kind is 'better'; expected one of"),
        (("claims", 0, "margin"), "0.1 %", r"claims\[0\].margin is '0.1 %'; expected float"),
        (("claims", 0), {"kind": "more"}, r"claims\[0\].text is not given"),
        (("columns", 0, "reads"), "avg@k", r"columns\[0\].reads'; did you mean 'read'"),
        (("rows",), "none", r"rows is 'none'; expected a list"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_what_was_expected(written, path, value, message):
    with pytest.raises(ConfigError, match=rf"paper.yaml: t\..*({message})"):
        load(written(path, value))


@pytest.mark.parametrize("name", paper_tables())
def test_a_papers_table_is_whole(name):
    found = paper_tables()[name]
    assert found.name == name
    columns, rows = ([part.label for part in parts] for parts in (found.columns, found.rows))
    assert len(set(columns)) == len(columns)
    assert len(set(rows)) == len(rows)
    for column in found.columns:
        reader(column.read)
        assert column.until in ("", *rows), column.label
    for row in found.rows:
        assert row.arm or row.note, row.label
        assert len(row.values) <= len(columns), row.label
    for claim in found.claims:
        assert {claim.left, claim.right} <= set(rows), claim.text
        assert claim.base in (rows if claim.kind == "gap" else [""]), claim.text
        assert claim.column in columns, claim.text
        assert claim.mark in MARKS, claim.text
    # Scores on the mini pair do not compare with a paper's numbers.
    mini = [i for i, column in enumerate(found.columns) if column.pair == "mini"]
    values = [row.value(i) for row in found.rows for i in range(len(found.columns))]
    assert all(row.value(i) is None for row in found.rows for i in mini)
    assert all(value.mark in MARKS for value in values if value)


def test_every_file_of_a_paper_is_read():
    files = pathlib.Path(tables.__file__).parent.glob("*.yaml")
    assert {file.stem for file in files} == set(tables.PAPERS)
    assert all(dataclasses.asdict(table)["rows"] for table in paper_tables().values())
