"""The judge that works by rules: rubrics, verdicts, scores and advice worked by hand, and never a
reply that cannot be read.
"""

import asyncio
import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opdjax.config.rubrics import RubricsConfig
from opdjax.data.tasks.arithmetic import problems
from opdjax.judge.judgement import group_of, judge_group
from opdjax.judge.reflection import reflect
from opdjax.judge.replies import Reply
from opdjax.judge.rule_based import demands, rules
from opdjax.judge.rule_based.demands import Step, grade, read_answer, read_task
from opdjax.judge.rule_based.rules import reply_to, role_of
from opdjax.judge.structured_output import Judge

QUESTION, RIGHT = "34-17+25=", "34-17=17;17+25=42#42"
SLIPPED = "34-17=18;18+25=43#43"  # wrong in the first step, consistent after it
MISCOPIED = "34-17=17;17+25=42#43"
STAGES = {"stages": ("first step", "second step=;", "answer=#")}


async def by_rules(role, messages, *, schema=None, schema_name="reply", sample=0):
    return Reply(json.dumps(reply_to(messages)), "stop", False, 0, 0)


def judged(answers, references=(RIGHT,), kind="rubric", question=QUESTION, existing=(), **options):
    """The judgement of a group, by the package's own prompts and parsers."""
    judge = Judge(by_rules, RubricsConfig(**options))
    group = group_of(judge, 0, question, references, answers, [False] * len(answers))
    group = type(group)(**{**vars(group), "existing": tuple(existing)})
    (judgement,) = asyncio.run(judge_group(judge, group, kind))
    return judgement


def rubric(*args, **options):
    found = judged(*args, **options)
    assert not found.tally.problems.total()
    assert not found.tally.repairs
    return {criterion.text: criterion for criterion in found.rubric.criteria}


def test_answers_are_read_by_their_surface():
    answer = read_answer("34 - 17 = 17; -3+25=21 # 42\nthen more")
    assert answer.steps == (Step(34, "-17", 17), Step(-3, "+25", 21))
    assert [step.holds for step in answer.steps] == [True, False]
    assert (answer.value, answer.is_formed, answer.goes_on) == (42, True, True)
    assert read_answer("34-17+25=42#42").steps == ()  # no step amid a longer sum
    assert read_answer("1+1=2=2").steps == ()
    assert read_answer("1+1=2#3#4").value == 4
    assert read_answer("#4.5").value is None


def test_tasks_are_read_from_left_to_right():
    assert [str(step) for step in read_task("[user]\nIn 2-3 lines: 34 - 0 + 25 =")] == [
        "34-0=34",
        "34+25=59",
    ]
    assert read_task("why?") == ()
    for problem in problems("validation")[:200]:
        assert ";".join(map(str, read_task(problem.prompt))) == problem.reference.split("#")[0]


def test_what_references_agree_on_is_demanded_by_name():
    """Two of three students slip in the first step, and with it in all that follows."""
    found = rubric([RIGHT, SLIPPED, "34-17=19;19+25=44#44"], [RIGHT])
    assert {text: (c.weight, c.category) for text, c in found.items()} == {
        "The value after # is 42.": (5, "task"),
        "The answer contains the step 34-17=17.": (4, "reasoning"),
        "The answer contains the step 17+25=42.": (4, "reasoning"),
        demands.LAST: (1, "quality"),
        demands.FORM: (1, "quality"),
    }


def test_a_step_that_all_students_have_weighs_little():
    found = rubric([RIGHT, MISCOPIED], [RIGHT])
    assert found["The answer contains the step 34-17=17."].weight == 1
    assert found[demands.LAST].weight == 2


def test_verdicts_and_scores_by_hand():
    """Weights 5 value, 1 and 2 for the steps, 2 last, 1 form: 11 points."""
    found = judged([RIGHT, MISCOPIED, "34-17=17;17+25=43#43", ""], [RIGHT])
    by_text = {c.text: place for place, c in enumerate(found.rubric.criteria)}
    assert [c.weight for c in found.rubric.criteria] == [5, 2, 2, 2, 1]
    assert found.verdicts == ((1, 1, 1, 1, 1), (0, 1, 1, 0, 1), (0, 1, 0, 1, 1), (0, 0, 0, 0, 0))
    assert found.scores == (1.0, 5 / 12, 5 / 12, 0.0)
    assert found.reference_scores == (1.0,)
    assert by_text["The answer contains the step 34-17=17."] == 1


def test_where_references_differ_no_criterion_names_what_is_in_dispute():
    other = "34-17=17;17+25=41#41"
    found = rubric([RIGHT, other, SLIPPED], [RIGHT, other])
    assert "The answer contains the step 34-17=17." in found
    assert found[demands.WORKED].weight == 5
    assert not [text for text in found if "42" in text or "41" in text]
    # 1 the first step, 5 that it is worked out, 1 the chain, 4 the numbers, 2 that the value
    # follows, 1 the form.
    scores = judged([RIGHT, other, MISCOPIED, "34-17=17;17-25=-8#-8"], [RIGHT, other]).scores
    assert scores == (1.0, 9 / 14, 7 / 14, 10 / 14)
    # A value that most agree on, by steps that differ: the sums are asked for, and the value by
    # name.
    found = rubric([RIGHT, SLIPPED], [RIGHT, "17+25=42;42+0=42#42"])
    assert (found["The value after # is 42."].weight, found[demands.SUMS].weight) == (5, 4)
    assert demands.WORKED not in found


def test_a_wrong_sum_is_never_demanded_whoever_agrees_on_it():
    found = rubric([RIGHT, SLIPPED], [SLIPPED])
    assert not [text for text in found if "=18" in text or "43" in text]
    assert demands.WORKED in found
    # A majority that holds outvotes the one that slipped.
    assert "The value after # is 42." in rubric(
        [SLIPPED], [RIGHT, "34-17=17; 17+25=42 #42", SLIPPED]
    )


@pytest.mark.parametrize("references", [["?", "", "no idea"], ["#42"], ["1+1=2"]])
def test_malformed_references_still_make_a_rubric(references):
    found = rubric(["", "garbage", RIGHT], references)
    assert 4 <= len(found) <= 12
    scores = judged(["", "garbage", RIGHT], references).scores
    assert scores[0] == scores[1] == 0.0 < scores[2]


def test_each_criterion_looks_at_one_stage():
    found = judged([RIGHT, SLIPPED, MISCOPIED], [RIGHT], **STAGES)
    stages = [criterion.stage for criterion in found.rubric.criteria]
    assert set(stages) == {"first step", "second step", "answer"}
    of = {c.text: c.stage for c in found.rubric.criteria}
    assert of["The value after # is 42."] == "answer"
    assert of["The answer contains the step 34-17=17."] == "first step"
    assert of["The answer contains the step 17+25=42."] == "second step"
    right, slipped, miscopied = found.stage_scores
    assert right == (1.0, 1.0, 1.0)
    assert slipped[0] < 1
    assert slipped[2] < 1
    assert miscopied[:2] == (1.0, 1.0)
    assert miscopied[2] < 0.5
    two = judged([RIGHT, SLIPPED], [RIGHT], stages=("steps", "answer=#"))
    assert {c.stage for c in two.rubric.criteria if "step 34" in c.text or "step 17" in c.text} == {
        "steps"
    }


def test_flaws_are_asked_for_and_seen():
    found = judged([RIGHT, SLIPPED, RIGHT + ";1+1=2"], [RIGHT], polarity="signed")
    flaws = {
        c.text: place for place, c in enumerate(found.rubric.criteria) if c.polarity == "negative"
    }
    assert set(flaws) == {demands.FLAW_SUM, demands.FLAW_AFTER}
    assert [verdicts[flaws[demands.FLAW_SUM]] for verdicts in found.verdicts] == [0, 1, 0]
    assert [verdicts[flaws[demands.FLAW_AFTER]] for verdicts in found.verdicts] == [0, 0, 1]
    disputed = rubric([RIGHT], [RIGHT, SLIPPED], polarity="signed")
    assert demands.WORKED in disputed
    assert demands.FLAW_SUM not in disputed  # no mirror images


def test_grades_grant_a_part():
    found = judged([RIGHT, "34-17=17;17+25=43", "what?"], [RIGHT], grades="graded")
    assert found.verdicts == ((2, 2, 2, 2, 2), (0, 2, 1, 0, 1), (0, 0, 0, 0, 0))
    assert grade(demands.VALUE.format(42), read_answer("34-17=17;17+25=42")) == demands.PARTLY_MET


def test_criteria_in_use_are_not_written_again():
    first = judged([RIGHT, SLIPPED], [RIGHT]).rubric.criteria
    found = judged([RIGHT, SLIPPED], [RIGHT], refresh="evolving", existing=first[:2])
    assert [c.text for c in found.rubric.criteria[:2]] == [c.text for c in first[:2]]
    assert len(found.rubric.criteria) == len(first)
    assert judged([RIGHT], [RIGHT], refresh="evolving", existing=first).rubric.criteria == first


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"polarity": "signed"},
        STAGES,
        {"grades": "graded"},
        {"blind": False},
        {"answers_per_call": 2},
    ],
)
@pytest.mark.parametrize("bounds", [(4, 12), (1, 1), (2, 3), (12, 12), (40, 40)])
def test_rubrics_are_as_long_as_was_asked(options, bounds):
    found = judged([SLIPPED, MISCOPIED, ""], [RIGHT], num_criteria=bounds, **options)
    assert found.is_scored
    assert not found.tally.num_reasks
    assert bounds[0] <= len(found.rubric.criteria) <= bounds[1]


def test_every_sentence_is_understood_by_the_verifier():
    """A right answer meets all that a rubric can say, in 40 criteria of every kind."""
    for options in ({}, STAGES):
        found = judged([RIGHT], [RIGHT, "34-17=17;17+25=42#42 "], num_criteria=(9, 40), **options)
        assert found.verdicts[0] == (1,) * len(found.rubric.criteria)


def test_what_cannot_be_understood_is_not_granted():
    answer = read_answer(RIGHT)
    assert grade("c1 (task): it should state that 34 - 17 = 17", answer) == demands.MET
    assert grade("c1 (task): it ends with #42", answer) == demands.MET
    assert grade("c1 (task): it is elegant", answer) == demands.NOT_MET


def test_plain_scores():
    found = judged([RIGHT, MISCOPIED, "#42", "", RIGHT + "#1"], [RIGHT], kind="scalar")
    assert found.scores == (1.0, 0.5, 0.5, 0.0, 0.5)


@pytest.mark.parametrize(
    ("answer", "start"),
    [
        (SLIPPED, "Step 1 says 34-17=18, but it should be 34-17=17."),
        ("34-17=17;17-25=-8#-8", "Step 2 says 17-25=-8, but it should be 17+25=42."),
        ("34-17=17#17", "Step 2 is missing: it should be 17+25=42."),
        (RIGHT[:-3] + ";42+1=43#43", "Step 3, 42+1=43, is one too many."),
        (MISCOPIED, "The value after # is 43, but it should be 42"),
        (RIGHT[:-3], "No value stands after #, but it should be 42"),
        (RIGHT + ";", "The steps and the value 42 are there, but the answer goes on"),
        (RIGHT, "Each step holds"),
    ],
)
def test_advice_names_the_first_thing_that_is_wrong(answer, start):
    judge = Judge(by_rules, RubricsConfig())
    found = asyncio.run(reflect(judge, judged([answer])))
    assert found.reflections[0].startswith(start)


PIECES = st.sampled_from(
    [
        "34-17=17",
        "17+25=42",
        "=",
        ";",
        "#",
        "42",
        "-",
        "1+1=3",
        "carry the tag",
        " ",
        "\n",
        '- stage "x"',
        "9" * 20,
        "²",
        "٣",
    ]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join), st.just(RIGHT))
GROUPS = st.lists(TEXTS, min_size=1, max_size=4)
OPTIONS = st.sampled_from(
    [
        {},
        {"polarity": "signed"},
        STAGES,
        STAGES | {"polarity": "signed"},
        {"grades": "graded"},
        {"blind": False},
    ]
)


@settings(max_examples=150, deadline=None)
@given(TEXTS, GROUPS, GROUPS, OPTIONS)
@example("1" * 5000 + "+1=", ["1" * 5000 + "+1=2#3"], ["#" * 5000], {})
def test_whatever_the_texts_are_the_replies_can_be_read(question, references, answers, options):
    found = judged(answers, references, question=question, **options)
    assert all(value is not None for value in found.scores)
    assert not found.tally.problems.total()
    assert not found.tally.repairs
    assert all(
        value is not None for value in judged(answers, references, "scalar", question).scores
    )
    assert all(asyncio.run(reflect(Judge(by_rules, RubricsConfig()), found)).reflections)


@given(
    st.lists(
        st.fixed_dictionaries(
            {}, optional={"role": st.text(), "content": st.one_of(st.none(), st.integers(), TEXTS)}
        ),
        max_size=3,
    )
)
def test_other_chats_get_a_note(messages):
    assert role_of(messages) is None
    assert "note" in reply_to(messages)


@pytest.mark.parametrize("unit", [" ", "#", "# ", "1+", "1+1=2;", "-", "\n", "9"])
def test_long_answers_take_no_longer_than_their_length(unit):
    def seconds(length):
        text = unit * (length // len(unit))
        begun = time.thread_time()
        for criterion in (demands.FORM, demands.SUMS, text):
            grade(criterion, read_answer(text))
        read_task(text)
        return time.thread_time() - begun

    # Sixteen times as long for a quadratic pattern. The least of five: a collection of garbage may
    # fall into one.
    short, long = (min(seconds(length) for _ in range(5)) for length in (6000, 24000))
    assert long < 8 * short + 0.005


def test_verdicts_are_wrong_at_the_stated_rates_and_stay_the_same():
    errors, texts = rules.Errors(false_accepts=0.1, false_rejects=0.3, seed=1), range(4000)
    for right, rate in ((demands.NOT_MET, 0.1), (demands.PARTLY_MET, 0.1), (demands.MET, 0.3)):
        given = [errors.verdict(right, "c", f"answer {n}") for n in texts]
        assert given == [errors.verdict(right, "c", f"answer {n}") for n in texts]
        # The standard error of 4000 draws is at most 0.0075.
        assert abs(sum(one != right for one in given) / 4000 - rate) < 0.03


def test_steps_with_factors_and_divisors_are_checked():
    answer = read_answer("Then 7 * 3 = 21. One part is 21 / 7 = 3. 7 / 2 = 3. 2 * 2 = 5. #### 5")
    assert [step.holds for step in answer.steps] == [True, True, False, False]
    assert answer.value == 5
    assert grade("The answer contains the step 3*7=21.", answer) == demands.MET
    assert grade("The answer contains the step 2*2=4.", answer) == demands.PARTLY_MET
    assert grade("The answer contains the step 7/21=3.", answer) == demands.NOT_MET
