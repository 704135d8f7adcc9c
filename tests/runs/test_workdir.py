"""The work directory: one writer, one config, and files that survive being cut off in mid-write."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from opdjax.config import (
    CheckpointConfig,
    Config,
    EstimatorConfig,
    EvaluationConfig,
    MeshConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.saved import upgrade
from opdjax.config.validation import ConfigError, from_dict, to_dict
from opdjax.engine.evaluate import evaluate
from opdjax.runs.results import evaluations_since_best
from opdjax.runs.workdir import (
    COUNTED,
    SPENDING,
    RowCounter,
    WorkdirError,
    append_lines,
    check_logs,
    claim,
    cut_lines,
    environment,
    first_day,
    lock_file,
    locked,
    read_config,
    read_lines,
    write_json,
)

FACTS = {"data": {"prompts": "d1", "num_prompts": 3}, "environment": {"jax": "0.10.2", "cores": 2}}
ENTER = """
import pathlib, sys
from opdjax.runs.workdir import locked
with locked(pathlib.Path(sys.argv[1])):
    print("entered", flush=True)
    sys.stdin.read()
"""


# The lock


def test_a_second_process_is_refused_while_the_first_holds_the_directory(tmp_path):
    workdir = tmp_path / "new" / "run"
    with subprocess.Popen(
        [sys.executable, "-c", ENTER, workdir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "entered\n"
        message = (
            f"{workdir} is being written by another run; wait for it or choose another --workdir"
        )
        with pytest.raises(WorkdirError, match=message), locked(workdir):
            pytest.fail("entered a directory that another process holds")
        other.communicate()
    with locked(workdir):
        pass


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", ENTER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "entered\n"
        other.kill()
        other.wait()
        with locked(tmp_path):
            assert (tmp_path / ".lock").exists()


def test_the_lock_is_released_when_the_run_fails(tmp_path):
    def run():
        with locked(tmp_path):
            with pytest.raises(WorkdirError), locked(tmp_path):
                pass
            raise KeyError("the run")

    with pytest.raises(KeyError):
        run()
    with locked(tmp_path):
        pass


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    workdir = tmp_path / "runs" / "a"
    with pytest.raises(KeyError), locked(workdir), locked(workdir, "generator"):
        raise KeyError("the settings")
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    with locked(workdir):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]
    with locked(workdir):
        (workdir / "config.json").touch()
    assert list(workdir.iterdir()) == [workdir / "config.json"]


def test_a_lock_that_its_holder_removes_is_held_by_nobody(tmp_path, monkeypatch):
    file = tmp_path / ".lock"
    with monkeypatch.context() as late:
        late.setattr("fcntl.flock", lambda opened, how: file.unlink())
        assert lock_file(file) is None
    with lock_file(file):
        assert lock_file(file) is None


# The config of a run


def test_claiming_writes_a_config_that_reads_back(tmp_path):
    config = Config(train=TrainConfig(num_steps=7), seed=3)
    claim(tmp_path, config, FACTS)
    assert read_config(tmp_path) == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["data"] == FACTS["data"]
    assert written["environment"] == FACTS["environment"]


def test_the_same_run_may_continue_without_a_word(tmp_path, capsys):
    claim(tmp_path, Config(), FACTS)
    before = (tmp_path / "config.json").read_bytes()
    claim(tmp_path, Config(), FACTS)
    assert (tmp_path / "config.json").read_bytes() == before
    assert capsys.readouterr().out == ""


def test_another_config_is_refused_with_what_differs(tmp_path):
    claim(tmp_path, Config(), FACTS)
    before = (tmp_path / "config.json").read_bytes()
    changed = Config(train=TrainConfig(num_steps=7), sampling=SamplingConfig(num_generations=2))
    with pytest.raises(WorkdirError) as error:
        claim(tmp_path, changed, FACTS)
    message, *lines = str(error.value).split("\n  ")
    assert (
        message
        == f"{tmp_path} holds a run of another config; choose another --workdir, with --from "
        f"{tmp_path} to go on from this run, or undo (there -> now):"
    )
    assert lines == ["config.sampling.num_generations: 1 -> 2", "config.train.num_steps: 100 -> 7"]
    assert (tmp_path / "config.json").read_bytes() == before


def test_another_evaluation_is_recorded_unless_its_grader_gives_rewards(tmp_path, capsys):
    claim(tmp_path, Config(), FACTS)
    append_lines(tmp_path / "eval.jsonl", [{"step": 0, "temperature": 1.0}])
    for number, every in enumerate((5, 0), 1):
        claim(tmp_path, Config(evaluation=EvaluationConfig(every=every)), FACTS)
        assert read_config(tmp_path).evaluation.every == every
        changes = json.loads((tmp_path / "config.json").read_text())["evaluation_changes"]
        assert changes[number - 1] == [f"evaluation.every: {5 - every} -> {every}"]
    assert read_lines(tmp_path / "eval.jsonl") == [
        {"step": 0, "temperature": 1.0}
    ]  # the same scores

    facts = FACTS | {"data": FACTS["data"] | {"evaluation": "d2"}}
    claim(tmp_path, Config(evaluation=EvaluationConfig(grader="exact", num_prompts=3)), facts)
    assert read_lines(tmp_path / "eval.jsonl") == []
    assert read_lines(tmp_path / "eval-3.jsonl") == [{"step": 0, "temperature": 1.0}]
    assert json.loads((tmp_path / "config.json").read_text())["data"] == facts["data"]
    with pytest.raises(WorkdirError, match="data.evaluation: 'd2' -> 'd3'"):
        claim(
            tmp_path, read_config(tmp_path), FACTS | {"data": facts["data"] | {"evaluation": "d3"}}
        )

    with pytest.raises(WorkdirError, match="evaluation.num_prompts: 3 -> 512"):
        claim(tmp_path, Config(), facts, is_learner=False)

    rewarded = Config(estimator=EstimatorConfig("grpo"), sampling=SamplingConfig(num_generations=2))
    (tmp_path / "rewarded").mkdir()
    claim(tmp_path / "rewarded", rewarded, FACTS)
    changed = dataclasses.replace(rewarded, evaluation=EvaluationConfig(grader="exact"))
    with pytest.raises(WorkdirError, match="evaluation.grader: 'gsm8k' -> 'exact'"):
        claim(tmp_path / "rewarded", changed, FACTS)


def test_other_data_are_refused_too(tmp_path):
    claim(tmp_path, Config(), FACTS)
    with pytest.raises(WorkdirError, match="data.prompts: 'd1' -> 'd2'"):
        claim(tmp_path, Config(), FACTS | {"data": {"prompts": "d2", "num_prompts": 3}})


def test_another_environment_is_only_noted(tmp_path, capsys):
    claim(tmp_path, Config(), FACTS)
    claim(tmp_path, Config(), FACTS | {"environment": {"jax": "0.11.0", "cores": 2}})
    expected = (
        "note: continuing under another environment.jax: '0.10.2' -> '0.11.0'; results may differ "
        "in the last bits\n"
    )
    assert capsys.readouterr().out == expected
    # What is done on damage changes no result, and is recorded for no comparison.
    previous = CheckpointConfig(on_damage="previous")
    claim(tmp_path, Config(checkpoint=previous), FACTS)
    assert capsys.readouterr().out == ""


def test_the_environment_can_be_written_and_names_the_machine(tmp_path):
    found = environment(["cpu", "cpu"])
    write_json(tmp_path / "e.json", found)
    assert json.loads((tmp_path / "e.json").read_text()) == found
    assert found["devices"] == ["cpu", "cpu"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["jax"] == __import__("jax").__version__


def test_a_directory_without_a_run_says_so(tmp_path):
    with pytest.raises(
        WorkdirError, match=f"{tmp_path} has no config.json; expected the work directory of a run"
    ):
        read_config(tmp_path)


def test_a_config_file_that_was_tampered_with_is_refused_by_name(tmp_path):
    claim(tmp_path, Config(), FACTS)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_steps"', '"num_stepz"'))
    with pytest.raises(
        ConfigError, match=r"unknown field 'train\.num_stepz'; did you mean 'num_steps'\?"
    ):
        read_config(tmp_path)


# Files


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_json(file, {"a": 1})
    assert json.loads(file.read_text()) == {"a": 1}

    def fail_in_the_middle(self, text):
        with self.open("w") as out:
            out.write(text[: len(text) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "write_text", fail_in_the_middle)
    with pytest.raises(OSError, match="disk full"):
        write_json(file, {"a": 2, "b": 3})
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "other.json", {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert not (tmp_path / "other.json").exists()


def test_what_json_cannot_hold_leaves_the_file_alone(tmp_path):
    file = tmp_path / "result.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}


def test_lines_are_appended_and_read_back(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_lines(file) == []
    append_lines(file, [{"step": 1, "text": "né\n你好\u2028"}])
    append_lines(file, [])
    append_lines(file, [{"step": 2}, {"step": 2, "x": None}])
    assert read_lines(file) == [
        {"step": 1, "text": "né\n你好\u2028"},
        {"step": 2},
        {"step": 2, "x": None},
    ]
    assert file.read_text().count("\n") == 3


@pytest.mark.parametrize("keep", range(len('{"step": 2, "loss": 0.25}') + 1))
def test_a_last_line_that_was_cut_off_is_ignored(tmp_path, keep):
    file = tmp_path / "rows.jsonl"
    append_lines(file, [{"step": 1, "loss": 0.5}])
    with file.open("a") as out:
        out.write('{"step": 2, "loss": 0.25}'[:keep])
    assert read_lines(file) == [{"step": 1, "loss": 0.5}]
    # A continued run cuts first, so that its own rows never join the torn one.
    cut_lines(file, 1)
    append_lines(file, [{"step": 2, "loss": 0.125}])
    assert read_lines(file) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.125}]


def test_a_torn_line_in_the_middle_is_not_passed_over(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(WorkdirError, match=r"rows\.jsonl, line 2 is damaged: "):
        read_lines(file)


def test_cutting_drops_the_rows_of_later_steps(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"step": 0, "x": 0.1},
        {"step": 1},
        {"step": 2, "n": 1},
        {"step": 2, "n": 2},
        {"step": 3},
    ]
    append_lines(file, rows)
    cut_lines(file, 2)
    assert read_lines(file) == rows[:4]
    cut_lines(file, 2)
    assert read_lines(file) == rows[:4]
    cut_lines(file, -1)
    assert file.read_text() == ""
    cut_lines(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_facts_do_not_leak_into_the_config(tmp_path):
    # The recorded config is the run's own, not that of the machine it started on.
    config = dataclasses.replace(Config(), seed=9)
    claim(tmp_path, config, FACTS)
    claim(
        tmp_path,
        config,
        {"data": FACTS["data"], "environment": {"jax": "9", "cores": 96, "devices": ["TPU v5"]}},
    )
    assert read_config(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["environment"] == FACTS["environment"]


@pytest.mark.parametrize("section", ["train", "sampling", "student"])
def test_a_saved_config_with_a_damaged_section_names_it(section):
    for damaged in (3, None, ["num_steps"]):
        with pytest.raises(ConfigError, match=f"{section} is .*; expected a section with named"):
            upgrade(to_dict(Config()) | {section: damaged})


def test_how_a_run_is_computed_may_change_and_is_told(tmp_path, capsys):
    facts = {"data": {}, "environment": {}}
    claim(tmp_path, Config(), facts)
    sampling = SamplingConfig(slots=6)
    rows = TrainConfig(gradient_accumulation_steps=4, remat="layer")
    claim(tmp_path, Config(sampling=sampling, train=rows, mesh=MeshConfig(2, 2)), facts)
    told = capsys.readouterr().out
    assert "sampling.slots: None -> 6" in told
    assert "mesh.fsdp: 1 -> 2" in told
    with pytest.raises(WorkdirError, match=r"sampling.top_k: 0 -> 5"):
        claim(
            tmp_path,
            Config(sampling=SamplingConfig(top_k=5), estimator=EstimatorConfig("full_kl")),
            facts,
        )


def test_a_run_that_an_earlier_version_began_is_continued(tmp_path, capsys):
    """Unless it had a setting that no field holds today: then its results would change half-way."""
    file = pathlib.Path(__file__).parents[1] / "config" / "saved_before_130.json"
    saved = json.loads(file.read_text())["refresh"]
    facts = {"data": {}, "environment": {}}
    (tmp_path / "config.json").write_text(json.dumps({"config": saved, **facts}))
    today = from_dict(Config, upgrade(saved))
    claim(tmp_path, today, facts)
    assert not capsys.readouterr().out
    saved["optimizer"]["b1"] = 0.8
    saved["estimator"]["tile"] = 64  # how it was computed: of no matter
    (tmp_path / "config.json").write_text(json.dumps({"config": saved, **facts}))
    with pytest.raises(WorkdirError, match=r"undo \(there -> now\):\n  optimizer.b1: 0.8 -> 0.9$"):
        claim(tmp_path, today, facts)


# Rows that belong before a checkpoint


def logged(workdir, steps):
    append_lines(workdir / "metrics.jsonl", [{"step": step, "x": 0.1 * step} for step in steps])
    usage = [{"step": step, "role": "judge", "calls": 3, "dollars": 0.25} for step in steps]
    append_lines(workdir / SPENDING, usage)


@pytest.fixture
def counted(tmp_path):
    """A work directory and what belongs before its step 4; rows of step 5 are written too."""
    counter = RowCounter(tmp_path)
    logged(tmp_path, (1, 2))
    append_lines(tmp_path / "rubrics.jsonl", [{"step": 5}, {"step": 1}])
    scores = {"eval.jsonl": {"temperature": 0.7}}
    scores["divergence.jsonl"] = {"student": {}, "teacher": {}}
    for name, own in scores.items():
        append_lines(tmp_path / name, [{"step": step} | own for step in (0, 1)])
    first = counter.until(2)
    assert first["metrics.jsonl"]["rows"] == 2
    assert first["spent"]["dollars"] == 0.5
    logged(tmp_path, (3, 4))
    before = counter.until(4)
    assert before == RowCounter(tmp_path).until(4)
    assert before["rubrics.jsonl"]["rows"] == 1
    assert "samples.jsonl" not in before
    logged(tmp_path, (5,))
    return tmp_path, json.loads(json.dumps(before))


def test_nothing_is_said_of_a_whole_log(counted, capsys):
    workdir, before = counted
    check_logs(workdir, 4, before)
    for name in COUNTED:
        cut_lines(workdir / name, 4)
    check_logs(workdir, 4, before)
    check_logs(workdir, 4, {})
    (workdir / "eval.jsonl").rename(workdir / "eval-1.jsonl")  # the evaluation has changed
    check_logs(workdir, 4, before)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [name for name in COUNTED if name != "samples.jsonl"])
def test_lost_and_changed_rows_are_counted(counted, name, capsys):
    workdir, before = counted
    text, number = (workdir / name).read_text(), before[name]["rows"]
    (workdir / name).write_text(text.replace('"step": 1', '"step": 1, "y": 0', 1))
    check_logs(workdir, 4, before)
    said = capsys.readouterr().out
    assert f"{workdir / name} has {number} of the {number} rows up to step 4, some of" in said
    (workdir / name).write_text("".join(row for row in text.splitlines(True) if ": 1" not in row))
    check_logs(workdir, 4, before)
    said = capsys.readouterr().out
    assert f"{workdir / name} has {number - 1} of the {number} rows up to step 4, others" in said
    (workdir / name).unlink()
    check_logs(workdir, 4, before)
    assert "has 0 of" in capsys.readouterr().out


def test_lost_spending_stops_the_run_until_it_is_written_again(counted, capsys):
    workdir, before = counted
    file = workdir / SPENDING
    file.write_text("".join(file.read_text().splitlines(True)[3:]))
    with pytest.raises(WorkdirError, match="has lost usage that checkpoint 4 counts") as error:
        check_logs(workdir, 4, before)
    row = str(error.value).rpartition("this row for it: ")[2]
    assert json.loads(row) == {"step": 4, "role": "lost", "calls": 6, "dollars": 0.5}
    with file.open("a") as opened:
        opened.write(row + "\n")
    check_logs(workdir, 4, before)
    assert f"{file} has 3 of the 4 rows" in capsys.readouterr().out


def test_spending_that_only_grew_on_paper_is_said(counted, capsys):
    workdir, before = counted
    (workdir / SPENDING).write_text((workdir / SPENDING).read_text().replace("0.25", "0.75", 1))
    check_logs(workdir, 4, before)
    assert "spending.jsonl has 4 of the 4 rows up to step 4, some" in capsys.readouterr().out


def test_a_row_without_a_step_is_named(counted):
    workdir, before = counted
    (workdir / "metrics.jsonl").write_text('{"loss": 1}\n')
    told = "metrics.jsonl, line 1 is damaged: `step` is missing; expected a whole number"
    with pytest.raises(WorkdirError, match=told):
        check_logs(workdir, 4, before)


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        (SPENDING, '{"step": 1, "role": "verifier"}', "`dollars` is missing; expected a finite"),
        (SPENDING, '{"step": 1, "dollars": "2"}', '`dollars` is "2"; expected a finite number'),
        (SPENDING, '{"step": 1, "dollars": NaN}', "`dollars` is NaN; expected a finite number"),
        (SPENDING, '{"step": true, "dollars": 2}', "`step` is true; expected a whole number"),
        ("frozen_rubrics.jsonl", '{"prompt_id": 1}', "`rubric` is missing; expected a list there"),
        ("eval.jsonl", '{"step": 0}', "`temperature` is missing"),
        (
            "divergence.jsonl",
            '{"step": 0, "student": []}',
            r"`student` is \[\]; expected an object",
        ),
        ("metrics.jsonl", '{"step": ' + "1" * 6000 + "}", 'b.{"step": 1+.*; expected a JSON'),
        ("metrics.jsonl", "[" * 200_000, ".* expected a JSON object"),
    ],
)
def test_a_row_that_is_no_row_of_its_log_is_named(tmp_path, name, line, told):
    good = '{"step": 0, "dollars": 0.5, "prompt_id": 0, "rubric": null, "temperature": 1}'
    good = good[:-1] + ', "student": {}, "teacher": {}}'
    (tmp_path / name).write_text(f"{good}\n{line}\n")
    with pytest.raises(WorkdirError, match=f"{name}, line 2 is damaged: {told}") as found:
        read_lines(tmp_path / name)
    assert str(found.value).endswith("Repair it or start in a new work directory")
    assert "\n" not in str(found.value)


def test_a_date_that_is_none_is_named(tmp_path):
    (tmp_path / "point.json").write_text('{"date": "someday"}')
    with pytest.raises(
        WorkdirError, match="point.json has the date 'someday'; expected YYYY-MM-DD"
    ):
        first_day(tmp_path)


def test_an_evaluation_without_its_scores_is_named(tmp_path):
    config = Config(evaluation=EvaluationConfig(source="x"))
    (tmp_path / "eval.jsonl").write_text('{"step": 0, "temperature": 1.0, "avg@k": 0.5}\n')
    assert evaluations_since_best(tmp_path, config, 0) == 0
    evaluator = SimpleNamespace(config=SimpleNamespace(temperature=1.0, temperatures=()))
    with pytest.raises(WorkdirError, match="eval.jsonl, step 0, is damaged: `k` is missing"):
        evaluate(evaluator, tmp_path, 0, None)


def test_a_divergence_without_its_measures_is_named(tmp_path):
    config = Config(evaluation=EvaluationConfig(source="x", kind="divergence"))
    row = '{"step": 0, "student": {"reverse_kl": NaN}, "teacher": {}}\n'
    (tmp_path / "divergence.jsonl").write_text(row + row.replace("NaN", '"0.5"'))
    told = '`reverse_kl` is "0.5"; expected a number'
    with pytest.raises(WorkdirError, match=f"student of step 0, is damaged: {told}"):
        evaluations_since_best(tmp_path, config, 0)
