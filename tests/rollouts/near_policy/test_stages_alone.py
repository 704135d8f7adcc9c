"""What stages that are run before a run, and the check of its settings, ask for."""

import pytest
from near_runs import near

from opdjax.rollouts.checks import check_settings
from opdjax.rollouts.near_policy.generator_process import generate_for
from opdjax.rollouts.setup import prepare
from opdjax.runs.workdir import WorkdirError


def test_what_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(
        WorkdirError,
        match="has no config.json; expected the work directory of a run",
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
