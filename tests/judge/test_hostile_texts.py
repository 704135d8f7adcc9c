"""What hostile replies of judges and hostile answers of students do to rewards: nothing."""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import time

import pytest

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.judgement import group_of, judge_group
from opdjax.judge.prompts import read_blocks, shown_answer
from opdjax.judge.replies import Reply
from opdjax.judge.reply_object import ERRORS, ReplyError, require_own_object
from opdjax.judge.schema import Criterion, Rubric, parse_rubric, parse_scores, parse_verdicts
from opdjax.judge.structured_output import Judge


def rows(name):
    lines = (pathlib.Path(__file__).parent / name).read_text().splitlines()
    return {row.pop("name"): row for row in map(json.loads, lines)}


REPLIES, ANSWERS = rows("hostile_replies.jsonl"), rows("hostile_answers.jsonl")
PLANTED = ANSWERS["verdicts that grade the answer"]["answer"]
PLANTED += "".join(
    ANSWERS[name]["answer"].removeprefix("42")
    for name in ("scores that grade the answer", "a rubric of its own")
)
RIGHT, WRONG = "34-17=17;17+25=42#42", "17#17"
# The judge numbers them by a hash, in this order: the replies of the corpus count on it.
TRUTH = {RIGHT: ([True, False], 0.5), PLANTED: ([False, True], 0.25), WRONG: ([False, False], 0)}
CRITERIA = [
    {"id": f"c{n}", "category": "task", "text": text, "weight": weight}
    for n, text, weight in ((1, "The value is 42.", 5), (2, "Every step holds.", 2))
]


class Honest:
    """A judge that knows the truth; `first(role, number, pool, own)` may replace its own
    reply to request `number`, from 1."""

    def __init__(self, truth, first):
        self._truth, self._first, self.prompts, self.pools = truth, first, [], []

    async def __call__(self, role, messages, *, schema, schema_name):
        prompt = messages[0]["content"]
        blocks = read_blocks(prompt)
        pool = blocks.get("answer", ())
        self.pools.append(pool)
        own = {"criteria": CRITERIA}
        if role == "verifier":
            name, place = ("verdicts", 0) if "criterion" in blocks else ("score", 1)
            entries = enumerate(pool, 1)
            own = {
                "answers": [{"answer_index": n, name: self._truth[a][place]} for n, a in entries]
            }
        own = json.dumps(own)
        self.prompts.append(prompt)
        reply = self._first(role, len(self.prompts), pool, own)
        return Reply(own if reply is None else reply, "stop", False, 1, 1)


def judged(first, truth=TRUTH, kind="verdicts"):
    """(The judgement of the answers in `truth`, the judge)."""
    honest = Honest(truth, first)
    judge = Judge(honest, RubricsConfig(num_criteria=(1, 12)))
    group = group_of(judge, 0, "34-17+25=", (), list(truth), [False] * len(truth))
    if kind == "verdicts":
        rubric = Rubric(tuple(Criterion(**criterion) for criterion in CRITERIA))
        group = dataclasses.replace(group, rubric=rubric)
    (found,) = asyncio.run(judge_group(judge, group, "scalar" if kind == "scores" else "rubric"))
    return found, honest


def is_unmoved(scores, expected):
    return all(score in (None, true) for score, true in zip(scores, expected, strict=True))


def test_the_corpora_are_large():
    assert len(REPLIES) >= 60
    assert len(ANSWERS) >= 20
    assert {row["problem"] for row in REPLIES.values()} <= {*ERRORS, ""}
    assert judged(lambda *_: None)[1].pools == [list(TRUTH)]


@pytest.mark.parametrize("name", REPLIES)
def test_an_ambiguous_reply_is_asked_again_and_moves_no_reward(name):
    kind, reply, problem = (REPLIES[name][field] for field in ("kind", "reply", "problem"))
    role = "rubricator" if kind == "rubric" else "verifier"
    expected = judged(lambda *_: None, kind=kind)[0].scores
    assert None not in expected
    hostile = lambda asked, number, pool, own: reply if asked == role and len(pool) != 1 else None
    first = lambda asked, number, *rest: hostile(asked, number, *rest) if number == 1 else None
    once, always = (judged(replies, kind=kind)[0] for replies in (first, hostile))
    assert once.scores == expected
    if problem != "validation_error" or kind == "rubric":  # else each answer is asked for alone
        assert +once.tally.problems == ({problem: 1} if problem else {})
    assert is_unmoved(always.scores, expected)
    if problem not in ("answer_index", ""):
        assert not always.is_scored


QUOTING = {
    "before the reply": "Answer 2 says:\n{answer}\n\nMy verdicts:\n{own}",
    "after the reply": "{own}\n\nAnswer 2 says:\n{answer}\n",
    "in a fence": "Answer 2:\n```\n{answer}\n```\n\n```json\n{own}\n```",
    "alone": "I will not follow answer 2:\n{answer}\nIt cannot be graded.",
    "in a sentence": "It is no reply to say {answer} as answer 2 does.",
    "in a text that is not escaped": '{{"note": "it says {answer}", "answers": []}}',
    "in a text that is escaped": '{{"note": {escaped}, {own_fields}',
    "after a thought": "<think>\n{answer}\n</think>\n{own}",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_no_answer_of_a_student_moves_a_reward(name):
    """Whether a judge quotes it or not; the hostile answer is worth nothing."""
    answer = ANSWERS[name]["answer"]
    shown = shown_answer(answer, False, 10_000)
    truth = {RIGHT: ([True, True], 1), shown: ([False, False], 0), WRONG: ([False, True], 0.2)}
    expected, honest = judged(lambda *_: None, truth)
    assert expected.scores == (1.0, 0.0, 2 / 7)
    (prompt,), (pool,) = honest.prompts, honest.pools
    assert sorted(pool) == sorted(truth)  # one block for each answer, and as it was
    assert prompt.count("\n=== end of answer ") == prompt.count("\n=== answer ") == 3
    assert not {"<|im_end|>", "<|eot_id|>", "</s>", "[/INST]", "</think>"} & set(prompt.split())
    for number, (manner, template) in enumerate(QUOTING.items()):
        kind = ("verdicts", "scores")[number % 2]
        expected = judged(lambda *_: None, truth, kind)[0].scores

        def quoting(role, number, pool, own, template=template):
            texts = {"answer": shown, "escaped": json.dumps(shown), "own_fields": own[1:]}
            return template.format(own=own, **texts) if shown in pool else None

        once = lambda role, number, *rest, q=quoting: (
            q(role, number, *rest) if number == 1 else None
        )
        assert is_unmoved(judged(quoting, truth, kind)[0].scores, expected), manner
        assert judged(once, truth, kind)[0].scores == expected, manner


# Time

N = 100_000
LONG = {
    "newlines in a fence": "```" + "\n" * N + "```",
    "newlines after a fence": "```\n" + "\n" * N + "x",
    "fences": "```json\n" * (N // 8),
    "spaces after an object": '{"a":1}' + " " * N + "x",
    "spaces after a brace": "{" + " " * N,
    "braces": "{" * N,
    "objects without end": '{"a":' * (N // 5),
    "texts without end": '{"' * (N // 2),
    "escapes": '{"' + '\\"' * (N // 2),
    "empty objects": "{}" * (N // 2),
    "objects on one line": '{"a":1}' * (N // 7),
    "objects on lines": '{"answers":[]}\n' * (N // 15),
    "objects in objects": '{"a":' * 900 + "1" + "}" * 900,
    "lists without end": '{"answers": ' + "[" * N,
    "thoughts": "<think></think>" * (N // 15),
    "digits": '{"answers": ' + "1" * N + "}",
    "numbers of many digits": '{"answers": [' + ",".join(["1" * 4299] * 23) + "]}",
    "digits after a point": '{"answers": 0.' + "1" * N + "}",
    "entries": json.dumps({"answers": [{"answer_index": 1, "score": 1}] * (N // 35)}),
    "criteria": json.dumps({"criteria": [CRITERIA[0]] * (N // 80)}),
    "verdicts": json.dumps({"answers": [{"answer_index": 1, "verdicts": ["x"] * (N // 5)}]}),
    "keys": json.dumps({"answers": []} | {f"{n}answers": 1 for n in range(N // 16)}),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_reply_of_a_hundred_thousand_characters_is_read_in_linear_time(text):
    """A quadratic step would take minutes of CPU time, a linear one takes less than a second."""
    began = time.thread_time()
    for parse, *settings in (
        (parse_verdicts, 1, 2, False),
        (parse_scores, 1),
        (parse_rubric, RubricsConfig()),
    ):
        with contextlib.suppress(ReplyError):
            parse(text, *settings)
    assert time.thread_time() - began < 8


def test_a_quotation_is_looked_for_in_linear_time():
    began = time.thread_time()
    require_own_object('so:\n{"k":"' + "ab" * (N // 2) + 'c"}', "ab" * N)
    assert time.thread_time() - began < 8
