"""Groups judged by a scripted judge that reads the blocks of the prompt."""

import asyncio
import itertools
import json

import pytest

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.judgement import as_row, auc, group_of, judge_group, metrics_of
from opdjax.judge.prompts import read_blocks
from opdjax.judge.reflection import verdict_text
from opdjax.judge.replies import ApiRequestError, ApiUnavailableError, Reply
from opdjax.judge.rubricator import joined
from opdjax.judge.schema import Criterion
from opdjax.judge.structured_output import Judge, described
from opdjax.judge.verifier import pools

CRITERIA = [
    {"id": f"c{n}", "category": "task", "text": f"has {letter}", "weight": w}
    for n, letter, w in ((1, "a", 5), (2, "b", 2), (3, "c", 1))
]
REFERENCES = ("abc", "ab")
ANSWERS = ("a", "b", "", "abc", "a", "c")


class Scripted:
    """A judge that gives each answer the letters it has; `spoil(kind, number, document)` may change
    what it writes.
    """

    def __init__(self, spoil=lambda role, number, document: document):
        self.asked, self._spoil = [], spoil

    async def __call__(self, role, messages, *, schema=None, schema_name="reply", sample=0):
        await asyncio.sleep(0)
        number = sum(other == role for other, _ in self.asked)
        self.asked.append((role, messages))
        document = self._spoil(role, number, self._document(role, messages[0]["content"]))
        if isinstance(document, Exception):
            raise document
        text = document if isinstance(document, str) else json.dumps(document)
        return Reply(text, "stop", False, 1, 1)

    def _document(self, role, prompt):
        blocks = read_blocks(prompt)
        if role == "rubricator":
            return {"criteria": CRITERIA}
        texts = blocks["answer"]
        if "criterion" not in blocks:
            return {
                "answers": [
                    {"answer_index": n + 1, "score": len(text) / 4} for n, text in enumerate(texts)
                ]
            }
        letters = [criterion.rpartition(" ")[2] for criterion in blocks["criterion"]]
        return {
            "answers": [
                {"answer_index": n + 1, "verdicts": [letter in text for letter in letters]}
                for n, text in enumerate(texts)
            ]
        }

    def prompts(self, role):
        return [messages[0]["content"] for other, messages in self.asked if other == role]


def judged(
    scripted, answers=ANSWERS, references=REFERENCES, kind="rubric", is_truncated=None, **settings
):
    judge = Judge(scripted, RubricsConfig(num_criteria=(1, 12), **settings))
    group = group_of(
        judge, 7, "Which letters?", references, answers, is_truncated or [False] * len(answers)
    )
    return asyncio.run(judge_group(judge, group, kind))


WORTH = {"a": 5 / 8, "b": 2 / 8, "": 0, "abc": 1, "c": 1 / 8, "ab": 7 / 8}


def test_scores_are_made_of_the_verdicts():
    (found,) = judged(Scripted())
    assert found.scores == tuple(WORTH[answer] for answer in ANSWERS)
    assert dict(zip(found.group.references, found.reference_scores)) == {
        text: WORTH[text] for text in REFERENCES
    }
    assert found.verdicts[3] == (1, 1, 1)
    assert not +found.tally.problems


def test_permuting_answers_and_references_changes_no_reward_and_no_question():
    plain = Scripted()
    (first,) = judged(plain)
    for order in itertools.islice(itertools.permutations(range(len(ANSWERS))), 1, 720, 37):
        scripted = Scripted()
        (found,) = judged(scripted, [ANSWERS[place] for place in order], REFERENCES[::-1])
        assert found.scores == tuple(first.scores[place] for place in order)
        assert scripted.asked == plain.asked


def test_the_pool_is_blind_and_the_ablation_is_not():
    blind, told = Scripted(), Scripted()
    judged(blind)
    judged(told, blind=False)
    (question,), (open_question,) = blind.prompts("verifier"), told.prompts("verifier")
    assert "reference" not in question
    assert sorted(read_blocks(question)["answer"]) == sorted({*ANSWERS, *REFERENCES})
    assert "first 2 answers are references" in open_question
    assert set(read_blocks(open_question)["answer"][:2]) == set(REFERENCES)


def test_every_chunk_has_all_references():
    for chunk in pools(("r1", "r2"), ["a", "b", "c", "a"], 2, is_blind=True):
        assert {"r1", "r2"} < set(chunk)
        assert len(chunk) <= 4
    whole, chunked = Scripted(), Scripted()
    assert judged(chunked, answers_per_call=1)[0].scores == judged(whole)[0].scores
    assert len(chunked.prompts("verifier")) == 4  # a, b, c and nothing; abc is a reference


def test_a_pool_of_which_the_verifier_missed_some_is_asked_for_again():
    def forget(role, number, document):
        if role == "verifier" and number == 0:
            document["answers"] = document["answers"][:2]
        return document

    scripted = Scripted(forget)
    (found,) = judged(scripted)
    assert found.scores == tuple(WORTH[answer] for answer in ANSWERS)
    assert found.tally.problems == {"answer_index": 1, "missing_answer": 0}
    (_, first), (_, again) = scripted.asked[1:]
    assert again[0] == first[0]
    assert (
        "expected one entry for each answer_index from 1 to 6; there are 2, with 1, 2"
        in again[2]["content"]
    )


def test_a_rollout_whose_entry_is_wrong_is_asked_for_alone():
    def shorten(role, number, document):
        if role == "verifier" and number == 0:
            document["answers"][2:] = [row | {"verdicts": []} for row in document["answers"][2:]]
        return document

    scripted = Scripted(shorten)
    (found,) = judged(scripted)
    assert found.scores == tuple(WORTH[answer] for answer in ANSWERS)
    later = [set(read_blocks(prompt)["answer"]) for prompt in scripted.prompts("verifier")[1:]]
    assert all(len(texts - set(REFERENCES)) <= 1 and set(REFERENCES) <= texts for texts in later)
    assert found.tally.problems["missing_answer"] == len(later) > 0


def test_a_rollout_that_stays_missing_is_masked_and_the_others_are_kept():
    def forget_c(role, number, document):
        if role == "verifier":
            document["answers"] = [
                row for row in document["answers"] if row["verdicts"] != [False, False, True]
            ]
        return document

    (found,) = judged(Scripted(forget_c))
    assert found.scores[-1] is None
    assert found.scores[:-1] == tuple(WORTH[answer] for answer in ANSWERS[:-1])
    assert found.tally.problems["answer_index"] == 3 + 3  # of the pool, and of that rollout alone


def test_a_reply_that_cannot_be_used_is_asked_for_again_with_the_reason():
    def spoil_twice(role, number, document):
        return (
            {0: "no", 1: '{"criteria": []}'}.get(number, document)
            if role == "rubricator"
            else document
        )

    scripted = Scripted(spoil_twice)
    (found,) = judged(scripted)
    assert found.is_scored
    assert found.tally.problems == {"parse_error": 1, "validation_error": 1, "missing_answer": 0}
    second, third = (messages for role, messages in scripted.asked[1:3])
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert "no JSON object" in second[2]["content"]
    assert "0 criteria; expected from 1 to 12" in third[2]["content"]
    assert len(third) == 3  # the last reply alone, not all that were wrong


@pytest.mark.parametrize("role", ["rubricator", "verifier"])
@pytest.mark.parametrize(
    "reply", ["nonsense", "", '{"criteria": 1, "answers": 1}', ApiUnavailableError("down")]
)
def test_a_group_that_nobody_can_judge_has_no_scores(role, reply):
    (found,) = judged(
        Scripted(lambda asked, number, document: reply if asked == role else document)
    )
    assert not found.is_scored
    assert set(found.scores) == {None}
    counts, last = described([found.tally]).split("; the last one: ")
    assert counts == ", ".join(f"{kind} {n}" for kind, n in found.tally.problems.items())
    assert last == (str(reply) if isinstance(reply, Exception) else found.tally.last_problem)
    assert sum(found.tally.problems.values()) == (1 if isinstance(reply, Exception) else 3)


def test_a_rubric_for_each_student():
    scripted = Scripted()
    found = judged(scripted, rubric_of="student")
    assert [one.scores for one in found] == [(WORTH[answer],) for answer in ANSWERS]
    assert [one.group.samples for one in found] == [(n,) for n in range(len(ANSWERS))]
    assert len(scripted.prompts("rubricator")) == len(ANSWERS)


def test_plain_scores_without_a_rubric():
    scripted = Scripted()
    (found,) = judged(scripted, kind="scalar")
    assert found.scores == tuple(len(answer) / 4 for answer in ANSWERS)
    assert found.rubric is None
    assert not scripted.prompts("rubricator")


def test_the_first_references_are_shown_and_the_same_one_twice_as_two():
    scripted = Scripted()
    (found,) = judged(scripted, references=("ab", "abc", "ab", "c"), num_references=3)
    assert found.group.references == ("ab", "abc", "ab")
    assert read_blocks(scripted.prompts("rubricator")[0])["reference"] == ["ab", "ab", "abc"]
    assert read_blocks(scripted.prompts("verifier")[0])["answer"].count("ab") == 1
    assert found.reference_scores == (WORTH["ab"], WORTH["abc"], WORTH["ab"])


def test_a_truncated_answer_is_marked_for_the_judge():
    scripted = Scripted()
    judged(scripted, ("a", "b"), is_truncated=[True, False])
    assert any("cut off" in text for text in read_blocks(scripted.prompts("verifier")[0])["answer"])


def test_stages_of_criteria_are_scored_apart():
    staged = [
        criterion | {"stage": stage}
        for criterion, stage in zip(CRITERIA, ("start", "start", "end"))
    ]
    spoil = lambda role, number, document: (
        {"criteria": staged} if role == "rubricator" else document
    )
    scripted = Scripted(spoil)
    (found,) = judged(scripted, stages=("start", "end=;"))
    assert found.stage_scores[0] == (5 / 7, 0.0)
    assert found.stage_scores[5] == (0.0, 1.0)
    assert '- stage "start"\n- stage "end"' in scripted.prompts("rubricator")[0]


def test_joined_criteria_are_numbered_anew_and_told_once():
    make = lambda text, **more: Criterion(id="c1", category="task", text=text, weight=1, **more)
    found = joined([make("x"), make("y")], [make("y"), make("z"), make("x", stage="s")])
    assert [(c.id, c.text, c.stage) for c in found.criteria] == [
        ("c1", "x", None),
        ("c2", "y", None),
        ("c3", "z", None),
        ("c4", "x", "s"),
    ]


def test_what_a_step_tells():
    (found,) = judged(Scripted())
    (failed,) = judged(Scripted(lambda role, number, document: ""))
    right = [[0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    told = metrics_of([found, failed], right)
    assert told["rubric/reward_mean"] == pytest.approx(sum(WORTH[a] for a in ANSWERS) / 6)
    assert told["rubric/unscored_rollouts"] == 6
    assert told["rubric/problems/empty"] == 3
    assert told["rubric/no_signal_share"] == 0
    assert told["rubric/auc"] == pytest.approx((4 + 3.5) / 8)  # 1 and 5/8 against 5/8, 2/8, 0, 1/8
    row = as_row(found, 3, right[0], has_texts=True)
    assert json.loads(json.dumps(row))["status"] == "scored"
    assert row["answers"] == list(ANSWERS)
    assert as_row(failed, 3, None, has_texts=False)["rubric"] is None


def test_auc_by_hand():
    assert auc([1.0, 0.5], [0.5, 0.0]) == pytest.approx(3.5 / 4)
    assert auc([], [1.0]) != auc([], [1.0])


def test_a_pool_that_cannot_be_judged_leaves_the_other_pools():
    scripted = Scripted(
        lambda role, number, document: (
            ApiRequestError("too long") if role == "verifier" and number == 1 else document
        )
    )
    (found,) = judged(scripted, answers=("a", "b", "c"), answers_per_call=1)
    assert found.scores.count(None) == 1
    assert all(
        score in (None, WORTH[answer]) for score, answer in zip(found.scores, ("a", "b", "c"))
    )
    (none,) = judged(
        Scripted(lambda role, number, document: "no" if role == "verifier" else document),
        answers_per_call=1,
    )
    assert not none.is_scored


def test_a_flaw_that_an_answer_is_free_of_is_told_as_avoided():
    flaw = {**CRITERIA[1], "polarity": "negative"}
    spoil = lambda role, number, document: (
        {"criteria": [CRITERIA[0], flaw]} if role == "rubricator" else document
    )
    (found,) = judged(Scripted(spoil), answers=("a", "b"), polarity="signed")
    assert verdict_text(found, 0).splitlines() == ["- met: has a", "- avoided: has b"]
    assert verdict_text(found, 1).splitlines() == ["- missed: has a", "- not avoided: has b"]
