"""The wheel stands alone: installed in an empty directory, it has everything that commands read."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the files that git knows, which a build leaves as they are."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    copy = ["cp", "-d", "--parents", *filter(None, listed.stdout.decode().split("\n")), source]
    subprocess.run(copy, cwd=ROOT, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", out, source], check=True, timeout=300)
    (path,) = out.glob("opdjax-*.whl")
    return path


def test_the_wheel_holds_all_files_of_the_package(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "opdjax"
    links = [package / "assets" / "experiments"]
    files = [path for start in (package, *links) for path in start.rglob("*")]
    expected = {
        str(path.relative_to(ROOT))
        for path in files
        if path.is_file() and "__pycache__" not in path.parts and "results" not in path.parts
    } - {"opdjax/assets/experiments/README.md"}
    assert {name for name in packed if name.startswith("opdjax/")} == expected
    assert {"opdjax/py.typed", "opdjax/assets/judge/rubricator.txt"} <= expected
    assert "opdjax/assets/experiments/mini_vopd.py" in expected


@pytest.mark.long
def test_the_wheel_trains_judges_and_exports_in_an_empty_directory(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True)
    (work / "rows.jsonl").write_text('{"prompt": "34-17+25=", "answer": "42"}\n' * 4)

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "opdjax", *arguments],
            cwd=work,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "@mini_vopd" in run("experiments")
    few = ["--train.num-steps", "1", "--train.prompts-per-step", "4"]
    few += ["--evaluation.num-prompts", "4", "--evaluation.num-samples", "2"]
    run("train", "@mini_vopd", "--workdir", "run", "--data.source", "rows.jsonl", *few)
    run("report", "run")
    run("export", "run", "out")
    assert "avg@2" in run("evaluate", "out", "--evaluation.num-samples", "2")
    data = ["--data.references", "references.jsonl", "--data.source", "arithmetic:train"]
    small = [*data, *few, "--sampling.num-generations", "2", "--rubrics.num-references", "1"]
    run("references", "@mini_ropd", *small, "--teach.num-answers", "1")
    run("train", "@mini_ropd", "--workdir", "judged", *small)
