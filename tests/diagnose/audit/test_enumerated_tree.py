"""The audit's tree: exact estimators have no bias, the others have one."""

import pytest

from opdjax.diagnose.audit.tree import PREFIXES, SEQUENCES, audit_tree


def test_the_tree_holds_every_sequence():
    assert len(PREFIXES) == 7
    assert len(SEQUENCES) == 15


@pytest.mark.long
def test_which_cases_are_unbiased():
    rows = {row["title"]: row for row in audit_tree()["rows"]}
    for title in (
        "token-level credit",
        "baseline full",
        "exact KL",
        "two rows, baseline batch_mean",
        "stale, prefix ratio, no cap",
    ):
        assert rows[title]["frozen"] < 1e-10, title
        assert rows[title]["sequence"] > 0.1, title
    for title in (
        "sampled reward to go",
        "reward to go, -KL for later rewards",
        "the same with baseline full",
    ):
        assert rows[title]["sequence"] < 1e-10, title
    assert (
        rows["reward to go, -KL for later rewards"]["variance"]
        < rows["sampled reward to go"]["variance"]
    )
    assert rows["two rows, fixed_denominator, baseline full"]["baseline"] < 1e-10
    assert rows["two rows, sequence_mean_token_sum, baseline full"]["baseline"] < 1e-10
    for kind in ("token_mean", "sequence_mean_token_mean"):
        assert 0.01 < rows[f"two rows, {kind}, baseline full"]["baseline"] < 0.5, kind
    for title in (
        "stale, no correction",
        "stale, token_truncate 1.2",
        "stale, token_mask 0.5 to 1.2",
        "stale, prefix_truncate 2",
    ):
        assert rows[title]["frozen"] > 0.01, title
    assert rows["stale, exact KL, prefix ratio, no cap"]["frozen"] < 1e-10
    assert rows["stale, no correction"]["baseline"] is None
