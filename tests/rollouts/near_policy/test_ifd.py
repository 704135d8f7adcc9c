"""Delta-IFD against numbers worked by hand, against dense log-softmax, and the zones for whatever
comes.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdjax.rollouts.near_policy.ifd import (
    MIN_ALONE_NLL,
    ZONES,
    document,
    histogram,
    ifd,
    quantile_bound,
    random_control,
    zones,
)

deltas = st.lists(
    st.floats(-2, 2) | st.sampled_from([0.0, 0.8, math.nan, math.inf, -math.inf]), max_size=30
).map(np.array)
bounds = st.none() | st.floats(-1, 1)


def test_an_example_worked_by_hand():
    # An answer of two tokens. The student gives them 1/2 and 1/8 with the prompt, 1/4 and 1/16
    # without; the teacher 1/2 and 1/2, 1/4 and 1/4. In bits: student (1 + 3) / 2 = 2 and (2 + 4) /
    # 2 = 3; teacher 1 and 2.
    student, student_alone, teacher, teacher_alone = (
        math.log(2) * np.array([bits]) for bits in (2, 3, 1, 2)
    )
    of_student = ifd(student, student_alone)
    of_teacher = ifd(teacher, teacher_alone)
    np.testing.assert_allclose(of_student, 2 / 3, rtol=1e-15)
    np.testing.assert_allclose(of_teacher, 1 / 2, rtol=1e-15)
    np.testing.assert_allclose(of_teacher - of_student, -1 / 6, rtol=1e-15)
    assert zones(of_teacher - of_student, 0.0, 0.8) == ["degenerate"]
    # A teacher that gives 1/2 and 1/32 with the prompt, 1/2 and 1/2 without: 3 bits to 1.
    odd = ifd(3 * student / 2, student / 2) - of_student
    np.testing.assert_allclose(odd, 3 - 2 / 3, rtol=1e-15)
    assert zones(odd, 0.0, 0.8) == ["disconnected"]


def test_it_is_the_ratio_of_dense_log_softmaxes(rng):
    """A tiny language model whose logits depend on the last two tokens; the prompt is a token of
    its own.
    """
    vocab, length, count = 7, 5, 6
    table = rng.normal(
        size=(vocab + 1, vocab, vocab)
    )  # [context before last, last, next]; `vocab`: no such context
    answers = rng.integers(0, vocab, (count, length))
    prompts = rng.integers(0, vocab, count)
    opening = 0  # the token that opens every answer

    def probabilities(answer, prompt):
        contexts = [prompt, opening, *answer]
        for before, last, token in zip(contexts, contexts[1:], contexts[2:], strict=False):
            logits = table[before, last]
            yield (np.exp(logits) / np.exp(logits).sum())[token]

    given_prompt = np.array([list(probabilities(y, x)) for x, y in zip(prompts, answers)])
    alone = np.array([list(probabilities(y, vocab)) for y in answers])
    found = ifd(-np.log(given_prompt).mean(1), -np.log(alone).mean(1))
    expected = np.log(given_prompt).sum(1) / np.log(alone).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("conditional", "alone", "expected"),
    [
        (0.0, 1.0, 0.0),  # certain with the prompt
        (1.0, 0.0, None),  # certain without: any ratio would do
        (0.0, 0.0, None),
        (1e-9, MIN_ALONE_NLL / 2, None),
        (-1e-8, 1.0, -1e-8),  # rounding
        (math.nan, math.nan, None),  # the mean of no tokens
        (math.inf, 1.0, None),
        (1.0, math.inf, None),  # 1 / inf is 0, and the best score of all
        (1000.0, 1.0, 1000.0),
    ],
)
def test_what_has_no_meaningful_ratio_is_unscored(conditional, alone, expected):
    found = ifd(np.array([conditional]), np.array([alone]))
    np.testing.assert_allclose(found, math.nan if expected is None else expected, rtol=1e-6)
    if expected is None:
        assert zones(found - 0.5, None, None) == zones(0.5 - found, None, None) == ["unscored"]


def test_log_probs_are_no_nlls():
    with pytest.raises(ValueError, match="a mean NLL is -1.5; expected at least 0"):
        ifd(np.array([np.nan, -1.5]), np.array([-2.0, -2.0]))


# Zones


@given(deltas, bounds, bounds)
def test_the_zones_share_out_the_samples(delta, low, high):
    found = zones(delta, low, high)
    assert found.shape == delta.shape
    assert set(found) <= set(ZONES)
    for name, value in zip(found, delta.tolist()):
        is_beyond = {
            "degenerate": low is not None and value < low,
            "disconnected": high is not None and value > high,
        }
        # Where the bounds cross, a sample may be beyond both.
        expected = [zone for zone, is_there in is_beyond.items() if is_there] or ["kept"]
        assert name in (expected if math.isfinite(value) else ["unscored"])


@given(st.floats(-1, 1))
def test_both_bounds_are_kept(bound):
    assert zones(np.array([bound]), bound, bound) == ["kept"]
    assert zones(
        np.array([np.nextafter(bound, -2), np.nextafter(bound, 2)]), bound, bound
    ).tolist() == ["degenerate", "disconnected"]


@given(deltas, bounds, st.floats(-1, 1), st.floats(0, 1))
def test_a_higher_tau_keeps_no_fewer(delta, low, tau, more):
    fewer, wider = zones(delta, low, tau) == "kept", zones(delta, low, tau + more) == "kept"
    assert np.all(wider[fewer])


@given(deltas, bounds, st.floats(0.01, 1))
def test_a_quantile_keeps_at_least_its_share(delta, low, quantile):
    eligible = np.sum(zones(delta, low, None) == "kept")
    bound = quantile_bound(delta, low, quantile)
    if not eligible:
        assert bound is None
        return
    assert bound in delta
    assert np.sum(zones(delta, low, bound) == "kept") >= math.floor(quantile * eligible + 1e-9)
    below = np.nextafter(bound, -np.inf)
    assert np.sum(zones(delta, low, below) == "kept") < max(
        1, math.ceil(quantile * eligible + 1e-9)
    )


def test_a_quantile_by_hand():
    delta = np.array([0.1, -0.5, 0.4, 0.2, np.nan, 0.3])
    assert [quantile_bound(delta, 0.0, q) for q in (0.25, 0.5, 0.75, 1.0)] == [0.1, 0.2, 0.3, 0.4]
    assert quantile_bound(delta, None, 1 / 5) == -0.5


def test_the_control_keeps_as_many_whichever():
    where = {"seed": 3, "version": 12, "number": 1}
    chosen = random_control(40, 100, **where)
    assert chosen.sum() == 40
    np.testing.assert_array_equal(chosen, random_control(40, 100, **where))
    for other in ({"seed": 4}, {"version": 13}, {"number": 2}):
        assert (chosen != random_control(40, 100, **where | other)).any()
    assert random_control(0, 0, **where).shape == (0,)
    with pytest.raises(ValueError, match="larger sample than population"):
        random_control(3, 2, **where)
    # Every sample is as likely as every other: 400 draws of 40 %, five standard deviations.
    share = np.mean([random_control(4, 10, seed=0, version=v, number=0) for v in range(400)], 0)
    np.testing.assert_allclose(share, 0.4, atol=5 * math.sqrt(0.24 / 400))


# The document

STUDENT = np.array([0.5, 0.5, 0.5, 0.5, np.nan, 0.5])
TEACHER = np.array([0.6, 0.4, 1.5, 0.5, 0.5, 0.7])


def make_document(**changed):
    values = {
        "seed": 0,
        "student_ifd": STUDENT,
        "teacher_ifd": TEACHER,
        "kept": zones(TEACHER - STUDENT, 0.0, 0.8) == "kept",
        "prompt_id": np.arange(6) // 2,
        "sample_id": np.arange(6) % 2,
        "is_correct": np.array([True, False, False, False, True, True]),
        "texts_of": lambda i: (f"p{i}", f"c{i}"),
    } | changed
    facts = {"version": 8, "number": 2, "filter": values.pop("filter", "ifd"), "form": "nll_ratio"}
    names = ("prompt_id", "sample_id", "student_ifd", "teacher_ifd")
    samples = {name: values.pop(name) for name in names}
    return document(facts | {"ifd_min": 0.0, "ifd_max": 0.8}, samples=samples, **values)


def test_the_document_counts_what_became_of_every_sample():
    found = json.loads(json.dumps(make_document(), allow_nan=False))
    examples, shape = found.pop("examples"), found.pop("histogram")
    assert found == {
        "version": 8,
        "number": 2,
        "filter": "ifd",
        "form": "nll_ratio",
        "ifd_min": 0.0,
        "ifd_max": 0.8,
        "num_samples": 6,
        "num_kept": 3,
        "num_degenerate": 1,
        "num_disconnected": 1,
        "num_unscored": 1,
        "by_correctness": {"right": {"num": 3, "kept": 2}, "wrong": {"num": 3, "kept": 1}},
        "kept": [1, 0, 0, 1, 0, 1],
    }
    assert sum(shape["counts"]) == 5
    assert len(shape["edges"]) == len(shape["counts"]) + 1
    assert [
        [row["completion"] for row in examples[zone]]
        for zone in ("kept", "degenerate", "disconnected")
    ] == [
        ["c0", "c3", "c5"],
        ["c1"],
        ["c2"],
    ]
    assert examples["disconnected"] == [
        {
            "prompt_id": 1,
            "sample_id": 0,
            "prompt": "p2",
            "completion": "c2",
            "delta": 1.0,
            "student_ifd": 0.5,
            "teacher_ifd": 1.5,
            "is_correct": False,
        },
    ]
    ungraded = make_document(is_correct=None)
    assert ungraded["by_correctness"] is ungraded["examples"]["kept"][1]["is_correct"] is None


def test_the_control_keeps_others_than_its_zones_say():
    found = make_document(filter="random", kept=np.array([0, 1, 1, 0, 1, 0], bool))
    assert found["kept"] == [0, 1, 1, 0, 1, 0]
    assert (found["num_kept"], found["num_degenerate"]) == (3, 1)
    assert [row["completion"] for row in found["examples"]["kept"]] == ["c1", "c2", "c4"]
    assert found["examples"]["kept"][2]["delta"] is None


def test_examples_are_drawn_and_only_they_are_decoded():
    count, decoded = 200, []
    delta = np.linspace(0, 0.5, count)
    values = {
        "student_ifd": np.zeros(count),
        "teacher_ifd": delta,
        "kept": np.ones(count, bool),
        "is_correct": None,
        "prompt_id": np.arange(count),
        "sample_id": np.zeros(count),
        "texts_of": lambda i: ("", decoded.append(i) or ""),
    }
    chosen = [row["prompt_id"] for row in make_document(**values)["examples"]["kept"]]
    assert decoded == chosen == sorted(chosen)
    assert len(chosen) == 4
    assert chosen != [0, 1, 2, 3]
    assert chosen == [row["prompt_id"] for row in make_document(**values)["examples"]["kept"]]
    assert chosen != [
        row["prompt_id"] for row in make_document(**values, seed=1)["examples"]["kept"]
    ]


def test_outliers_leave_the_shape_of_the_histogram():
    assert histogram(np.array([np.nan])) == {"edges": [], "counts": []}
    assert histogram(np.array([0.3, 0.3])) == {"edges": [-0.2, 0.8], "counts": [2]}
    delta = np.concatenate([np.linspace(0, 1, 1000), [1e6, -1e6]])
    found = histogram(delta)
    assert sum(found["counts"]) == 1002
    assert -0.01 < found["edges"][0] < found["edges"][-1] < 1.01


def test_nothing_at_all_is_a_document_too():
    names = ("student_ifd", "teacher_ifd", "prompt_id", "sample_id")
    found = make_document(
        **dict.fromkeys(names, np.zeros(0)), kept=np.zeros(0, bool), is_correct=np.zeros(0, bool)
    )
    assert (found["num_samples"], found["kept"], found["examples"]["kept"]) == (0, [], [])
