"""How devices are used."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are used."""

    data: int = (
        -1
    )  # copies of the parameters, each with rows of its own; -1: as many as there are devices for
    fsdp: int = 1  # devices that parameters and optimizer state are split over, and rows as well
    tensor: int = (
        1  # devices that the heads, the MLP and the vocabulary of each layer are split over
    )
    # Processes of this run, usually one a host, all started with the same command. More than 1, or
    # -1 for as many as the cluster says: they find each other by jax.distributed.initialize(), in
    # the TPU's or Slurm's environment, or by JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID.
    processes: int = 1

    def __post_init__(self):
        require_types(self, "mesh.")
        for name, least in (("data", -1), ("fsdp", 1), ("tensor", 1), ("processes", -1)):
            value, expected = (
                getattr(self, name),
                "at least 1" if least == 1 else "-1 (all there are) or at least 1",
            )
            require(value >= 1 or value == least, f"mesh.{name}", value, expected)
