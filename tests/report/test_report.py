"""The report: what it says is what the files say, it is one safe file, and it copes with every
state a directory can be in.
"""

import html.parser
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys

import pytest

from opdjax.config import (
    Config,
    EstimatorConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
)
from opdjax.config.validation import to_dict
from opdjax.report import drawing, measures, text
from opdjax.report.drawing import REST
from opdjax.report.page import facts_as_json, write_report
from opdjax.report.sweep import sweep_facts
from opdjax.report.table import table
from opdjax.runs.results import read_points, read_result, read_run, result_table
from opdjax.runs.statistics import NO_RIGHT_ANSWER, seed_interval
from opdjax.runs.workdir import WorkdirError

ENVIRONMENT = {"opdjax": "0.1.0", "commit": "c0ffee", "python": "3.11.7", "jax": "0.10.2"}
DATA = {
    "prompts": "d1",
    "evaluation": "d2",
    "num_prompts": 64,
    "num_skipped": 0,
    "student": "s",
    "teacher": "t",
}
BARE = {"metrics": [], "evaluations": False}  # no charts, which are what takes time
NASTY = "<script>alert(1)</script>\"'&"


def evaluation(step, score, temperature=1.0):
    row = {
        "step": step,
        "temperature": temperature,
        "n": 8,
        "k": 8,
        "num_prompts": 64,
        "avg@k": score,
        "avg@k_interval": 0.0213,
    }
    row |= {"pass@k": min(1.0, score + 0.3), "pass@k_interval": 0.0111, "per_prompt": [1, 2]}
    return row | ({"greedy": score + 0.1, "greedy_interval": 0.0314} if temperature == 1.0 else {})


def metric(step, **changes):
    row = {
        "step": step,
        "loss/objective": 0.5 / step,
        "kl/student_teacher": 0.4 / step,
        "grad/norm": 2.0 + step % 3,
        "grad/skipped_steps": 0.0,
    }
    row |= {
        "advantage/std": 1.2,
        "rollout/length_mean": 15.0,
        "rollout/truncated_ratio": 0.0,
        "optimizer/learning_rate": 1e-4,
        "time/step": 0.5,
    }
    row |= {f"perf/{kind}_tokens": 1000.0 for kind in ("generated", "trained", "teacher")}
    return (
        row | {"kl/position/00-11": 0.2, "kl/position/12-23": None if step < 3 else 0.1} | changes
    )


def sample(step=1, **changes):
    row = {
        "step": step,
        "prompt_id": 7,
        "sample_id": 0,
        "prompt": "1+2=",
        "completion": "3!",
        "length": 2,
        "is_truncated": False,
    }
    row |= {
        "tokens": ["3", "!"],
        "advantages": [1.5, -0.25],
        "rewards": [1.0, -0.5],
        "kl": [0.5, 0.25],
    }
    row |= {"student_logprobs": [math.log(0.5), -1.0], "teacher_logprobs": [math.log(0.875), -2.0]}
    return row | {"teacher_top": [[["3", 0.875], ["4", 0.1]], [["\n", 0.75], ["!", 0.2]]]} | changes


def config(recipe="vopd", rate=3e-4, seed=0):
    return Config(
        estimator=EstimatorConfig(recipe=recipe),
        optimizer=OptimizerConfig(learning_rate=rate),
        seed=seed,
    )


def write_run(
    directory,
    settings=None,
    *,
    steps=6,
    after=0.57,
    finished=True,
    evaluations=True,
    samples=None,
    metrics=None,
):
    directory.mkdir(parents=True, exist_ok=True)
    settings = settings or config()
    (directory / "config.json").write_text(
        json.dumps({"config": to_dict(settings), "data": DATA, "environment": ENVIRONMENT})
    )

    def lines(name, rows):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines(
        "metrics.jsonl",
        metrics if metrics is not None else [metric(step) for step in range(1, steps + 1)],
    )
    lines("samples.jsonl", [sample()] if samples is None else samples)
    rows = [
        evaluation(0, 0.409),
        evaluation(0, 0.455, 0.7),
        evaluation(steps // 2, 0.5),
        *([evaluation(steps, after)] if finished else []),
    ]
    if evaluations:
        lines("eval.jsonl", rows)
    result = {
        "recipe": "vopd",
        "num_steps": steps,
        "skipped_steps": 0,
        "skipped_prompts": 0,
        "student": "student",
        "seconds": 41.2,
    }
    if evaluations:
        result |= {
            "eval_before": rows[0],
            "eval_after": rows[-1],
            "eval_before_sharpened": [rows[1]],
        }
        result["paired_difference"] = {
            "avg@k": after - 0.409,
            "avg@k_interval": 0.0217,
            "greedy": after - 0.409,
            "greedy_interval": 0.0437,
        }
    if finished:
        (directory / "result.json").write_text(json.dumps(result))
    return directory


def write_point(directory, settings, state="done", **overrides):
    name = directory / "-".join(f"{key}{value}" for key, value in overrides.items())
    name.mkdir(parents=True)
    if state in ("done", "begun"):
        write_run(
            name,
            settings,
            finished=state == "done",
            after=0.5 + 0.01 * settings.seed + (0.1 if settings.estimator.recipe == "vopd" else 0),
        )
    if state == "failed":
        (name / "failure.json").write_text(
            json.dumps(
                {"returncode": 1, "seconds": 3.5, "log_tail": ["step 3", f"BoomError: {NASTY}"]}
            )
        )
    (name / "point.json").write_text(
        json.dumps(
            {
                "id": name.name,
                "overrides": {key: str(value) for key, value in overrides.items()},
                "config": to_dict(settings),
            }
        )
    )
    return name


def write_sweep(directory, recipes=("opd", "vopd"), rates=(1e-4, 3e-4), seeds=(0, 1, 2), states=()):
    states = dict(states)
    for recipe in recipes:
        for rate in rates:
            for seed in seeds:
                state = states.get((recipe, rate, seed), "done")
                write_point(
                    directory,
                    config(recipe, rate, seed),
                    state,
                    estimator=recipe,
                    learning_rate=rate,
                    seed=seed,
                )
    return directory


class Parser(html.parser.HTMLParser):
    """Collects what the tests ask for, and refuses tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.rows, self.text, self.ids = [], [], [], [], []
        self.all = self.source = ""

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        if name not in ("meta", "input", "br"):
            self.open.append(name)
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, name):
        assert self.open, f"</{name}> closes nothing"
        assert self.open.pop() == name

    def handle_startendtag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.replace("\u00a0", " ")


def read(directory, **options):
    """The page, parsed and checked: balanced tags, self-contained, no nan, inf or None."""
    source = write_report(directory, **options).read_text()
    parser = Parser()
    parser.feed(source)
    parser.close()
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids))
    for name, attributes in parser.tags:
        assert name not in ("link", "img", "iframe", "object", "base")
        for key in ("src", "action", "style"):
            assert "//" not in (attributes.get(key) or "")
        if "href" in attributes:
            assert attributes["href"][0] == "#"
            assert attributes["href"][1:] in parser.ids
    assert not re.search(r"@import|url\((?!#)", source)
    assert not any(name == "script" for name, _ in parser.tags)
    parser.all = " ".join(" ".join(parser.text).split())
    for nonsense in ("nan", "inf", "None", "Infinity"):
        assert not re.search(rf"(?<![\w-]){nonsense}(?![\w-])", parser.all), nonsense
    parser.source = source
    return parser


def row(parser, *starts):
    return next(cells for cells in parser.rows if tuple(cells[: len(starts)]) == starts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return read(write_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    states = {
        ("opd", 1e-4, 1): "failed",
        ("opd", 3e-4, 0): "begun",
        ("opd", 3e-4, 1): "begun",
        ("vopd", 3e-4, 2): "waiting",
    }
    return read(write_sweep(tmp_path_factory.mktemp("report") / "sweep", states=states))


# A run


def test_a_finished_run_is_told_in_one_sentence(finished):
    assert (
        "avg@8 rose from 0.409 to 0.570 (paired gain +0.161 ± 0.022) in 6 steps, 41 s."
        in finished.all
    )
    assert "Warning" not in finished.all


def test_the_result_table_holds_the_numbers_of_the_files(finished):
    assert row(finished, "before training") == [
        "before training",
        "1",
        "0.409 ± 0.021",
        "0.509 ± 0.031",
        "0.709 ± 0.011",
    ]
    assert row(finished, "before, sampled more sharply") == [
        "before, sampled more sharply",
        "0.7",
        "0.455 ± 0.021",
        "–",
        "0.755 ± 0.011",
    ]
    assert row(finished, "after training") == [
        "after training",
        "1",
        "0.570 ± 0.021",
        "0.670 ± 0.031",
        "0.870 ± 0.011",
    ]
    assert row(finished, "gain, paired by prompt")[2:] == ["+0.161 ± 0.022", "+0.161 ± 0.044", "–"]
    assert "± is half a 95 % interval over prompts" in finished.all


def test_scores_are_shown_against_every_axis_that_was_recorded(finished):
    labels = {
        attributes.get("aria-label", "") for name, attributes in finished.tags if name == "svg"
    }
    for axis in ("steps", "generated tokens", "trained tokens", "teacher tokens", "seconds"):
        assert f"avg@8: share right against {axis}" in labels


def test_settings_that_differ_from_the_defaults_are_marked(finished):
    assert row(finished, "optimizer.learning_rate") == ["optimizer.learning_rate", "3e-4", "1e-5"]
    assert [cells for cells in finished.rows if cells[0] == "optimizer.b2"] == [
        ["optimizer.b2", "0.999"]
    ]
    assert ["evaluation", "d2"] in finished.rows


def test_each_token_carries_its_numbers(finished):
    assert row(finished, "3") == [
        "3",
        "1.500",
        "50 %",
        "87.5 %",
        "‘3’ 87.5 %, ‘4’ 10 %",
        "0.500",
        "1.000",
        "0",
    ]
    assert row(finished, "!")[4] == "‘⏎’ 75 %, ‘!’ 20 %"
    tokens = [
        attributes
        for name, attributes in finished.tags
        if name == "span" and attributes.get("title")
    ]
    assert [(token["class"], token["title"]) for token in tokens] == [
        ("t for strong", "3: advantage 1.500"),
        ("t against", "!: advantage −0.250"),
    ]


@pytest.mark.parametrize(
    ("recipe", "sampling", "title"),
    [
        ("grpo", {"num_generations": 4}, "models/student ← graded answers"),
        ("sft", {"completions_from": "references"}, "models/student ← reference answers"),
    ],
)
def test_a_run_that_reads_no_teacher_says_so_and_nothing_else_of_one(
    tmp_path, recipe, sampling, title
):
    settings = Config(
        student=ModelConfig("models/student"),
        estimator=EstimatorConfig(recipe=recipe),
        sampling=SamplingConfig(**sampling),
    )
    of_teacher = {"kl/student_teacher": None, "perf/teacher_tokens": 0.0, "advantage/std": 0.5}
    rows = [metric(step, **of_teacher) for step in range(1, 7)]
    rows = [{name: v for name, v in row.items() if "kl/" not in name} for row in rows]
    plain = sample(**dict.fromkeys(("teacher_logprobs", "teacher_top", "kl", "rewards")))
    parser = read(write_run(tmp_path / "run", settings, metrics=rows, samples=[plain]))
    assert title in parser.all
    assert "The loss used no probabilities of a teacher." in parser.all
    before_settings = parser.all[: parser.all.rindex("Settings")]
    assert before_settings.count("teacher") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"recipe": "opd"}, "The teacher gave its probability of every trained token."),
        ({"recipe": "vopd"}, "The teacher gave its next-token distribution at every position."),
        (
            {"recipe": "vopd", "baseline": "batch_mean"},
            "The teacher gave its probability of every trained token.",
        ),
        ({"recipe": "npd"}, "The teacher gave its most likely tokens and their probabilities"),
    ],
)
def test_what_the_teacher_gave_follows_from_recipe_and_options(tmp_path, options, expected):
    settings = Config(estimator=EstimatorConfig(**options))
    parser = read(write_run(tmp_path / "run", settings, **BARE))
    assert expected in parser.all
    assert "On-policy: the student sampled completions" in parser.all


@pytest.mark.usefixtures("words_alone")
def test_a_run_that_is_going_on_says_how_far_it_is(tmp_path):
    parser = read(write_run(tmp_path / "run", finished=False))
    assert "So far avg@8 went from 0.409 to 0.500 (step 3); 6 steps, 3 s done." in parser.all
    assert "Not finished: 6 of 100 steps (6%) are done." in parser.all
    assert row(parser, "at step 3")[2] == "0.500 ± 0.021"


@pytest.mark.parametrize(("steps", "length"), [(2, 1), (10, 5), (24, 10), (300, 30)])
def test_the_first_and_the_last_steps_are_not_the_same(tmp_path, steps, length):
    rows = [metric(step) | {"kl/student_teacher": float(step)} for step in range(1, steps + 1)]
    page = read(write_run(tmp_path / "run", steps=steps, evaluations=False, metrics=rows))
    end = text.number(statistics.fmean(range(steps - length + 1, steps + 1)))
    last = text.count(length, "step")
    assert f"1 nats a token at first and {end} over the last {last}." in page.all
    for which in ("first", "last"):
        assert f"{which} {text.count(length, 'step')}" in page.all


def test_a_run_that_has_only_begun(tmp_path):
    parser = read(
        write_run(tmp_path / "run", finished=False, evaluations=False, metrics=[], samples=[])
    )
    assert "0 steps, – of training, without an evaluation." in parser.all
    assert "<svg" not in parser.source


def test_a_run_without_evaluation_is_judged_by_its_kl(tmp_path):
    parser = read(write_run(tmp_path / "run", evaluations=False))
    assert "KL(student || teacher) was 0.4 nats a token at first" in parser.all
    assert 'id="result"' not in parser.source
    assert 'id="scores"' not in parser.source


def test_a_change_within_its_interval_is_not_called_a_gain(tmp_path):
    assert (
        "avg@8 did not change measurably: it went from 0.409 to 0.415"
        in read(write_run(tmp_path / "run", after=0.415, metrics=[])).all
    )


@pytest.mark.usefixtures("words_alone")
def test_a_grader_that_finds_no_right_answer_is_named_everywhere(tmp_path):
    for seed in (0, 1):
        point = write_point(tmp_path / "sweep", config(seed=seed), seed=seed)
        for name in ("eval.jsonl", "result.json"):
            text = (point / name).read_text()
            wrong = re.sub(r'("(avg@k|pass@k|greedy)"): [-\d.]+', r"\1: 0.0", text)
            (point / name).write_text(wrong)
    warned = NO_RIGHT_ANSWER.capitalize()
    assert warned in read(point).all
    assert warned in read(tmp_path / "sweep").all
    assert result_table(read_result(point)).endswith(NO_RIGHT_ANSWER)
    # Over seeds, 0 and 0 have no spread: 3 / 64 prompts.
    printed = table(tmp_path / "sweep")
    assert NO_RIGHT_ANSWER in printed
    assert "0.000 ± 0.047" in printed
    right = write_run(tmp_path / "right")
    assert warned not in read(right).all
    assert NO_RIGHT_ANSWER not in result_table(read_result(right))


def test_metrics_that_are_not_finite_leave_gaps_and_are_named(tmp_path):
    broken = {"loss/objective": None, "grad/norm": None, "kl/student_teacher": None}
    rows = [
        metric(
            step,
            **(broken if step in (2, 5) else {}),
            **{"grad/skipped_steps": float(sum(s <= step for s in (2, 5)))},
        )
        for step in range(1, 7)
    ]
    parser = read(write_run(tmp_path / "run", metrics=rows, finished=False, evaluations=False))
    assert "2 steps skipped because the loss or gradient was not finite: 2, 5." in parser.all
    assert "nan" not in parser.source


def test_all_metrics_may_be_missing(tmp_path):
    rows = [
        metric(step, **{"loss/objective": None, "kl/student_teacher": None, "grad/norm": None})
        for step in (1, 2, 3)
    ]
    read(write_run(tmp_path / "run", metrics=rows, evaluations=False))


def test_diagnostics_told_every_few_steps_and_signal_to_noise_are_drawn(tmp_path):
    squares = {"grad/signal_squared": 1.0, "grad/noise_squared": 4.0, "kl/k1": 0.3}
    rows = [
        metric(
            step,
            **squares,
            **{"entropy/student": 0.5 if step == 1 else None, "overlap/ratio": None},
        )
        for step in range(1, 7)
    ]
    parser = read(write_run(tmp_path / "run", metrics=rows, evaluations=False))
    assert "Entropy of the student" in parser.all
    assert "Overlap of the most likely" not in parser.all
    assert "Signal and noise of the gradient" in parser.all
    assert "exact at every position" in parser.all
    assert "nan" not in parser.source
    alike = [row | {"kl/k1": row["kl/student_teacher"]} for row in rows]
    parser = read(write_run(tmp_path / "alike", config("vopd"), metrics=alike, evaluations=False))
    assert "estimated from the sampled tokens" in parser.all


def test_an_older_run_without_tokens_and_positions_still_renders(tmp_path):
    old = [
        {
            key: value
            for key, value in metric(step).items()
            if not key.startswith(("perf/", "kl/position"))
        }
        for step in (1, 2)
    ]
    plain = {
        key: sample()[key]
        for key in (
            "step",
            "prompt_id",
            "sample_id",
            "prompt",
            "completion",
            "length",
            "is_truncated",
        )
    }
    parser = read(write_run(tmp_path / "run", metrics=old, samples=[plain], steps=2))
    assert "generated tokens" not in parser.all
    assert 'id="positions"' not in parser.source
    assert "3!" in parser.all
    assert "no numbers per token" in parser.all


def test_a_recipe_without_advantages_is_coloured_by_kl(tmp_path):
    parser = read(
        write_run(tmp_path / "run", samples=[sample(advantages=None, rewards=None)], **BARE)
    )
    assert "The shade is KL(student || teacher)" in parser.all
    assert row(parser, "3")[1] == "50 %"


def test_a_token_without_a_finite_number_has_no_colour(tmp_path):
    parser = read(
        write_run(
            tmp_path / "run", samples=[sample(advantages=[math.nan, 2.0], teacher_top=None)], **BARE
        )
    )
    assert [attributes["class"] for name, attributes in parser.tags if attributes.get("title")] == [
        "t",
        "t for strong",
    ]


def test_long_rollouts_are_cut_and_many_steps_thinned(tmp_path):
    rows = [
        sample(
            step,
            tokens=["x"] * 5000,
            length=5000,
            **{name: [0.5] * 5000 for name in ("advantages", "kl", "rewards")},
        )
        for step in range(1, 41)
    ]
    parser = read(write_run(tmp_path / "run", samples=rows, **BARE))
    assert "the first 256 of 5,000 tokens are shown" in parser.all
    assert "35 more steps in samples.jsonl" in parser.all
    assert len(parser.source) < 800_000


def test_what_people_and_models_wrote_is_text_and_never_markup(tmp_path):
    nasty = sample(
        prompt=[{"role": "user", "content": NASTY}],
        completion=NASTY,
        tokens=[NASTY, '"> <b onclick="x">'],
        teacher_top=[[[NASTY, 0.9]], [["</script>", 0.5]]],
    )
    plain = {**sample(step=2), "prompt": NASTY, "completion": NASTY} | {"tokens": None}
    parser = read(write_run(tmp_path / "run", samples=[nasty, plain], **BARE))
    assert parser.all.count("<script>alert(1)</script>") >= 5
    assert parser.source.count("<script") == 0
    assert not any("onclick" in attributes or name == "b" for name, attributes in parser.tags)
    titles = [attributes["title"] for _, attributes in parser.tags if attributes.get("title")]
    assert titles[0] == f"{NASTY}: advantage 1.500"


def test_config_values_and_paths_are_escaped_too(tmp_path):
    directory = write_run(tmp_path / "run", **BARE)
    described = json.loads((directory / "config.json").read_text())
    described["config"]["student"]["path"] = f"hub/{NASTY}"
    described["config"]["data"]["system_prompt"] = NASTY
    (directory / "config.json").write_text(json.dumps(described))
    assert read(directory).source.count("<script") == 0


def test_one_evaluation_prompt_has_an_infinite_interval(tmp_path):
    directory = write_run(tmp_path / "run", metrics=[])
    result = json.loads((directory / "result.json").read_text())
    result["eval_after"]["avg@k_interval"] = math.inf
    result["paired_difference"]["avg@k_interval"] = math.inf
    (directory / "result.json").write_text(json.dumps(result))
    parser = read(directory)
    assert row(parser, "after training")[2] == "0.570 ± ∞"
    assert "did not change measurably" in parser.all


def test_a_failed_run_shows_why(tmp_path):
    directory = write_run(tmp_path / "run", finished=False, **BARE)
    (directory / "failure.json").write_text(
        json.dumps({"reason": "killed", "log_tail": ["step 4", "out of memory"]})
    )
    parser = read(directory)
    assert "reason: killed" in parser.all
    assert "out of memory" in parser.all


def test_the_same_files_give_the_same_page(tmp_path, finished):
    assert read(write_run(tmp_path / "run")).source == finished.source


# A sweep


def test_a_sweep_counts_its_points(sweep):
    assert "8 of 12 points done (1 failed, 2 unfinished, 1 not begun)." in sweep.all
    assert row(sweep, "estimatoropd-learning_rate0.0003-seed0")[1] == "begun: step 6 of 100"


def test_groups_show_the_interval_over_their_own_seeds(sweep):
    mean, half = seed_interval([0.60, 0.61, 0.62])
    assert row(sweep, "vopd", "0.0001")[2:4] == ["3", f"{mean:.3f} ± {half:.3f}"]
    mean, half = seed_interval([0.50, 0.52])
    assert row(sweep, "opd", "0.0001")[2:4] == ["2", f"{mean:.3f} ± {half:.3f}"]
    assert row(sweep, "opd", "0.0001")[-1] == "0, 1 missing, 2"
    assert row(sweep, "before training")[3:6] == ["0.409", "0.509", "0.709"]
    assert "interval over seeds" in sweep.all


def test_one_seed_has_an_infinite_interval_and_no_seed_has_no_numbers(sweep, tmp_path):
    assert row(sweep, "opd", "0.0003")[2:4] == ["1", "0.520 ± ∞"]
    parser = read(write_sweep(tmp_path, seeds=(0,), states={("opd", 1e-4, 0): "failed"}))
    cells = row(parser, "opd", "0.0001")
    assert (cells[2], set(cells[3:-1]), cells[-1]) == ("0", {"–"}, "0 missing")


def test_the_facts_of_a_sweep_are_json_without_the_files_of_its_runs(tmp_path):
    write_sweep(tmp_path, recipes=("vopd",), rates=(1e-4,), seeds=(0, 1))
    facts = json.loads(facts_as_json(sweep_facts(read_points(tmp_path), "sweep")))
    assert facts["arms"][0]["numbers"]["avg@k"] == list(seed_interval([0.60, 0.61]))
    assert not {"runs", "config"} & facts["arms"][0].keys()


def test_groups_are_ordered_by_score_and_never_mixed(sweep):
    named = [
        tuple(cells[:2]) for cells in sweep.rows if len(cells) > 5 and cells[0] in ("opd", "vopd")
    ]
    assert named == [
        ("vopd", "0.0001"),
        ("vopd", "0.0003"),
        ("opd", "0.0003"),
        ("opd", "0.0001"),
    ]
    assert "Highest avg@8 of 4 finished groups: 0.610" in sweep.all


def test_a_failure_gives_its_reason_and_the_tail_of_its_log(sweep):
    assert "returncode: 1; seconds: 3.5" in sweep.all
    assert f"step 3 BoomError: {NASTY}" in sweep.all


def test_settings_are_listed_once_or_as_a_difference(sweep):
    assert row(sweep, "optimizer.b2") == ["optimizer.b2", "0.999"]
    assert [cells[1:] for cells in sweep.rows if cells[0] == "seed" and len(cells) == 2] == []
    assert (
        row(sweep, "optimizer.learning_rate")[1]
        == "1e-4: estimator vopd, learning_rate 0.0001, estimator opd, learning_rate 0.0001"
    )


def test_many_groups_are_ranked_and_the_rest_is_grey(tmp_path):
    rates = [round(1e-5 * 2**i, 8) for i in range(9)]
    parser = read(write_sweep(tmp_path, recipes=("vopd",), rates=rates, seeds=(0,)))
    facts = sweep_facts(read_points(tmp_path), "sweep")
    assert [arm.slot for arm in facts["arms"]] == [0, 1, 2, 3, 4, *[REST] * 4]
    assert "4 other groups, lower in the table, without bands" in parser.all


def test_a_sweep_with_nothing_done_says_so(tmp_path):
    parser = read(
        write_sweep(
            tmp_path,
            rates=(1e-4,),
            seeds=(0,),
            states={("opd", 1e-4, 0): "waiting", ("vopd", 1e-4, 0): "waiting"},
        )
    )
    assert "0 of 2 points done (2 not begun)." in parser.all


def test_runs_on_other_data_are_not_compared_in_silence(tmp_path):
    directory = write_sweep(tmp_path, recipes=("vopd",), rates=(1e-4,), seeds=(0, 1))
    file = directory / "estimatorvopd-learning_rate0.0001-seed1" / "config.json"
    described = json.loads(file.read_text())
    described["data"]["evaluation"] = "another"
    file.write_text(json.dumps(described))
    assert "The evaluation digest differs" in read(directory).all


def test_seeds_are_averaged_at_common_steps_only(tmp_path):
    directory = write_sweep(tmp_path, recipes=("vopd",), rates=(1e-4,), seeds=(0, 1))
    file = directory / "estimatorvopd-learning_rate0.0001-seed1" / "eval.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (evaluation(0, 0.4), evaluation(6, 0.6))))
    facts = sweep_facts(read_points(directory), "sweep")
    line = facts["curves"]["seconds"]["avg@k"]["estimator vopd, learning_rate 0.0001"]
    assert line.x == [0.0, 3.0]
    assert line.y == pytest.approx([(0.409 + 0.4) / 2, (0.6 + 0.6) / 2])


# Where it writes, and what it refuses


def test_the_page_goes_where_it_is_told(tmp_path):
    directory = write_run(tmp_path / "run", **BARE)
    assert write_report(directory) == directory / "report.html"
    assert write_report(directory, tmp_path / "other.html") == tmp_path / "other.html"
    with pytest.raises(WorkdirError, match="there is no directory"):
        write_report(directory, tmp_path / "nowhere" / "page.html")


def test_a_directory_that_is_neither_run_nor_sweep_is_refused(tmp_path):
    with pytest.raises(WorkdirError, match="neither a run"):
        write_report(tmp_path)
    with pytest.raises(WorkdirError, match="there is no directory"):
        write_report(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3"]}')
    with pytest.raises(WorkdirError, match="not the config of a run"):
        write_report(tmp_path)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'opdjax[report]'")):
        write_report(write_run(tmp_path / "run"))


def test_importing_it_loads_neither_jax_nor_matplotlib():
    code = (
        "import sys, opdjax.report.page;"
        "sys.exit(bool({'jax', 'matplotlib', 'flax'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2], check=False
        ).returncode
        == 0
    )


# The parts


def test_facts_are_json_without_numbers_that_are_not_finite(tmp_path):
    directory = write_run(tmp_path / "run")
    file = write_report(directory, as_json=True)
    assert file == directory / "report.json"
    found = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["metrics"]["kl/student_teacher"] == [0.4 / step for step in range(1, 7)]
    assert found["result"]["paired_difference"]["avg@k_interval"] == 0.0217
    assert facts_as_json({"x": [math.nan, math.inf, 1.5]}).split() == (
        ["{", '"x":', "[", "null,", "null,", "1.5", "]", "}"]
    )


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (text.plus_minus(0.5704, 0.0217), "0.570 ± 0.022"),
        (text.plus_minus(-0.5, math.inf, signed=True), "−0.500 ± ∞"),
        (text.plus_minus(None, 0.1), "–"),
        (text.fixed(-0.0001), "0.000"),
        (text.number(0.0003), "3e-4"),
        (text.number(0), "0"),
        (text.number(12345.0), "12,345"),
        (text.number(math.nan), "–"),
        (text.duration(41.2), "41 s"),
        (text.duration(7300), "2.0 h"),
        (text.shown([]), "none"),
        (text.shown(True), "yes"),
        (drawing.tick(40000), "40k"),
        (drawing.tick(-0.25), "−0.25"),
        (drawing.tick(2.5e6), "2.5M"),
        (measures.bucket_label((0, 2)), "0–2"),
        (measures.model_name("/a/b/mini_pair/student"), "mini_pair/student"),
        (measures.model_name("Qwen/Qwen3-1.7B"), "Qwen/Qwen3-1.7B"),
    ],
)
def test_numbers_and_names_are_written_one_way(made, expected):
    assert made == expected


def test_smoothing_ignores_what_is_not_finite():
    assert drawing.smooth([1.0, None, 3.0], 3) == pytest.approx([1.0, 2.0, 3.0])
    assert math.isnan(drawing.smooth([None, None], 1)[0])


def test_a_long_line_is_simplified_and_keeps_every_spike():
    y = [0.0] * 10_000
    y[1234], y[7777] = 5.0, -3.0
    drawn = drawing.lines("Long", [drawing.Line(range(10_000), y)], "nats")
    path = max(re.findall(r' d="([^"]*)"', drawn), key=len)
    assert len(path.split("L")) < 1000
    heights = [float(point.split()[1]) for point in re.split("[ML]", path)[1:]]
    top, bottom = 32, 280 - 54  # of the axes
    low, high = -3 - 0.06 * 8, 5 + 0.06 * 8  # y is shown with a margin of 6 %
    at = lambda value: bottom - (bottom - top) * (value - low) / (high - low)
    assert min(heights) == pytest.approx(at(5), abs=0.1)
    assert max(heights) == pytest.approx(at(-3), abs=0.1)


def test_kl_by_position_averages_over_the_steps_that_reached_it(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert measures.kl_by_position(run.metrics[:2]) == {(0, 11): 0.2}
    assert measures.kl_by_position(run.metrics) == {
        (0, 11): pytest.approx(0.2),
        (12, 23): pytest.approx(0.1),
    }


def test_extra_temperatures_are_not_part_of_the_curve(tmp_path):
    assert [(r["step"], r["avg@k"]) for r in read_run(write_run(tmp_path / "run")).evaluated] == [
        (0, 0.409),
        (3, 0.5),
        (6, 0.57),
    ]


def test_charts_use_variables_and_no_font_of_their_own():
    found = [drawing.Line([1, 2], [0.5, None]), drawing.Line([1, 2], [1, 2], slot=drawing.REST)]
    drawn = drawing.lines("KL", found, "nats")
    assert "var(--series-0)" in drawn
    assert "font-family" not in drawn
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)
    assert "<text" in drawn
