"""A seeded part of `scripts/chaos.py`: disturbed runs end as undisturbed ones."""

import json
import random
import subprocess
import sys

import pytest
from tiny_runs import ROOT, environment

SCRIPT = ROOT / "scripts" / "chaos.py"


def study(out, runs, modes, faults):
    """(exit status, rows) of some trials."""
    command = [sys.executable, str(SCRIPT), "--runs", str(runs), "--out", str(out)]
    command += ["--mode", modes, "--fault", faults]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (out / "trials.jsonl").exists(), ran.stdout + ran.stderr
    return ran.returncode, [json.loads(line) for line in (out / "trials.jsonl").open()]


@pytest.mark.long
@pytest.mark.parametrize(
    ("modes", "faults"),
    [
        ("thread", "kill"),
        ("on-policy;two processes;refresh;process", "kill;no space;clock"),
        ("judged;judged, evolving", "kill;judge faults;judge down"),
        ("gs;gs, thread", "kill;split brain;lost lease;storage faults"),
    ],
)
def test_every_kind_of_run_survives(modes, faults, tmp_path):
    status, rows = study(tmp_path / "chaos", 4, modes, faults)
    assert status == 0, [row for row in rows if row["outcome"] == "VIOLATION"]


@pytest.fixture
def chaos(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import chaos_faults

    return chaos_faults


def test_a_fault_strikes_at_the_write_that_the_seed_says(chaos, tmp_path):
    code = f"""
import errno, random, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
from chaos_faults import Moment, refuse
refuse(errno.ENOSPC)(Moment({str(tmp_path)!r}, "metrics", 2, {str(tmp_path)!r} + ".struck", random))
for number in range(3):
    for name in ("other", "metrics.jsonl"):
        try:
            open({str(tmp_path)!r} + "/" + name, "a").close()
        except OSError as error:
            print(number, error.filename.rpartition("/")[2], error.errno == errno.ENOSPC)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["1 metrics.jsonl True", "2 metrics.jsonl True"]


def test_damage_changes_what_it_says(chaos):
    data, draw = bytearray(b'{"step": 1}\n{"step": 2}\n'), random.Random(0)
    changed = chaos.flip(bytearray(data), draw)
    assert sum(bin(a ^ b).count("1") for a, b in zip(data, changed, strict=True)) == 1
    assert len(chaos.cut(bytearray(data), draw)) < len(data)
    assert chaos.drop_row(bytearray(data), draw) in (data[:12], data[12:])
    assert not chaos.half_row(bytearray(data), draw).endswith(b"\n")
    zeroed = chaos.zero(bytearray(data), draw)
    assert len(zeroed) == len(data)
    assert b"\0" in zeroed
