"""Criteria that outlive a step."""

import json

import pytest
from test_verifier import Scripted, judged

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.criteria import FROZEN, CriteriaStore
from opdjax.runs.workdir import WorkdirError


def test_criteria_that_no_rollout_was_held_to_are_not_kept(tmp_path):
    def references_alone(role, number, document):
        if role == "verifier":
            rows = document["answers"]
            document["answers"] = [r if all(r["verdicts"]) else r | {"verdicts": []} for r in rows]
        return document

    (found,) = judged(Scripted(references_alone), answers=("a", "b"), refresh="evolving")
    assert found.reference_scores[0] == 1
    assert not found.is_scored
    store = CriteriaStore(RubricsConfig(refresh="evolving"), tmp_path)
    assert store.update(found) is None
    assert store.with_existing(found.group).existing == ()


RIGHT = {"id": "c1", "category": "task", "text": "States it.", "weight": 1}


@pytest.mark.parametrize(
    ("rubric", "told"),
    [
        ([RIGHT, RIGHT | {"weight": 9}], "weight: Input should be less than or equal to 5"),
        ([{"id": "c1"}], "category: Field required"),
        ([7], r"\[7\]; expected criteria"),
        ("x", '`rubric` is "x"; expected a list'),
    ],
)
@pytest.mark.parametrize("name", [FROZEN, "rubrics.jsonl"])
def test_a_stored_rubric_that_is_none_is_named(tmp_path, name, rubric, told):
    rows = [{"prompt_id": n, "rubric": found} for n, found in enumerate(([RIGHT], rubric))]
    more = {} if name == FROZEN else {"kept": ["c1"]}
    (tmp_path / name).write_text("".join(f"{json.dumps(row | more)}\n" for row in rows))
    refresh = "frozen" if name == FROZEN else "evolving"
    with pytest.raises(WorkdirError, match=f"{name}, line 2 is damaged: {told}") as found:
        CriteriaStore(RubricsConfig(refresh=refresh), tmp_path).restore(tmp_path / "rubrics.jsonl")
    assert "\n" not in str(found.value)
