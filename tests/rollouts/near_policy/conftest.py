"""Runs that nobody disturbed, which others must equal."""

import pytest
from near_runs import FILTERED, LAG, REFRESH, near

from opdjax.train import train


@pytest.fixture(scope="session", autouse=True)
def small_shards():
    """Two shards an epoch; generators in processes of their own store one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opdjax.rollouts.near_policy.store.SHARD_SIZE", 16)
        yield


@pytest.fixture(scope="module", autouse=True)
def _shared(shared_programs):
    """The runs of a file share what they trace."""


@pytest.fixture(scope="session")
def ahead(once):
    """Rollouts drawn two updates ahead, filtered and packed."""
    config = near(LAG | FILTERED, train={"pack_length": 60})
    return once("ahead", lambda directory: train(config, directory / "run")) / "run"


@pytest.fixture(scope="session")
def refreshed(once):
    """Two epochs, rollouts drawn anew before each."""
    return once("refreshed", lambda directory: train(near(REFRESH), directory / "run")) / "run"
