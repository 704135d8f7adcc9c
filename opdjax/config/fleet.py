"""Settings of a sweep on machines of an external scheduler. Standard library only."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """The machines on which the shards of a sweep run."""

    # machine of each shard: one host, such as v5e-8 or h100-8; python3 tpu/topology.py lists them
    topology: str = ""
    shards: int = 1  # number of jobs to submit, each with an equal share of the points
    spot: bool = False  # use spot machines; a preempted job continues on another machine
    max_restarts: int = 3  # restarts of a shard after an error
    zone: str = ""  # empty: skypilot finds one; xpk uses gcloud's default
    project: str = ""  # of xpk; empty: gcloud's default
    cluster: str = ""  # GKE cluster of xpk, made by xpk cluster create
    # image of xpk, built from tpu/Dockerfile: us-docker.pkg.dev/PROJECT/REPOSITORY/opdjax
    image: str = ""

    def __post_init__(self):
        require_types(self, "fleet.")
        require(self.shards > 0, "fleet.shards", self.shards, "at least 1")
        require(self.max_restarts >= 0, "fleet.max_restarts", self.max_restarts, "0 or more")
