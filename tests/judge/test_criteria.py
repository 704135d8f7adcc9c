"""Criteria that outlive a step."""

from test_verifier import Scripted, judged

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.criteria import CriteriaStore


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
