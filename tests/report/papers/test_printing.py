"""`opdjax table DIR --paper NAME`: numbers and their notes."""

import json
import re
import sys

import pytest
import study

from opdjax.cli import main
from opdjax.config.validation import ConfigError
from opdjax.report.papers.tables import paper_tables
from opdjax.report.table import list_of_papers, markdown, paper_table, table
from opdjax.runs.workdir import WorkdirError

SCORES = {
    "opd": (0.50, 0.52, 0.54),
    "vopd": (0.60, 0.62, 0.64),
    "vopd_k100": (0.60, 0.62, 0.64),
    "full_kl": (0.615, 0.635, 0.655),
    "opd_topk": (0.5,),
}
HUB = {
    name: tuple({"MATH500": value, "AMC23": value - 0.2} for value in values)
    for name, values in SCORES.items()
}


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mini")
    study.make(directory, SCORES)
    return directory


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub")
    study.make(directory, HUB, pair="qwen3_1_7b", start={"MATH500": 0.4, "AMC23": 0.1})
    return directory


def rows_of(text):
    """First cell of each line of the first Markdown table -> header -> cell."""
    lines = [
        re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
        for line in text.split("\n\n")[2].splitlines()
    ]
    return {line[0]: dict(zip(lines[0], line)) for line in lines}


def test_ours_stand_beside_the_papers_in_its_unit(hub):
    found = rows_of(paper_table(hub, "vopd_table1"))["vOPD"]
    assert found["1.7B MATH500, %: paper"] == "64.9 [N]"
    assert found["1.7B MATH500, %: ours"] == "62.00 ± 4.97 (n=3)"  # 4.303 * 2 / sqrt 3
    assert found["1.7B MATH500, %: ours - paper"] == "-2.90"
    assert found["1.7B average, %: ours - paper"] == "+19.00"  # 52 - 33
    assert found["4B average, %: paper"] == "45.3 [N]"
    assert "4B average, %: ours" not in found  # nothing of it is in the sweep


def test_the_mini_pair_is_never_subtracted_from_a_paper(mini):
    text = paper_table(mini, "vopd_table1")
    assert rows_of(text)["vOPD"]["mini pair, avg@8: ours"] == "0.620 ± 0.050 (n=3)"
    assert "ours - paper" not in text


def test_claims_have_verdicts_and_paired_differences(mini):
    text = paper_table(mini, "vopd_table1")
    assert (
        "| vOPD is better than OPD [N] | vOPD, OPD | mini pair, avg@8 | above 0 | 0.100 ± 0.000 | "
        " | 3 | reproduced | reproduced, p < 0.001 |  |" in text
    )
    assert (
        "exact divergence [A] | vOPD, OPD full | mini pair, avg@8 | within ± 0.01 | -0.015 ± 0.000 "
        "|  | 3 | contradicted | contradicted, p < 0.001 |  |" in text
    )
    assert (
        "vOPD top-k, OPD top-k | mini pair, avg@8 | above 0 | 0.100 |  | 1 | inconclusive |" in text
    )


def test_rows_that_are_the_same_run_for_run_are_said_to_be(mini):
    found = next(
        line
        for line in paper_table(mini, "vopd_table1").splitlines()
        if line.startswith("| a top-k baseline")
    )
    assert "|  |  | 3 | not testable here: every seed's difference is exactly 0 |" in found


def test_a_deleted_result_is_told(tmp_path):
    study.make(tmp_path, SCORES)
    before = rows_of(paper_table(tmp_path, "vopd_table1"))
    assert before["vOPD"]["missing"] == ""
    assert before["OPD top-k"]["missing"] == "seed=1, seed=2"
    (tmp_path / "pair=mini,arm=vopd,seed=1" / "result.json").unlink()
    after = rows_of(paper_table(tmp_path, "vopd_table1"))["vOPD"]
    assert after["missing"] == "seed=1"
    assert after["mini pair, avg@8: ours"] == "0.620 ± 0.254 (n=2)"  # 12.706 * 0.02828 / sqrt 2
    cells = json.loads(paper_table(tmp_path, "vopd_table1", "json"))["cells"]
    assert cells["vOPD"]["mini pair, avg@8"]["missing"] == ["pair=mini,arm=vopd,seed=1"]


def test_rows_are_told_apart_by_the_digest_of_their_config(mini):
    found = rows_of(paper_table(mini, "vopd_table1"))
    digests = {found[row]["config"] for row in ("OPD", "vOPD", "OPD full")}
    assert len(digests) == 3
    assert all(re.fullmatch("[0-9a-f]{8}", digest) for digest in digests)


def test_what_is_not_implemented_says_so(mini):
    found = rows_of(paper_table(mini, "ropd_table2"))["ExOPD"]
    assert "not implemented here" in found["note"]
    assert found["average, %: paper"] == "35.25 [P]"


def test_a_directory_without_the_tables_arms_says_what_it_looks_for(mini):
    text = paper_table(mini, "npd_math")
    assert "This directory has no point of the table: it looks for arm=npd" in text
    assert "not run" in text


@pytest.mark.parametrize("name", paper_tables())
def test_every_table_prints_in_every_format(name, hub):
    assert json.loads(paper_table(hub, name, "json"))["table"]["name"] == name
    markdown_lines = paper_table(hub, name).split("\n\n")[2].splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown_lines}) == 1


def test_json_has_all_facts(hub):
    found = json.loads(paper_table(hub, "vopd_table1", "json"))
    cell = found["cells"]["vOPD"]["1.7B MATH500"]
    assert cell["paper"] == {"number": 64.9, "mark": "N"}
    assert cell["by_seed"] == {"0": 0.6, "1": 0.62, "2": 0.64}
    assert cell["ours"] == pytest.approx([62.0, 4.302652729749464 * 2 / 3**0.5], rel=1e-9)
    assert cell["difference"] == pytest.approx(-2.9)
    assert found["cells"]["OPD top-k"]["1.7B average"]["missing"] == [
        f"pair=qwen3_1_7b,arm=opd_topk,seed={seed}" for seed in (1, 2)
    ]
    verdict = found["verdicts"][0]
    assert (verdict["status"], verdict["n"], verdict["claimed"]) == ("reproduced", 3, [0.0, None])
    assert verdict["interval"][0] <= verdict["difference"][0] <= verdict["interval"][1]
    assert [
        each["status"] for each in found["verdicts"] if each["column"]["label"] == "1.7B average"
    ] == ["reproduced", "not testable here", "contradicted", "inconclusive"]
    assert found["marks"]["N"] == "machine-written notes on the paper"
    rows = [each for each in json.loads(table(hub, "json")) if each["overrides"]["arm"] == "vopd"]
    (row,) = [each for each in rows if "scored_on" not in each["overrides"]]
    assert row["values"]["avg@k"][0] == pytest.approx(0.52)


def test_all_papers_at_once(mini, tmp_path):
    text = paper_table(mini, "all")
    overview, *rest = text.split("\n\n## ")
    names = [part.partition(":")[0] for part in rest]
    assert names[:4] == ["vopd_table1", "vopd_k", "vopd_step_time", "vopd_gradient_norm"]
    assert "npd_lambda" not in names  # the sweep has no point of it
    assert overview.startswith("## All ")
    assert "| vopd_table1 | vOPD is better than OPD [N] |" in overview
    assert "28 of 30 points done" in overview
    for name in names:
        assert paper_table(mini, name) in text
    assert [each["table"]["name"] for each in json.loads(paper_table(mini, "all", "json"))] == names
    study.make(tmp_path, {"opd": (0.5,)}, pair="other")
    with pytest.raises(WorkdirError, match="no point of any paper's table"):
        paper_table(tmp_path, "all")


def test_text_is_text_in_markdown():
    assert markdown(["h"], [["a|b\nc"]]).splitlines()[2] == r"| a\|b c |"


def test_a_name_that_no_table_has(mini):
    with pytest.raises(
        ConfigError, match=r"did you mean 'vopd_table1'\?; the names are vopd_table1, vopd_k,"
    ):
        paper_table(mini, "vopd_tabel1")
    assert [line.split()[0] for line in list_of_papers().splitlines()] == list(paper_tables())


def test_the_command(mini, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        """(exit status, standard output, standard error)."""
        monkeypatch.setattr(sys, "argv", ["opdjax", "table", *map(str, arguments)])
        status = 0
        try:
            main.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    output = tmp_path / "out.json"
    written = run(mini, "--paper", "vopd_k", "--format", "json", "--output", output)
    assert written[:2] == (0, f"wrote {output}\n")
    assert output.read_text() == paper_table(mini, "vopd_k", "json") + "\n"
    assert run("--papers")[:2] == (0, list_of_papers() + "\n")
    status, _, error = run(mini, "--paper", "vopd")
    assert status != 0
    assert "there is no table 'vopd'" in error
    assert "no directory given; expected that of a sweep" in run()[2]
