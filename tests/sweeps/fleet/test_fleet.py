"""Sweeps as jobs of engines that find machines: what is submitted, what is refused, and what the
engines' own checks say of it.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from opdjax.cli import main
from opdjax.config import PACKAGE, ROPD_CODE, ApiConfig, Config, JudgeConfig, SamplingConfig
from opdjax.config.experiments import load_sweep
from opdjax.config.fleet import FleetConfig
from opdjax.config.grid import points, seeds
from opdjax.config.topology import TOPOLOGIES
from opdjax.config.validation import ConfigError
from opdjax.sweeps.fleet import skypilot, xpk
from opdjax.sweeps.fleet.shards import FleetError, make_fleet

ROOT = pathlib.Path(__file__).parents[3]
FILE, URL = "experiments/sweeps/mini_vopd.py", "gs://bucket/a sweep"
KEY = "SOME_JUDGE_KEY"
# Another environment's Python with skypilot, and another one's xpk: both want libraries that the
# package's own environment has in others.
SKY_PYTHON, XPK = os.environ.get("OPDJAX_SKY_PYTHON"), os.environ.get("OPDJAX_XPK")


def fleet(topology="v5e-8", url=URL, file=FILE, made=None, options=(), **config):
    made = made or load_sweep(str(ROOT / FILE))
    return make_fleet(file, url, made, FleetConfig(topology, **config), options)


def judged():
    judges = {"rubricator": JudgeConfig("m"), "verifier": JudgeConfig("m")}
    judges["api"] = ApiConfig("https://api.example/v1", KEY)
    config = Config(sampling=SamplingConfig(2), estimator=ROPD_CODE, **judges)
    return points(config, seeds(2))


def test_every_shard_is_a_job_with_a_share_of_the_points():
    made = fleet(shards=3, spot=True, options=["--retry-failed"])
    assert len({shard.name for shard in made.shards}) == 3
    for number, shard in enumerate(made.shards, 1):
        assert re.fullmatch(r"[a-z][a-z0-9-]{0,39}", shard.name)
        assert (
            shard.command
            == f"opdjax sweep {FILE} --workdir 'gs://bucket/a sweep' --retry-failed --shard "
            f"{number}/3"
        )
    assert {s.name for s in fleet(shards=3, url="gs://other/x").shards}.isdisjoint(
        s.name for s in made.shards
    )
    assert [s.name for s in fleet(shards=3, options=["--retry-failed"]).shards] == [
        s.name for s in made.shards
    ]  # found again


def test_what_skypilot_is_told_of_tpus_and_of_gpus():
    task = yaml.safe_load(next(iter(skypilot.tasks(fleet(spot=True, zone="us-west4-a")).values())))
    assert task["resources"] == {
        "infra": "gcp/*/us-west4-a",
        "accelerators": "tpu-v5litepod-8",
        "accelerator_args": {"tpu_vm": True, "runtime_version": "v2-alpha-tpuv5-lite"},
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 3},
    }
    assert "--requirement tpu/requirements.txt --editable '.[eval]'" in task["setup"]
    task = yaml.safe_load(next(iter(skypilot.tasks(fleet("h100-8", made=judged())).values())))
    assert task["resources"]["accelerators"] == "H100:8"
    assert "--editable '.[eval,judge,cuda,gcs]'" in task["setup"]
    assert task["secrets"] == {KEY: None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "runs/sweep"}, "--workdir is 'runs/sweep'; expected gs://BUCKET/NAME"),
        ({"topology": "v5e-16"}, "fleet.topology is 'v5e-16'; expected a single host, not 4"),
        ({"topology": "cpu"}, "fleet.topology is 'cpu'; expected TPUs or GPUs"),
        ({"topology": "v5e-9"}, "there is no topology 'v5e-9'"),
        ({"shards": 1000}, "fleet.shards is 1000; expected at most"),
        ({"file": "/somewhere/sweep.py"}, "is not in the checkout"),
        ({"file": "experiments/absent.py"}, "is not in the checkout"),
    ],
)
def test_what_could_not_run_is_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fleet(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"cluster": "c", "image": "i"},
            "fleet.topology is 'v5e-8'; expected one of v4-8, v5p-8, v6e-1, v6e-4, for which xpk",
        ),
        (
            {"topology": "h100-8", "cluster": "c", "image": "i"},
            "or --launch skypilot",
        ),
        (
            {"topology": "v6e-4", "image": "i"},
            "fleet.cluster is ''; expected the name of a cluster",
        ),
        (
            {"topology": "v6e-4", "cluster": "c"},
            "fleet.image is ''; expected the name of the image",
        ),
        (
            {"topology": "v6e-4", "cluster": "c", "image": "i", "made": judged()},
            f"the points need {KEY}",
        ),
    ],
)
def test_what_xpk_could_not_run_is_refused(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        xpk.launch(fleet(**given), print, is_dry=True)


def sweep(monkeypatch, capsys, *words):
    """(exit status, output, errors) of `opdjax sweep`."""
    monkeypatch.setattr(sys, "argv", ["opdjax", "sweep", *words])
    monkeypatch.chdir(ROOT)
    status = 0
    try:
        main.main()
    except SystemExit as error:
        status = error.code or 0
    return status, *capsys.readouterr()


def program(directory, name, body):
    file = directory / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


LAUNCH = [
    FILE,
    "--workdir",
    "gs://b/s",
    "--launch",
    "skypilot",
    "--fleet.topology",
    "v5e-8",
    "--fleet.shards",
    "3",
]


def test_a_dry_run_prints_what_is_submitted_and_submits_nothing(monkeypatch, capsys, tmp_path):
    program(tmp_path, "sky", f"echo called >> {tmp_path}/called")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, out, _ = sweep(monkeypatch, capsys, *LAUNCH, "--dry-run")
    assert status == 0
    assert not (tmp_path / "called").exists()
    found = [
        document
        for document in yaml.safe_load_all(out.replace("\n# opdjax", "\n---\n# opdjax"))
        if document
    ]
    assert [task["run"].split()[-1] for task in found] == ["1/3", "2/3", "3/3"]


def test_shards_are_submitted_but_for_those_that_run(monkeypatch, capsys, tmp_path):
    """A sky that keeps the tasks it is given, has one of them running, and fails at the third at
    first.
    """
    names = [
        shard.name
        for shard in make_fleet(
            FILE, "gs://b/s", load_sweep(str(ROOT / FILE)), FleetConfig("v5e-8", 3), []
        ).shards
    ]
    running = json.dumps([{"job_name": names[0], "status": "RUNNING"}])
    program(
        tmp_path,
        "sky",
        f"if [ \"$2\" = queue ]; then echo '{running}'; exit; fi\nfor last; do :; done\npwd >> "
        f"{tmp_path}/where\n"
        f"case $last in *3of3.yaml) [ -e {tmp_path}/again ] || {{ touch {tmp_path}/again; exit 7; "
        f'}} ;; esac\ncp "$last" {tmp_path}',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, out, error = sweep(monkeypatch, capsys, *LAUNCH)
    assert status == 2
    assert (
        f"{names[2]} was not submitted (sky exited with 7); submitted before: {names[1]}" in error
    )
    assert f"{names[0]} is running already" in out
    status, out, _ = sweep(monkeypatch, capsys, *LAUNCH)
    assert status == 0
    assert "2 of 3 shards were submitted" in out
    assert sorted(file.stem for file in tmp_path.glob("*.yaml")) == names[1:]
    assert set((tmp_path / "where").read_text().split()) == {str(PACKAGE.parent)}


@pytest.mark.parametrize("queue", ["exit 1", "echo No jobs."])
def test_a_queue_that_tells_nothing_is_told_of(monkeypatch, capsys, tmp_path, queue):
    program(tmp_path, "sky", f'if [ "$2" = queue ]; then {queue}; exit; fi')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, out, _ = sweep(monkeypatch, capsys, *LAUNCH)
    assert status == 0
    assert "note: sky jobs queue could not list the running jobs" in out


def test_without_the_engine_it_is_said_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, error = sweep(monkeypatch, capsys, *LAUNCH)
    assert status == 2
    assert "there is no command sky; pip install 'skypilot[gcp]'" in error
    with pytest.raises(FleetError, match="there is no command xpk"):
        xpk.launch(fleet("v6e-4", cluster="c", image="i"), print, is_dry=False)


@pytest.mark.parametrize("words", [["--shard", "1/2"], ["--jobs", "2"]])
def test_options_of_this_machine_do_not_go_with_a_fleet(monkeypatch, capsys, words):
    status, _, error = sweep(monkeypatch, capsys, *LAUNCH, *words)
    assert status == 2
    assert "cannot be used with --launch" in error


def test_a_fleet_without_an_engine_is_refused(monkeypatch, capsys):
    status, _, error = sweep(
        monkeypatch, capsys, FILE, "--workdir", "gs://b/s", "--fleet.topology", "v5e-8"
    )
    assert status == 2
    assert "--fleet is set without --launch" in error


SKY_CHECK = """
import sys, yaml, sky
for text in sys.stdin.read().split("=====\\n"):
    config = yaml.safe_load(text)
    overrides = [(name, "x") for name in config.get("secrets", {})]
    task = sky.Task.from_yaml_config(config, secrets_overrides=overrides)
    (resources,) = task.resources
    print(task.name, list(resources.accelerators), resources.use_spot)
"""


@pytest.mark.skipif(not SKY_PYTHON, reason="OPDJAX_SKY_PYTHON names no Python with skypilot")
def test_skypilot_takes_every_task():
    machines = TOPOLOGIES.values()
    slices = [each.name for each in machines if each.hosts == 1 and each.backend != "cpu"]
    texts = [
        text
        for name in slices
        for text in skypilot.tasks(fleet(name, spot=True, made=judged())).values()
    ]
    texts.append((ROOT / "tpu" / "sky.yaml").read_text())
    told = subprocess.run(
        [SKY_PYTHON, "-c", SKY_CHECK],
        input="=====\n".join(texts),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert told.returncode == 0, told.stderr
    assert len(told.stdout.splitlines()) == len(slices) + 1


@pytest.mark.skipif(not XPK, reason="OPDJAX_XPK names no xpk")
@pytest.mark.parametrize("topology", xpk._ONE_HOST)
def test_xpk_makes_a_manifest_of_every_command(topology, tmp_path):
    made = fleet(
        topology, cluster="c", image="gcr.io/p/i", zone="us-central1-a", project="p", spot=True
    )
    words = xpk.command(made.shards[0], made)
    file = tmp_path / "manifest.yaml"
    dry = ["--dry-run", "--skip-validation", "--output-manifest-file", str(file)]
    told = subprocess.run([XPK, *words[1:], *dry], capture_output=True, text=True, cwd=tmp_path)
    assert told.returncode == 0, told.stdout + told.stderr
    (job,) = yaml.safe_load(file.read_text())["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["parallelism"] == 1  # one host
    assert made.shards[0].command in file.read_text().replace("'\\''", "'")
