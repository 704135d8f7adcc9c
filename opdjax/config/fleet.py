"""Settings of a sweep on machines of an external scheduler."""

from typing import Annotated

from opdjax.config.validation import Section


class FleetConfig(Section):
    """The machines on which the shards of a sweep run."""

    # Machine of each shard: one host, such as v5e-8 or h100-8; python3 tpu/topology.py lists them.
    topology: str = ""
    # Number of jobs to submit, each with an equal share of the points.
    shards: Annotated[int, "at least 1"] = 1
    spot: bool = False  # Use spot machines; a preempted job continues on another machine.
    # Restarts of a shard after an error.
    max_restarts: Annotated[int, "0 or more"] = 3
    zone: str = ""  # Empty: skypilot finds one; xpk uses gcloud's default.
    project: str = ""  # Of xpk; empty: gcloud's default.
    cluster: str = ""  # GKE cluster of xpk, made by xpk cluster create.
    # Image of xpk, built from tpu/Dockerfile: us-docker.pkg.dev/PROJECT/REPOSITORY/opdjax.
    image: str = ""
