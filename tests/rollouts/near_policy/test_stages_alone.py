"""The stages run before a run store what the run itself would have stored."""

import pytest
from near_runs import REFRESH, assert_same_steps, near, shard_names

from opdjax.rollouts.checks import check_settings
from opdjax.rollouts.near_policy import shards
from opdjax.rollouts.near_policy.generator_process import annotate_all, generate_for
from opdjax.rollouts.setup import prepare
from opdjax.runs.workdir import WorkdirError
from opdjax.train import train


def test_drawn_and_annotated_ahead_of_the_run(refreshed, tmp_path):
    workdir, first = tmp_path / "run", shards.version_directory(tmp_path / "run", 0)
    assert generate_for(workdir, near(REFRESH)) == len(shards.shard_paths(first, "samples"))
    wanted = [path for path in shard_names(refreshed) if "/00000000/" in path]
    assert shard_names(workdir) == wanted
    shards.shard_paths(first, "annotations")[0].unlink()
    assert annotate_all(workdir) == 1
    assert annotate_all(workdir) == 0
    assert shard_names(workdir) == wanted
    train(near(REFRESH), workdir)
    assert_same_steps(workdir, refreshed)


def test_what_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(
        WorkdirError,
        match=r"has no config.json; start the run first \(opdjax train\), or give the EXPERIMENT",
    ):
        generate_for(tmp_path, None)


@pytest.mark.parametrize(("importance", "is_warned"), [(None, True), ("token_truncate", False)])
def test_a_policy_gradient_on_old_rollouts_is_warned_of(importance, is_warned):
    config = near(
        {"schedule": "continuous", "max_staleness": 2},
        estimator={"recipe": "opd", "importance": importance},
    )
    found = [finding for finding in check_settings(prepare(config)) if finding.name == "staleness"]
    assert [finding.status for finding in found] == ["warning"] * is_warned
