"""The near-policy part of a run's page: staleness, what the filter kept, who was busy when, what it
cost.
"""

import json
import re

import numpy as np
import pytest
from test_report import NASTY, metric, read, row, write_point, write_run

from opdjax.config import Config, EstimatorConfig, NearPolicyConfig, TrainConfig
from opdjax.report import near_policy
from opdjax.report.page import write_report
from opdjax.report.table import table
from opdjax.runs.results import Span, read_filters, read_run, read_timeline
from opdjax.runs.statistics import wilson_interval
from opdjax.runs.workdir import WorkdirError

BEGIN = 1_800_000_000.0


def config_ahead(schedule="continuous", seed=0, **changes):
    near = {
        "refresh": {"num_epochs": 3, "refresh_epochs": (1,)},
        "continuous": {"max_staleness": 4},
    }[schedule] | changes
    train = TrainConfig(num_steps=60, pack_length=2048 if schedule == "refresh" else None)
    near = NearPolicyConfig(schedule=schedule, **({"filter": "ifd"} | near))
    return Config(estimator=EstimatorConfig(recipe="npd"), near_policy=near, train=train, seed=seed)


def ahead(step, **changes):
    row = {
        "staleness/mean": float(min(step - 1, 3)),
        "staleness/max": float(min(step - 1, 4)),
        "staleness/kl": 0.002 * step,
    }
    row |= {
        "staleness/kl_all": 0.003 * step if step % 10 == 0 else None,
        "staleness/effective_sample_size": 1 - 0.01 * step,
    }
    row |= {"filter/keep_rate": 0.75, "filter/degenerate": 0.2, "filter/disconnected": 0.05}
    return metric(step) | row | changes


def example(number, delta, is_correct=True, **changes):
    prompt = f"{34 + number}-17+25="
    row = {
        "prompt_id": number,
        "sample_id": 0,
        "prompt": prompt,
        "completion": f"{prompt[:-4]}={17 + number};{17 + number}+25={42 + number}",
    }
    row |= {
        "delta": delta,
        "student_ifd": 0.25,
        "teacher_ifd": round(0.25 + (delta or 0.0), 4),
        "is_correct": is_correct,
    }
    return row | changes


def filter_document(version=0, number=0, **changes):
    """100 samples: 75 kept, 20 degenerate, 4 disconnected, 1 unscored; 60 right, of which 54 were
    kept.
    """
    edges = [round(-0.2 + 0.05 * at, 2) for at in range(25)]
    counts = [0, 2, 6, 12, 30, 20, 12, 6, 3, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 2, 1, 0, 1]
    row = {
        "version": version,
        "number": number,
        "filter": "ifd",
        "form": "nll_ratio",
        "ifd_min": 0.0,
        "ifd_max": 0.8,
    }
    row |= {
        "num_samples": 100,
        "num_kept": 75,
        "num_degenerate": 20,
        "num_disconnected": 4,
        "num_unscored": 1,
    }
    row |= {"histogram": {"edges": edges, "counts": counts}, "kept": [1] * 75 + [0] * 25}
    row["by_correctness"] = {"right": {"num": 60, "kept": 54}, "wrong": {"num": 40, "kept": 21}}
    row["examples"] = {
        "kept": [example(1, 0.12), example(2, 0.31, is_correct=False)],
        "degenerate": [example(3, -0.07, is_correct=False)],
        "disconnected": [example(4, 0.93, is_correct=None)],
    }
    return row | changes


def span(what, start, seconds, step, version=0):
    return {
        "what": what,
        "start": BEGIN + start,
        "seconds": seconds,
        "step": step,
        "version": version,
    }


def overlapped(num_steps=20, lag=4):
    """(learner, generator): rollouts take 0.8 s, an update 1 s; the first four steps wait, and then
    nobody does but the generator.
    """
    generator, learner, drawn, now = [], [], {}, 0.0
    for step in range(1, num_steps + 1):
        if step > lag:  # as stale as allowed: held back until the update before it is over
            ready = learner[-1]["start"] - BEGIN + learner[-1]["seconds"] - 0.9
            generator.append(span("admit", now, max(0.0, ready - now), step - 1, -1))
            now = max(now, ready)
        for what, seconds in (("generate", 0.6), ("annotate", 0.15), ("store", 0.05)):
            generator.append(span(what, now, seconds, step - 1, max(0, step - lag)))
            now += seconds
        drawn[step] = now
        begin = learner[-1]["start"] - BEGIN + learner[-1]["seconds"] if learner else 0.0
        waited = max(drawn[step] - begin, 0.0) if step <= lag else 0.01
        at = begin
        for what, seconds in (
            ("wait", waited),
            ("pack", 0.05),
            ("teacher", 0.01),
            ("update", 0.6 if step <= lag else 0.9),
            ("publish", 0.03),
        ):
            learner.append(span(what, at, seconds, step, step))
            at += seconds
    return learner, generator


def in_turns(num_steps=6, refreshes=(1, 4)):
    """(learner, generator) of one process that refreshes: 10 s of drawing before some steps, an
    update a second.
    """
    generator, learner, now = [], [], 0.0
    for step in range(1, num_steps + 1):
        begin = now
        if step in refreshes:
            for what, seconds in (("generate", 8.0), ("annotate", 1.5), ("store", 0.5)):
                generator.append(span(what, now, seconds, step - 1, step - 1))
                now += seconds
            learner += [
                span("sample", begin, 8.0, step, step),
                span("annotate", begin + 8.0, now - begin - 8.0, step, step),
            ]
        for what, seconds in (("pack", 0.25), ("update", 0.75)):
            learner.append(span(what, now, seconds, step, step))
            now += seconds
    return learner, generator


def write_ahead(directory, settings=None, *, filters=(), learner=(), generator=(), metrics=()):
    write_run(
        directory,
        settings or config_ahead(),
        metrics=list(metrics),
        samples=[],
        evaluations=False,
        steps=60,
    )
    for who, spans in (("learner", learner), ("generator", generator)):
        if spans:
            (directory / f"timeline-{who}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in spans)
            )
    for found in filters:
        file = (
            directory
            / "rollouts"
            / f"{found['version']:08d}"
            / f"filter-{found['number']:08d}.json"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return directory


@pytest.fixture(scope="module")
def continuous(tmp_path_factory):
    learner, generator = overlapped()
    filters = [filter_document(max(0, number - 4), number) for number in range(20)]
    rows = [ahead(step) for step in range(1, 61)]
    directory = tmp_path_factory.mktemp("ahead") / "run"
    return read(
        write_ahead(directory, metrics=rows, filters=filters, learner=learner, generator=generator)
    )


@pytest.fixture(scope="module")
def refresh(tmp_path_factory):
    learner, generator = in_turns()
    rows = [ahead(step, **{"perf/trained_tokens": 900.0}) for step in range(1, 7)]
    filters = [filter_document(version) for version in (0, 3)]
    directory = tmp_path_factory.mktemp("refresh") / "run"
    return read(
        write_ahead(
            directory,
            config_ahead("refresh"),
            metrics=rows,
            filters=filters,
            learner=learner,
            generator=generator,
        )
    )


# Staleness


def test_whether_and_when_the_alarm_was_crossed_is_said_in_words(continuous):
    assert (
        "KL(student || behaviour) of trained tokens exceeded 0.10 nats in 10 of 60 measured steps,"
        " first at step 51 (0.102), last at step 60; at most 0.12 nats a token at step 60."
        " KL(student || behaviour) of all rollouts, kept or not, exceeded 0.10 nats in 3 of 6"
        " measured steps, first at step 40 (0.12), last at step 60; at most 0.18 nats a token at"
        " step 60."
    ) in continuous.all
    for chart in (
        "Age of the rollouts",
        "Distance from the behaviour policy",
        "Effective sample size",
    ):
        assert any(
            name == "svg" and chart in (attributes.get("aria-label") or "")
            for name, attributes in continuous.tags
        )
    assert "At most max_staleness = 4" in continuous.all


@pytest.mark.parametrize(
    ("values", "expected", "text"),
    [
        (
            [0.01, 0.0321, 0.02],
            ((2, 0.0321), [], 3),
            "never exceeded 0.10 nats: at most 0.0321 nats a token at step 2.",
        ),
        (
            [0.01, 0.132, 0.02],
            ((2, 0.132), [(2, 0.132)], 3),
            "exceeded 0.10 nats only at step 2 (0.132).",
        ),
        (
            [0.1, None, 0.0],
            ((1, 0.1), [], 2),
            "never exceeded 0.10 nats: at most 0.1 nats a token at step 1.",
        ),
    ],
)
def test_an_alarm_that_hardly_rang(tmp_path, values, expected, text):
    rows = [
        metric(step, **{"staleness/mean": 1.0, "staleness/kl": value})
        for step, value in enumerate(values, 1)
    ]
    directory = write_ahead(tmp_path / "run", metrics=rows)
    found = near_policy.staleness_facts(read_run(directory))["trained"]
    assert tuple(found.values()) == expected
    assert f"KL(student || behaviour) of trained tokens {text}" in read(directory).all


def test_curves_far_below_the_alarm_are_not_pressed_flat_by_it(tmp_path):
    rows = [
        ahead(step, **{"staleness/kl": 0.001, "staleness/kl_all": None}) for step in range(1, 5)
    ]
    source = read(write_ahead(tmp_path / "run", metrics=rows)).source
    drawn = re.search(r'aria-label="Distance from the behaviour policy.*?</svg>', source, re.DOTALL)
    ticks = [float(tick) for tick in re.findall(r">(0\.\d+)</text>", drawn[0])]
    assert 0.001 <= max(ticks) < 0.002


def test_a_run_that_draws_anew_every_step_has_no_such_part(tmp_path):
    rows = [ahead(step, **{"staleness/mean": 0.0, "staleness/kl": 0.0}) for step in range(1, 3)]
    source = read(write_run(tmp_path / "run", metrics=rows, evaluations=False)).source
    assert not any(
        f'id="{anchor}"' in source for anchor in ("staleness", "kept", "timeline", "cost")
    )


def test_a_run_that_has_only_begun_has_no_such_part_either(tmp_path):
    source = read(write_ahead(tmp_path / "run")).source
    assert not any(
        f'id="{anchor}"' in source for anchor in ("staleness", "kept", "timeline", "cost")
    )


# What is kept


def test_the_filter_is_told_in_words_with_its_counts(continuous):
    assert (
        "Of 2,000 samples 75 % were kept; 20 % degenerate, 4 % disconnected,"
        " 1 % could not be scored." in continuous.all
    )
    assert (
        "Right answers were kept more often than wrong ones (90 % against 52.5 %)."
        in continuous.all
    )
    assert "Samples with 0 ≤ Δ ≤ 0.8 were kept" in continuous.all
    assert row(continuous, "all")[1:6] == ["2,000", "1,500", "400", "80", "20"]
    assert row(continuous, "12")[1:6] == ["100", "75", "20", "4", "1"]
    assert row(continuous, "0")[1] == "500"  # the steps that the first weights drew for


def test_every_version_of_a_refresh_stands_by_itself(refresh):
    charts = [
        attributes.get("aria-label") or "" for name, attributes in refresh.tags if name == "svg"
    ]
    drawn = "All samples: samples against Δ = IFD of the teacher − IFD of the student"
    assert [name for name in charts if "IFD" in name] == [drawn]
    assert row(refresh, "3")[6:] == [
        "75.0 % (65.7 to 82.5)",
        "90.0 % (79.9 to 95.3)",
        "52.5 % (37.5 to 67.1)",
    ]


def test_samples_of_every_zone_are_shown(refresh):
    assert row(refresh, "35-17+25=") == [
        "35-17+25=",
        "35-17=18;18+25=43",
        "right",
        "0.120",
        "0.370",
        "0.250",
        "0",
    ]
    assert row(refresh, "37-17+25=")[2:4] == ["wrong", "−0.070"]
    assert row(refresh, "38-17+25=")[2:4] == ["–", "0.930"]


def test_what_a_prompt_or_an_answer_holds_is_text(tmp_path):
    found = filter_document(by_correctness=None)
    chat = [{"role": "user", "content": NASTY}]
    found["examples"]["kept"] = [
        example(1, 0.1, prompt=chat, completion=NASTY + "x" * 500),
        example(2, None, completion=""),
    ]
    parser = read(write_ahead(tmp_path / "run", filters=[found]))
    assert parser.source.count("<script") == 0
    assert row(parser, f"user: {NASTY}")[1].startswith(f"{NASTY}xxx")
    assert "letters…] xxx" in parser.all
    assert "Right answers" not in parser.all


def test_a_filter_without_a_lower_bound(tmp_path):
    idle = filter_document(num_kept=79, num_disconnected=0, ifd_min=None, num_degenerate=0)
    parser = read(write_ahead(tmp_path / "run", filters=[idle]))
    assert "−∞ ≤ Δ ≤ 0.8" in parser.all
    assert "0 % degenerate, 0 % disconnected" in parser.all


def test_a_random_control_and_a_run_without_filter_say_so(tmp_path):
    control = config_ahead(filter="random")
    parser = read(
        write_ahead(tmp_path / "random", control, filters=[filter_document(filter="random")])
    )
    assert "As many samples as 0 ≤ Δ ≤ 0.8 would keep were kept, chosen at random" in parser.all
    bare = filter_document(
        filter="none",
        histogram={"edges": [], "counts": []},
        examples={},
        ifd_min=None,
        ifd_max=None,
    )
    assert (
        'id="kept"'
        not in read(
            write_ahead(tmp_path / "none", config_ahead(filter="none"), filters=[bare])
        ).source
    )


def test_bounds_from_quantiles_that_differ_are_told(tmp_path):
    filters = [filter_document(step, step, ifd_max=0.1 * (step + 1)) for step in range(8)]
    settings = config_ahead(ifd_quantile=0.9)
    assert (
        "0 ≤ Δ ≤ 0.1 to 0.8 (a quantile of each file)"
        in read(write_ahead(tmp_path / "run", settings, filters=filters)).all
    )


def test_a_histogram_is_drawn_where_it_has_samples_with_the_bounds_that_are_near():
    lines = near_policy.histogram_lines([0.0, 1.0, 2.0, 3.0], [0, 4, 2], [1.5, 40.0])
    assert [list(line.x) for line in lines] == [[1.5, 1.5], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]]
    assert list(lines[1].y) == [0.0, 4, 4, 2, 2, 0.0]
    assert near_policy.histogram_lines([0.0, 1.0], [0], [0.5]) == []


def test_histograms_with_other_edges_are_pooled_without_losing_a_sample():
    first = {"histogram": {"edges": [0.0, 1.0, 2.0], "counts": [3, 1]}}
    second = {"histogram": {"edges": [-1.0, 3.0], "counts": [8]}}
    together = near_policy.pooled([first, second])
    assert together["edges"] == [-1.0, 1.0, 3.0]
    assert together["counts"] == [7.0, 5.0]
    assert near_policy.pooled([first, first])["counts"] == [6, 2]


def test_the_interval_of_a_share_is_wilsons():
    # Wilson's interval for 1 of 10, as in tables of it (0.0179, 0.4042).
    assert wilson_interval(1, 10) == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0


# Time


def test_the_learner_waits_only_until_rollouts_are_in_store(continuous):
    assert (
        "After the first 4 steps the learner waited for rollouts 1 % of its time"
        " (6.5 % of its time over the whole run)." in continuous.all
    )
    assert row(continuous, "update")[1:3] == ["20", "16.8"]


def test_waiting_is_counted_by_hand():
    times = [
        ("wait", 8.0, 1),
        ("update", 2.0, 1),
        ("wait", 1.0, 2),
        ("update", 1.0, 2),
        ("wait", 0.1, 3),
        ("update", 3.9, 3),
    ]
    spans = [
        Span(what, 0.0, seconds, step, 0)
        for what, seconds, step in (*times, ("wait", 1.0, 4), ("update", 3.0, 4))
    ]
    assert near_policy.waits(spans) == [(8.0, 10.0), (1.0, 2.0), (0.1, 4.0), (1.0, 4.0)]
    assert near_policy.warm_after(near_policy.waits(spans)) == 2
    assert near_policy.idle_share(near_policy.waits(spans)[2:]) == pytest.approx(1.1 / 8)
    assert near_policy.warm_after(near_policy.waits(spans)[:2]) is None


def test_a_learner_that_always_waits_is_described_so(tmp_path):
    learner = [span("wait", 0, 3, 1), span("update", 3, 1, 1)]
    parser = read(write_ahead(tmp_path / "run", learner=learner))
    text = "The learner waited for rollouts in every step: 75 % of its time over the whole run."
    assert text in parser.all


def test_work_side_by_side_is_measured_and_pauses_are_cut_out(tmp_path):
    learner = [span("wait", 0, 4, 1), span("update", 4, 6, 1), span("update", 1000, 10, 2)]
    generator = [span("generate", 0, 4, 1), span("generate", 6, 4, 2), span("admit", 1000, 10, 3)]
    found = near_policy.timeline_facts(
        read_run(write_ahead(tmp_path / "run", learner=learner, generator=generator))
    )
    assert [found[name] for name in ("length", "cuts", "cut_seconds")] == [20.0, [10.0], 990.0]
    assert found["overlap"] == pytest.approx(0.5)
    assert [span.start for span in found["lanes"]["generator"]] == [0.0, 6.0, 10.0]


def test_a_long_run_is_drawn_by_shares_of_time():
    spans = [
        Span("update", 0.0, 1.0, 1, 0),
        Span("update", 0.5, 1.0, 1, 0),
        Span("update", 3.0, 2.0, 2, 0),
    ]
    edges = np.array([0.0, 1.0, 2.0, 4.0, 6.0])
    assert near_policy.busy_shares(spans, edges).tolist() == [1.0, 0.5, 0.5, 0.5]


def test_the_page_of_a_long_run_stays_small(tmp_path):
    learner = [span("update", step, 0.9, step) for step in range(2000)]
    short = read(write_ahead(tmp_path / "short", learner=learner[:2]))
    assert len(read(write_ahead(tmp_path / "run", learner=learner)).source) < 3 * len(short.source)


def test_both_ways_to_count_tokens_a_second(refresh):
    # 6 steps of 900 tokens: 0.75 s each of updates, the first left out; 26 s in all, 20 of them
    # drawing.
    assert row(refresh, "learner alone, during updates, without the first")[1:] == [
        "4,500",
        "3.8",
        "1200",
    ]
    assert row(refresh, "end to end, every second in which a process worked or waited")[1:] == [
        "5,400",
        "26",
        "207.7",
    ]
    assert [row(refresh, stage)[1:] for stage in ("train", "all stages")] == [
        ["4.5", "17.3 %"],
        ["26", "100 %"],
    ]
    stages = {cells[0]: cells[1:] for cells in refresh.rows if len(cells) == 3}
    assert stages["generate"] == ["16", "61.5 %"]


def test_one_of_the_two_timelines_is_enough(tmp_path):
    parser = read(write_ahead(tmp_path / "run", generator=in_turns()[1]))
    assert "generator" in [cells[0] for cells in parser.rows]
    assert "waited for rollouts" not in parser.all


# Files


def test_a_damaged_file_is_named(tmp_path):
    directory = write_ahead(
        tmp_path / "run", filters=[filter_document()], learner=[span("wait", 0, 1, 1)]
    )
    assert [found["number"] for found in read_filters(directory)] == [0]
    (directory / "timeline-learner.jsonl").write_text(
        '{"what": "wait", "start": 1.0, "seconds": -1, "step": 1, "version": 0}\n'
    )
    with pytest.raises(
        WorkdirError, match=r"timeline-learner.jsonl is damaged: .*seconds of 0 or more"
    ):
        read_timeline(directory, "learner")
    (directory / "timeline-learner.jsonl").unlink()
    file = directory / "rollouts" / "00000000" / "filter-00000000.json"
    for changes, named in (
        ({"num_kept": None}, "num_kept missing"),
        ({"histogram": {"edges": [1], "counts": [1]}}, "one edge more"),
    ):
        file.write_text(json.dumps(filter_document(**changes)))
        with pytest.raises(WorkdirError, match=named):
            write_report(directory)
    file.write_text("{")
    with pytest.raises(WorkdirError, match="filter-00000000.json cannot be read as JSON"):
        write_report(directory)


def test_a_timeline_that_is_being_written_is_read_to_its_last_whole_row(tmp_path):
    directory = write_ahead(tmp_path / "run", learner=[span("wait", 0, 1, 1)])
    with (directory / "timeline-learner.jsonl").open("a") as out:
        out.write('{"what": "upd')
    assert [found.what for found in read_timeline(directory, "learner")] == ["wait"]


# A sweep


@pytest.mark.usefixtures("words_alone")
def test_a_sweep_tells_staleness_and_keep_rate_of_those_that_have_them(tmp_path):
    for lag in (1, 4):
        point = write_point(
            tmp_path, config_ahead(max_staleness=lag), **{"near_policy.max_staleness": lag}
        )
        rows = [ahead(step, **{"staleness/kl": 0.01 * lag}) for step in range(1, 13)]
        (point / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    parser = read(tmp_path)
    at = next(cells for cells in parser.rows if "staleness KL" in cells).index("staleness KL")
    assert [row(parser, lag)[at : at + 2] for lag in ("1", "4")] == [
        ["0.0100 ± ∞", "0.7500 ± ∞"],
        ["0.0400 ± ∞", "0.7500 ± ∞"],
    ]
    assert "Distance from the behaviour policy" in parser.all
    assert "| staleness KL | keep rate |" in table(tmp_path)
