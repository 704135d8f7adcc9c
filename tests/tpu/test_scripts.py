"""The launch scripts, against a gcloud that only writes down what it was asked, and the start on a
worker, on this machine.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
SCRIPTS = sorted((ROOT / "tpu").glob("*.sh"))
HARD = ["--data.prompt-format", 'Say it\'s {prompt} \\ "$HOME" `x`', "--data.source", "a b.jsonl"]
XPK = ["train", "experiments/vopd_math.py", "--workdir", "gs://b/run"]
CASES = {
    "create": ("create.sh", [], {}),
    "create_spot": (
        "create.sh",
        [],
        {"SPOT": "1", "VALID_UNTIL": "2h", "PROJECT": "a-project", "TOPOLOGY": "v5p-8"},
    ),
    "setup_vm": ("setup_vm.sh", [], {}),
    "setup_vm_files": ("setup_vm.sh", ["{tmp}/two words.jsonl"], {}),
    "run_one_host": (
        "run.sh",
        ["train", "experiments/vopd_math.py", "--workdir", "runs/a", *HARD],
        {},
    ),
    "run_four_hosts": (
        "run.sh",
        ["train", "experiments/vopd_math.py", "--workdir", "runs/a"],
        {"TOPOLOGY": "v6e-16"},
    ),
    "status": ("status.sh", [], {}),
    "babysit": (
        "babysit.sh",
        ["train", "experiments/vopd_math.py", "--workdir", "gs://b/run"],
        {"FILES": "{tmp}/data.jsonl", "SPOT": "1"},
    ),
    "xpk_one_host": (
        "xpk.sh",
        [*XPK, *HARD],
        {"TOPOLOGY": "v6e-4", "CLUSTER": "c", "IMAGE": "an/image", "SPOT": "1", "PROJECT": "p"},
    ),
    "xpk_four_hosts": ("xpk.sh", XPK, {"TOPOLOGY": "v6e-16", "CLUSTER": "c", "IMAGE": "an/image"}),
    "delete": ("delete.sh", [], {}),
    "delete_without_asking": ("delete.sh", [], {"YES": "1"}),
}


def call(script, arguments, tmp, **variables):
    """The finished script, with the fakes of `tmp` before everything else on PATH."""
    given = {
        "NAME": "opd",
        "ZONE": "us-central1-a",
        "TOPOLOGY": "v5e-8",
        "TMPDIR": "/tmp",
        "LC_ALL": "C.UTF-8",
    } | variables
    given = {name: value.replace("{tmp}", str(tmp)) for name, value in given.items() if value}
    environment = given | {"PATH": f"{tmp / 'bin'}:{os.environ['PATH']}"}
    arguments = [
        argument.format(tmp=tmp) if argument.startswith("{tmp}") else argument
        for argument in arguments
    ]
    return subprocess.run(
        [ROOT / "tpu" / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp,
    )


def told(finished, tmp):
    """What it printed, without the names of this machine's directories."""
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.replace(str(ROOT), "ROOT").replace(str(tmp), "TMP")


@pytest.fixture
def fakes(tmp_path):
    """A directory with data, and programs that write down the words they were called with, quoted
    as the scripts quote.
    """
    for name in ("two words.jsonl", "data.jsonl"):
        (tmp_path / name).touch()
    for name in ("gcloud", "git", "rm", "xpk"):
        fake(
            tmp_path,
            name,
            f"printf -v line '%q ' {name} \"$@\"; printf '%s\\n' \"${{line% }}\" >> "
            f"{tmp_path}/called",
        )
    return tmp_path


def fake(tmp, name, body):
    file = tmp / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_the_commands_and_runs_none(name, fakes):
    script, arguments, variables = CASES[name]
    finished = call(script, arguments, fakes, DRY_RUN="1", **variables)
    assert told(finished, fakes) == (GOLDEN / f"{name}.txt").read_text()
    called = (fakes / "called").read_text() if (fakes / "called").exists() else ""
    assert all(line.endswith("status --porcelain") for line in called.splitlines())


@pytest.mark.parametrize(
    "name", sorted(CASES.keys() - {"babysit"})
)  # which asks before it does anything: test_babysit.py
def test_the_commands_that_are_printed_are_those_that_are_run(name, fakes):
    script, arguments, variables = CASES[name]
    printed = [
        line
        for line in told(call(script, arguments, fakes, **variables), fakes).splitlines()
        if not line.startswith("#")
    ]
    called = (
        (fakes / "called")
        .read_text()
        .replace(str(ROOT), "ROOT")
        .replace(str(fakes), "TMP")
        .splitlines()
    )
    assert [line for line in called if not line.endswith("status --porcelain")] == printed


def test_the_arguments_reach_the_worker_as_they_were_given(tmp_path):
    """ssh hands the command to a shell, tmux to another: what `opdjax` gets in the end is what was
    typed.
    """
    home = tmp_path / "home"
    (home / "opdjax" / ".venv" / "bin").mkdir(parents=True)
    fake(
        tmp_path,
        "gcloud",
        'for word in "$@"; do case $word in --command=*) cd "$HOME" && bash -c '
        '"${word#--command=}";; esac; done',
    )
    fake(tmp_path, "sudo", 'echo "$@" >> $HOME/sudo')
    fake(tmp_path, "tmux", '[ "$1" = new-session ] || exit 1; shift 4; "$@"')
    opdjax = home / "opdjax" / ".venv" / "bin" / "opdjax"
    opdjax.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" > words\nexit 3\n")
    opdjax.chmod(0o755)
    arguments = ["train", "experiments/vopd_math.py", "--workdir", "runs/a", *HARD]
    finished = call("run.sh", arguments, tmp_path, HOME=str(home), TOPOLOGY="v6e-16")
    assert finished.returncode == 0, finished.stderr
    assert (home / "opdjax" / "words").read_text().splitlines() == [
        *arguments,
        "--mesh.processes",
        "-1",
    ]
    assert (home / "opdjax" / "run.log").read_text().splitlines()[-1] == "exit status 3"
    assert "fuser --kill" in (home / "sudo").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("create.sh", [], {"NAME": ""}, "NAME is not set; expected the name of the slice"),
        ("delete.sh", [], {"ZONE": ""}, "ZONE is not set; expected its zone"),
        ("create.sh", [], {"TOPOLOGY": ""}, "TOPOLOGY is not set; expected a slice, such as v5e-8"),
        (
            "create.sh",
            [],
            {"TOPOLOGY": "v6e-9"},
            "there is no topology 'v6e-9'; expected one of v6e-1, v6e-4, v6e-8",
        ),
        ("create.sh", [], {"TOPOLOGY": "h100-8"}, "h100-8 is not a TPU slice"),
        ("create.sh", ["v5e-8"], {}, "takes no arguments"),
        ("delete.sh", ["opd"], {}, "takes no arguments"),
        ("setup_vm.sh", ["absent.jsonl"], {}, "there is no file absent.jsonl"),
        ("run.sh", [], {}, "no command given"),
        ("xpk.sh", XPK, {"IMAGE": "i"}, "CLUSTER is not set"),
        ("xpk.sh", XPK, {"CLUSTER": "c"}, "IMAGE is not set"),
        (
            "xpk.sh",
            ["train", "e.py", "--workdir", "runs/a"],
            {"CLUSTER": "c", "IMAGE": "i"},
            "no --workdir gs://BUCKET/RUN among the arguments",
        ),
        (
            "run.sh",
            ["evaluate", "m"],
            {"TOPOLOGY": "v5e-16"},
            "v5e-16 has 4 hosts, where only train can run",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_is_run(script, arguments, variables, message, fakes):
    finished = call(script, arguments, fakes, **variables)
    assert finished.returncode != 0
    assert message in finished.stderr
    assert finished.stdout == ""
    assert not (fakes / "called").exists()


def test_a_failed_command_stops_the_script(fakes):
    fake(fakes, "gcloud", "exit 7")
    finished = call("setup_vm.sh", [], fakes)
    assert finished.returncode == 7
    assert len(finished.stdout.splitlines()) == 2  # the archive, and the copy that failed


@pytest.mark.parametrize("place", ["tpu", "scripts", ".ci", "tests/tpu/fake_worker"])
def test_shellcheck_has_nothing_to_say(place):
    """Every shell script of the repository; the test extra installs shellcheck."""
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    scripts = [
        file for file in sorted((ROOT / place).iterdir()) if file.is_file() and is_shell(file)
    ]
    checked = subprocess.run(
        [shellcheck, "-x", "-P", ROOT / place, *scripts], capture_output=True, text=True, cwd=ROOT
    )
    assert scripts
    assert checked.returncode == 0, checked.stdout


def is_shell(file):
    return file.suffix == ".sh" or file.read_bytes().startswith(
        (b"#!/usr/bin/env bash", b"#!/bin/sh")
    )
