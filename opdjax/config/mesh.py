"""How devices are used."""

from __future__ import annotations

import dataclasses

from opdjax.config.validation import require_ranges, require_types


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are used."""

    # Copies of the parameters, each with its own rows; -1: as many as there are devices for.
    data: int = -1
    # Devices that shard the parameters, the optimizer state and the rows.
    fsdp: int = 1
    # Devices that shard the attention heads, the MLP and the vocabulary.
    tensor: int = 1
    # Processes of this run, usually one per host, all started with the same command; -1: as many as
    # the cluster says. With more than one, jax.distributed.initialize() connects them: in the
    # environment of a TPU or of Slurm, or by JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID.
    processes: int = 1

    def __post_init__(self):
        require_types(self, "mesh.")
        ranges = dict.fromkeys(("data", "processes"), "-1 (all there are) or at least 1")
        require_ranges(self, "mesh.", ranges | dict.fromkeys(("fsdp", "tensor"), "at least 1"))

    def generator_devices(self, available: int) -> int:
        """The devices, the last of those available, on which a generator thread samples: those that
        the mesh leaves, or the fewest that can if `data` is -1.
        """
        if self.data == -1:
            return self.tensor
        return available - self.data * self.fsdp * self.tensor
