"""How a sweep is spread over machines that others schedule. Standard library only."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """The machines that shards of a sweep are submitted to."""

    # of each shard's machine, such as v5e-8 or h100-8, of one host; python3 tpu/topology.py lists
    # the slices
    topology: str = ""
    shards: int = 1  # jobs that are submitted, each with its share of the points
    spot: bool = (
        False  # machines that may be taken away at any minute; the job then goes on elsewhere
    )
    max_restarts: int = 3  # of a shard that ended with an error
    zone: str = ""  # empty: skypilot looks for one; xpk takes gcloud's default
    project: str = ""  # xpk: empty: gcloud's default
    cluster: str = ""  # xpk: of GKE, made by xpk cluster create
    # xpk: what tpu/Dockerfile was built to, such as us-docker.pkg.dev/PROJECT/REPOSITORY/opdjax
    image: str = ""

    def __post_init__(self):
        require_types(self, "fleet.")
        require(self.shards > 0, "fleet.shards", self.shards, "at least 1")
        require(self.max_restarts >= 0, "fleet.max_restarts", self.max_restarts, "0 or more")
