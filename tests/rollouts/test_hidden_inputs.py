"""Files and seeds alone decide a prompt: not the clock, the locale, the order of hashes or of
files.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from tiny_runs import SHORT, vary

from opdjax.config import MINI_PAIR, DataConfig, TeachConfig
from opdjax.config.grid import SweepPoint
from opdjax.config.validation import ConfigError, to_dict
from opdjax.data.references import ReferenceIndexError, read_index
from opdjax.diagnose.doctor import run_checks
from opdjax.rollouts.setup import facts, prepare
from opdjax.rollouts.write_references import _identity, teach
from opdjax.runs.workdir import (
    WorkdirError,
    claim,
    first_day,
    read_config,
    read_run_config,
    write_json,
)
from opdjax.sweeps.claims import SweepDirectory
from opdjax.sweeps.runner import _write_points
from opdjax.train import train

# As Llama 3's: the day is part of every conversation.
TEMPLATE = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d-%m') %}"
TEMPLATE += "{%- endif %}{{- '<|im_start|>user\n' + date_string + '\n' }}"


@pytest.fixture(scope="module")
def clocked(tmp_path_factory):
    """TINY for one step, with models whose chat template reads the clock."""
    places = {}
    for role in ("student", "teacher"):
        places[role] = tmp_path_factory.mktemp("clocked") / role
        shutil.copytree(MINI_PAIR / role, places[role])
        template = places[role] / "chat_template.jinja"
        template.write_text(TEMPLATE + template.read_text())
    models = {role: {"path": str(path)} for role, path in places.items()}
    return vary(data={"max_prompt_length": 48}, **SHORT, **models)


@pytest.fixture
def on_day(monkeypatch):
    """`on_day(0)` and `on_day(1)`: two time zones 25 hours apart never show the same day."""

    def move(number):
        monkeypatch.setenv("TZ", ("NUT11", "LINT-14")[number])
        time.tzset()
        return time.strftime("%Y-%m-%d")

    yield move
    monkeypatch.undo()
    time.tzset()


@pytest.mark.long
def test_a_run_keeps_the_day_on_which_it_began(clocked, on_day, tmp_path, monkeypatch):
    """Prompts are made, and the directory is claimed, before the first step: none is trained."""
    result = {"student": "student"}
    finish = lambda _, mirror, *__: write_json(mirror.directory / "result.json", result)
    monkeypatch.setattr("opdjax.train._run", finish)
    days = on_day(1), on_day(0)
    assert days[0] != days[1]
    train(clocked, tmp_path)
    assert read_run_config(tmp_path)["config"]["data"]["date"] == days[1]
    on_day(1)
    prompts = read_run_config(tmp_path)["data"]["prompts"]
    assert prepare(clocked).prompts.digest != prompts  # the day matters
    assert train(clocked, tmp_path)["student"] == "student"  # the same command continues
    # The file of the run means the same run wherever it is read.
    assert prepare(read_config(tmp_path)).prompts.digest == prompts
    with pytest.raises(WorkdirError, match=f"data.date: {days[1]!r} -> {days[0]!r}"):
        train(vary(clocked, data={"date": days[0]}), tmp_path)


def test_references_that_a_run_writes_are_of_the_day_of_the_run(clocked):
    assert _identity(clocked, "2024-07-26")["date"] == "2024-07-26"


def test_a_run_that_recorded_no_day_continues_on_the_day_it_is_given(clocked, on_day, tmp_path):
    day = on_day(0)
    setup = prepare(clocked)
    claim(tmp_path, setup.config, facts(setup))
    saved = read_run_config(tmp_path)
    del saved["config"]["data"]["date"]  # as earlier versions wrote it
    (tmp_path / "config.json").write_text(json.dumps(saved))
    other = on_day(1)
    for date, fits in ((day, True), (other, False)):
        setup = prepare(vary(clocked, data={"date": date}))
        if fits:
            claim(tmp_path, setup.config, facts(setup))
            continue
        with pytest.raises(WorkdirError, match="data.prompts"):
            claim(tmp_path, setup.config, facts(setup))


def test_all_points_of_a_sweep_have_the_day_on_which_it_began(clocked, on_day, tmp_path):
    sweep, day = SweepDirectory(tmp_path), on_day(0)
    points = [SweepPoint(f"seed={n}", {}, dataclasses.replace(clocked, seed=n)) for n in range(2)]
    _write_points(points[:1], sweep)
    on_day(1)
    _write_points(points, sweep)  # another shard, on the next day
    assert [first_day(tmp_path / point.id) for point in points] == [day, day]
    setup = prepare(points[1].config, first_day(tmp_path / points[1].id))
    assert setup.config.data.date == day


@pytest.mark.long
def test_references_of_one_file_are_of_one_day(clocked, on_day, tmp_path):
    file = tmp_path / "answers.jsonl"
    data = {"source": "arithmetic:train[:4]", "references": str(file)}
    lesson = dataclasses.replace(
        vary(clocked, data=data), teach=TeachConfig(num_answers=1, max_completion_length=20)
    )
    day = on_day(0)
    teach(lesson)
    assert read_index(file).teacher["date"] == day
    other = on_day(1)
    teach(dataclasses.replace(lesson, teach=dataclasses.replace(lesson.teach, num_answers=2)))
    with pytest.raises(ReferenceIndexError, match=f"date: {day!r} -> {other!r}"):
        teach(vary(lesson, data={"date": other}))


def test_the_doctor_names_a_template_that_reads_the_clock(clocked):
    (finding,) = run_checks(vary(clocked, data={"date": "2024-07-26"}), 2, ("chat_template",))
    assert "the student's chat template reads the clock" in str(finding)
    assert "data.date, 2024-07-26" in str(finding)
    with pytest.raises(ConfigError, match=r"data.date is '2024-7-26'; expected a day such as"):
        DataConfig(date="2024-7-26")


def test_a_template_without_a_clock_records_no_day():
    assert prepare(vary(**SHORT)).config.data.date is None


def test_a_template_that_draws_at_random_is_refused(clocked, tmp_path):
    student = shutil.copytree(clocked.student.path, tmp_path / "student")
    (student / "chat_template.jinja").write_text("{{ [1, 2] | random }}")
    with pytest.raises(ValueError, match="No filter named 'random'"):
        prepare(vary(clocked, student={"path": str(student)}))


SCRIPT = """
import json, sys
from opdjax.cli.parsing import load_experiment
from opdjax.data.prompts import encode_prompts, load_rows
from opdjax.data.tokenizer import load_tokenizer
config = load_experiment(sys.argv[1])
tokenizer = load_tokenizer(config.student.path)
prompts = encode_prompts(load_rows(config.data, tokenizer), config.data, tokenizer, tokenizer)
print(prompts.digest)
"""


def test_locale_time_zone_and_hash_seed_change_no_prompt(clocked, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for name in ("d", "b", "a", "c"):  # files of a directory have an order of their own
        table = pyarrow.table({"prompt": [f"1+{ord(name)}=", f"né {name}"]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    config = vary(clocked, data={"date": "2024-07-26", "source": f"parquet:{tmp_path}"})
    saved = to_dict(vary(config, data={"prompt_format": "é {prompt}"}))
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"config": saved}, ensure_ascii=False), encoding="utf-8")
    surroundings = (
        {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TZ": "NUT11"},
        # No UTF-8 mode: text files would be read as ASCII.
        {"PYTHONHASHSEED": "2", "LC_ALL": "C", "TZ": "LINT-14"}
        | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    digests = []
    for variables in surroundings:
        command = [sys.executable, "-c", SCRIPT, str(file)]
        run = subprocess.run(command, env=os.environ | variables, capture_output=True, check=False)
        assert not run.returncode, run.stderr.decode(errors="replace")[-2000:]
        digests.append(run.stdout)
    assert digests[0] == digests[1]
