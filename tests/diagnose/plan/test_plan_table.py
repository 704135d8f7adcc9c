"""`opdjax plan`: its table, its exit status, its errors."""

import dataclasses
import sys

import pytest

from opdjax.cli import main
from opdjax.diagnose.plan.aot import Program
from opdjax.diagnose.plan.estimate import estimate
from opdjax.diagnose.plan.hlo import Collective
from opdjax.diagnose.plan.table import fits, text, verdict

HEADING = """\
v5e-4: 4 devices of 15.75 GiB, 1 host; mesh data 2 x fsdp 2 x tensor 1
parameters: student 1,448; teacher 5,712
a step: 8 rows of 16 + 16 tokens; on a device 2 rows, 1 at a time (2 micro-batches)
"""


@pytest.fixture
def plan_of(monkeypatch, capsys, model, tmp_path):
    """plan_of(*arguments) -> (status, stdout, stderr) of `opdjax plan` on a tiny pair."""
    file = tmp_path / "experiment.py"
    file.write_text(
        "from opdjax.config import *\n"
        f"def get_config(): return Config(ModelConfig({model('one')!r}), "
        f"ModelConfig({model('two')!r}), "
        "train=TrainConfig(prompts_per_step=8), evaluation=EvaluationConfig(source=None))\n"
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["opdjax", "plan", str(file), *arguments])
        with pytest.raises(SystemExit) as end:
            main.main()
        return end.value.code, *capsys.readouterr()

    return run


def program(**changes):
    collective = Collective(
        "all-gather",
        2**20,
        "jit(update)/while > jit(update)/while/body/closed_call/jvp()/while",
        6,
        False,
    )
    open_ended = Collective("all-reduce", 2**10, "jit(update)/tiles", 1, True)
    fields = {
        "name": "update",
        "argument_bytes": 2**29,
        "temp_bytes": 2**29,
        "peak_bytes": 2**30,
    }
    fields |= {
        "compile_seconds": 3.0,
        "collectives": [collective, collective, open_ended],
        "most_logit_rows": 8,
    }
    return Program(**(fields | changes))


def test_the_table(run_of):
    plan = estimate(run_of("v5e-4"))
    shown = text(plan)
    assert shown.startswith(HEADING)
    lines = {line[:46].rstrip(): line[46:].split() for line in shown.splitlines()}
    assert lines["GiB on a device"] == ["prefill", "sample", "teacher", "loss", "backward"]
    assert len(lines["total"]) == 5
    assert lines["limited by"][1] == "memory"
    assert "at most 128 completion tokens a step" in shown
    assert shown.endswith(f"of {plan.capacity / 2**30:.2f} GiB")


def test_parameters_of_a_token_are_shown_of_experts(run_of):
    workload = run_of("v5e-4")
    student = dataclasses.replace(workload.student, num_experts=4, experts_per_token=1)
    shown = text(estimate(dataclasses.replace(workload, student=student)))
    assert "student 3,816, of which 1,512 act on a token; teacher 5,712\n" in shown


def test_the_compilers_report_is_added(run_of):
    plan = estimate(run_of("v5e-4"))
    shown = text(plan, [program()])
    row = next(line for line in shown.splitlines() if line.startswith("update   "))
    assert row.split()[:4] == ["update", "0.500", "0.500", "1.000"]
    assert "the largest array of logits holds 8 tokens; a tile has 8" in shown
    assert (
        "all-gather             2            12        12.0  jit(update)/while > jvp()/while"
        in shown
    )
    assert "1 a round" in shown  # a loop of unknown trip count
    assert fits(plan, [program()])


def test_what_does_not_fit_is_reported(run_of):
    plan = estimate(run_of("v5e-4"))
    large = program(peak_bytes=plan.capacity)
    assert not fits(plan, [large])
    message = "does not fit: update holds 15.75 GiB as compiled and 0.00 outside the program"
    assert message in verdict(plan, [large])
    refused = program(problem="RESOURCE_EXHAUSTED: 480.00G")
    assert "does not fit: update: RESOURCE_EXHAUSTED: 480.00G" in verdict(plan, [refused])
    assert "RESOURCE_EXHAUSTED" in text(plan, [refused])


def test_the_exit_status_is_whether_it_fits(plan_of):
    status, out, _ = plan_of("--topology", "v5e-8")
    assert (status, out.splitlines()[-1][:5]) == (0, "fits:")
    status, out, _ = plan_of("--topology", "v5e-1", "--sampling.max-completion-length", "65536")
    assert status == 1
    last = out.splitlines()[-1]
    assert last.startswith("does not fit: backward holds ")
    assert "the first item that does not fit is 'activations kept for the backward pass'" in last


def test_a_cpu_is_named_as_an_assumed_machine(plan_of):
    status, out, _ = plan_of("--topology", "cpu")
    assert status == 0
    assert out.startswith(
        "cpu (a generic machine of 8 cores, assumed rates): 1 devices of 16.00 GiB"
    )
    assert "student's parameters, cast" not in out  # float32, as a run on a CPU computes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v6e-9"), "there is no topology 'v6e-9'; expected one of v6e-1"),
        (
            ("--topology", "v5e-8", "--mesh.tensor", "2"),
            "mesh.tensor is 2, which does not divide num_key_value_heads 1 of the student",
        ),
        (
            ("--topology", "h100-8", "--aot"),
            "h100-8: XLA compiles for a GPU only on a machine with one",
        ),
    ],
)
def test_impossible_plans_are_refused(plan_of, arguments, message):
    status, out, err = plan_of(*arguments)
    assert status == 2
    assert message in err
    assert out == ""


def test_help_names_the_fields(monkeypatch, capsys):
    for arguments in (["plan"], ["plan", "--help"]):
        monkeypatch.setattr(sys, "argv", ["opdjax", *arguments])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == (2 if len(arguments) == 1 else 0)
        assert "opdjax plan EXPERIMENT --topology" in capsys.readouterr().out
