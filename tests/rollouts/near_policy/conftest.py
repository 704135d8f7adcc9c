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


@pytest.fixture(scope="session")
def ahead(tmp_path_factory):
    """Rollouts drawn two updates ahead, filtered and packed."""
    workdir = tmp_path_factory.mktemp("ahead") / "run"
    train(near(LAG | FILTERED, train={"pack_length": 60}), workdir)
    return workdir


@pytest.fixture(scope="session")
def refreshed(tmp_path_factory):
    """Two epochs, rollouts drawn anew before each."""
    workdir = tmp_path_factory.mktemp("refreshed") / "run"
    train(near(REFRESH), workdir)
    return workdir
