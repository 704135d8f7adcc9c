"""The mini experiment compiled for eight chips of v5e, by the script that a user would call; needs
libtpu, no TPU.
"""

import importlib.util
import json
import pathlib
import runpy
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "tpu" / "aot_compile.py"
SIZES = [
    "--mesh.data",
    "2",
    "--mesh.fsdp",
    "4",
    "--train.prompts-per-step",
    "16",
    "--sampling.max-completion-length",
    "96",
]
TILE = 64  # a quarter of the tokens of a device


def test_the_script_says_how_it_is_called_and_what_is_wrong(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words, status in (
        ([], 2),
        (["experiments/mini_vopd.py", "v5e-7"], "there is no topology 'v5e-7'"),
    ):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert end.value.code == status or status in end.value.code
    assert "EXPERIMENT TOPOLOGY" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
)
def test_the_mini_experiment_fits_eight_chips_and_forms_no_logits_of_all_tokens(tmp_path):
    file = tmp_path / "aot.json"
    told = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            "experiments/mini_vopd.py",
            "v5e-8",
            "--json",
            file,
            *SIZES,
            "--estimator.tile",
            str(TILE),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "fits" in told.stdout
    (found,) = json.loads(file.read_text()).values()
    programs = {program["name"]: program for program in found["programs"]}
    assert set(programs) == {"prefill", "sample", "teacher", "update"}
    assert all(program["peak_bytes"] > 0 for program in programs.values())
    assert 0 < programs["update"]["most_logit_rows"] <= TILE
    assert any(row["kind"] == "all-gather" for row in programs["update"]["collectives"])
