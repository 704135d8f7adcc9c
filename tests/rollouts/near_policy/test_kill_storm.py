"""`scripts/kill_storm.py` finds nothing amiss: a few kills of one way to draw. Its own table is of
many kills of all ways.
"""

import subprocess
import sys

import pytest
from tiny_runs import ROOT


@pytest.mark.long
def test_a_run_in_two_processes_survives_kills_of_either(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "kill_storm.py"),
        "--workdir",
        str(tmp_path / "storm"),
        "--kills",
        "20",
    ]
    command += ["--only", "continuous, fixed lag 2, process"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| yes | each stored once |" in done.stdout
