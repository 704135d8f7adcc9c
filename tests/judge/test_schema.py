"""What is read of a judge's reply, and what is refused."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.reply_object import ERRORS, REPAIRS, ReplyError, read_object
from opdjax.judge.schema import (
    Criterion,
    Rubric,
    parse_rubric,
    parse_scores,
    parse_verdicts,
)

CONFIG = RubricsConfig(num_criteria=(1, 12))
SIGNED = RubricsConfig(num_criteria=(1, 12), polarity="signed", grades="graded")


def item(number=1, **changes):
    return {
        "id": f"c{number}",
        "category": "task",
        "text": f"States the value {number}.",
        "weight": 2,
    } | changes


def rubric(*items, **more):
    return json.dumps({"criteria": list(items)} | more)


def verdicts(*rows, **more):
    return json.dumps({"answers": [{"answer_index": n, "verdicts": v} | more for n, v in rows]})


def criteria(*weights, **fields):
    return tuple(
        Criterion(id=f"c{n + 1}", category="task", text="x", weight=w, **fields)
        for n, w in enumerate(weights)
    )


def score(criteria, verdicts):
    return Rubric(criteria).score(verdicts)


# Scores


def test_the_two_lying_totals_and_the_worked_example_of_the_paper():
    for marks, declared, expected in (
        ((True, False, False, False), 12, 5 / 12),
        ((True,) * 4, 3, 1.0),
    ):
        read = parse_verdicts(
            verdicts((1, list(marks)), final_score=declared, total=declared), 1, 4, False
        )
        assert read.repairs == ("unknown_keys",)
        assert score(criteria(5, 4, 2, 1), read.values[0]) == pytest.approx(expected, abs=1e-12)
    assert score(criteria(5, 5, 4, 5, 3), (1, 0, 1, 1, 1)) == pytest.approx(17 / 22, abs=1e-12)
    assert score(criteria(5, 5, 4, 5, 3), (1, 0, 0, 0, 0)) == pytest.approx(5 / 22, abs=1e-12)


def test_graded_and_negative_criteria():
    graded = criteria(3, grade="graded") + criteria(1, grade="graded", polarity="negative")
    assert score(graded, (2, 0)) == 1
    assert score(graded, (1, 2)) == pytest.approx(3 * 0.5 / 4)
    assert score(graded, (0, 1)) == pytest.approx(0.5 / 4)
    assert score((), ()) == 0


def test_stage_scores_are_of_the_stage_s_own_criteria():
    made = Rubric(criteria(2, 1, stage="steps") + criteria(3, stage="answer"))
    assert tuple(made.score((1, 0, 1), stage) for stage in ("plan", "steps", "answer")) == (
        0.0,
        pytest.approx(2 / 3),
        1.0,
    )


# Strict, repaired, refused


@pytest.mark.parametrize(
    ("text", "repairs"),
    [
        (rubric(item()), ()),
        (f"```json\n{rubric(item())}\n```", ("fence",)),
        (f"Here it is:\n{rubric(item())}\nI hope that helps {{you}}.", ("prose",)),
        (f"{rubric(item())}\nOnce more:\n```json\n{rubric(item())}\n```", ("prose",)),
        (rubric(item(), maximum_score=99), ("unknown_keys",)),
        (rubric(item(points=9)), ("unknown_keys",)),
        (rubric(item(id="C1")), ("id_case",)),
        (rubric(item(polarity="negative")), ("unknown_keys",)),  # not asked for
    ],
)
def test_what_is_repaired(text, repairs):
    found, made = parse_rubric(text, CONFIG)
    assert made == repairs
    assert [c.id for c in found.criteria] == ["c1"]
    assert found.criteria[0].polarity == "positive"
    assert set(made) <= set(REPAIRS)


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("", "empty", "empty"),
        ("I cannot do that.", "parse_error", "no JSON object"),
        (rubric(item())[:-3], "parse_error", "no JSON object"),
        ("[" * 100_000, "parse_error", "no JSON object"),
        ('{"criteria": ' * 5000, "parse_error", "no JSON object"),
        ('{"criteria": NaN}', "parse_error", "no JSON object"),
        ('An object {"k": 1} first, then\n' + rubric(item()), "ambiguous", "objects that differ"),
        (f"It is {rubric(item())}", "ambiguous", "inside of a sentence"),
        ('{"criteria": [], "criteria": [1]}', "ambiguous", "each key once"),
        (rubric(item(final_weight=5)), "ambiguous", "expected 'weight' alone"),
        (rubric(item(text="...")), "validation_error", "has no words"),
        (rubric(item(text="x" * 2000)), "validation_error", "characters; expected at most 2000"),
        (rubric(*[item(text="x" * 40_000)] * 10), "parse_error", "at most 400000"),
        ("[1]", "schema_error", "a list"),
        ('{"rubrics": []}', "schema_error", "'criteria'"),
        ('{"criteria": {}}', "schema_error", "an object; expected a list"),
        ('{"criteria": [7]}', "schema_error", "criterion 1 is a number"),
        (rubric(item(weight=0)), "schema_error", "weight"),
        (rubric(item(weight=6)), "schema_error", "weight"),
        (rubric(item(weight="5")), "schema_error", "weight"),
        (rubric(item(weight=True)), "schema_error", "weight"),
        (rubric(item(weight=2.5)), "schema_error", "weight"),
        (rubric(item(text="")), "schema_error", "text"),
        (rubric(item(text="\ud800")), "schema_error", "text"),
        (rubric(item(id="7")), "schema_error", "id"),
        (rubric(item(id="c1\n")), "schema_error", "id"),
        (rubric(item(), item()), "validation_error", "each once"),
        (rubric(), "validation_error", "0 criteria; expected from 1 to 12"),
        (rubric(*(item(n) for n in range(1, 14))), "validation_error", "13 criteria"),
    ],
)
def test_what_is_refused(text, kind, told):
    with pytest.raises(ReplyError, match=told) as refused:
        parse_rubric(text, CONFIG)
    assert refused.value.kind == kind
    assert kind in ERRORS


def test_a_rubric_of_flaws_alone_or_of_an_unknown_stage_is_refused():
    with pytest.raises(ReplyError, match="negative"):
        parse_rubric(rubric(item(polarity="negative")), SIGNED)
    with pytest.raises(ReplyError, match="stage 'end'; expected one of"):
        parse_rubric(rubric(item(stage="end")), CONFIG, ("start", "answer"))
    with pytest.raises(ReplyError, match="stage None"):
        parse_rubric(rubric(item()), CONFIG, ("start", "answer"))


def test_verdicts_are_mapped_by_index_whatever_their_order():
    read = parse_verdicts(
        verdicts((3, [True, True]), (1, [False, True]), (2, [True, False])), 3, 2, False
    )
    assert read.values == {0: (0, 1), 1: (1, 0), 2: (1, 1)}
    assert not read.problems


def test_an_answer_whose_entry_is_wrong_loses_only_itself():
    rows = [(1, [True, False]), (2, [True]), (5, [1, 0]), (4, [False, True]), (3, [True] * 3)]
    read = parse_verdicts(verdicts(*rows), 5, 2, False)
    assert read.values == {0: (1, 0), 3: (0, 1)}
    assert read.problems.keys() == {1, 2, 4}
    assert read.problems[1] == "answer 2 has 1 verdicts; expected 2, of true and false"
    assert "true and false" in read.problems[4]
    assert not read.repairs


@pytest.mark.parametrize(
    "indices", [(0, 1, 2), (1, 2), (1, 2, 2), (1, 2, 4), (1, 2, 3, 4), (-1, 2, 3), (), (1, 2, True)]
)
def test_entries_that_are_not_one_for_each_answer_are_refused(indices):
    with pytest.raises(ReplyError, match="answer_index from 1 to 3") as refused:
        parse_verdicts(verdicts(*((index, [True, False]) for index in indices)), 3, 2, False)
    assert refused.value.kind == "answer_index"


def test_grades_are_whole_numbers_up_to_two():
    read = parse_verdicts(verdicts((1, [0, 2]), (2, [3, 0]), (3, [True, False])), 3, 2, True)
    assert read.values == {0: (0, 2)}
    assert set(read.problems) == {1, 2}


@pytest.mark.parametrize("value", [-0.1, 1.1, 2, "1", None, True, 10**400])
def test_a_score_outside_its_range_is_no_score(value):
    read = parse_scores(json.dumps({"answers": [{"answer_index": 1, "score": value}]}), 1)
    assert read.values == {}
    assert set(read.problems) == {0}


def test_plain_scores():
    read = parse_scores(
        '{"answers": [{"answer_index": 2, "score": 1}, {"answer_index": 1, "score": 0.25}]}', 2
    )
    assert read.values == {0: 0.25, 1: 1.0}


# Whatever a judge writes

TEXTS = st.text(max_size=30) | st.sampled_from(
    ["c1", "task", "criteria", "answers", "\ud800", "NaN", "```json"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 7) | st.floats() | TEXTS | st.just(10**320),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            TEXTS
            | st.sampled_from(
                ["id", "weight", "verdicts", "score", "answer_index", "total", "stage"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
RIGHT = [
    rubric(item(), item(2)),
    rubric(item(polarity="negative"), item(2, stage="a")),
    verdicts((1, [True, False]), (2, [False, False])),
    verdicts((1, [2, 0]), (2, [1, 1])),
    '{"answers": [{"answer_index": 1, "score": 0.5}, {"answer_index": 2, "score": 0}]}',
]


@st.composite
def mutated(draw):
    """A right reply with pieces cut out, put in twice, replaced, or words around it."""
    text, rng = draw(st.sampled_from(RIGHT)), random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(1, 4))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randrange(12))
        piece = rng.choice(
            [
                "",
                text[start:end] * 2,
                '"total": 99, ',
                "{",
                "}",
                "9" * 40,
                "\\ud800",
                "null",
                draw(TEXTS),
            ]
        )
        text = text[:start] + piece + text[end:]
    return text


def read_or_refused(parse, *arguments):
    """What the parser makes of it, or None where it is refused by one of the named kinds."""
    try:
        return parse(*arguments)
    except ReplyError as error:
        refused = error.kind
    assert refused in ERRORS


def check(text):
    for config, stages in ((CONFIG, ()), (SIGNED, ("a", "b"))):
        found = read_or_refused(parse_rubric, text, config, stages)
        assert found is None or 0 <= score(found[0].criteria, [1] * len(found[0].criteria)) <= 1
    for is_graded in (False, True):
        held = criteria(5, 1, grade="graded" if is_graded else "binary")
        read = read_or_refused(parse_verdicts, text, 2, 2, is_graded)
        assert read is None or set(read.values) | set(read.problems) == {0, 1}
        assert read is None or all(0 <= score(held, found) <= 1 for found in read.values.values())
    read = read_or_refused(parse_scores, text, 2)
    assert read is None or all(0 <= found <= 1 for found in read.values.values())


REPLIES = st.text(max_size=200) | VALUES.map(lambda v: json.dumps(v)) | mutated()


@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(REPLIES)
def test_no_reply_raises_anything_else_or_makes_a_reward_outside_its_range(text):
    check(text)


@pytest.mark.long
@settings(max_examples=4_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(REPLIES)
def test_no_reply_of_thousands_does(text):
    check(text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False),
)
def test_no_reward_comes_from_a_declared_total(marks, total):
    plain = parse_verdicts(verdicts((1, marks)), 1, 3, False)
    for name in ("total", "final_score", "weighted_score", "pass_rate", "score"):
        lying = parse_verdicts(verdicts((1, marks), **{name: total}), 1, 3, False)
        assert lying.values == plain.values


@pytest.mark.parametrize(
    "text",
    [
        '<think>first {"answers": [1]} perhaps</think>{"answers": []}',
        '{"answers": [1]} no, </think>\n```json\n{"answers": []}\n```',
        'so:\n{"answers": []}',
    ],
)
def test_of_a_reply_that_thinks_aloud_only_what_follows_counts(text):
    assert read_object(text, "answers")[0] == {"answers": []}


def test_a_reply_that_never_stops_thinking_holds_nothing():
    with pytest.raises(ReplyError, match="no JSON object"):
        read_object('<think>{"answers": []} or', "answers")
    assert read_object('{"answers": ["</think>"]}', "answers")[0] == {"answers": ["</think>"]}
