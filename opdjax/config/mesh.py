"""How devices are used."""

import dataclasses
from typing import Annotated

from opdjax.config.validation import Section


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """How devices are used."""

    # Copies of the parameters, each with its own rows; -1: as many as there are devices for.
    data: Annotated[int, "-1 (all there are) or at least 1"] = -1
    # Devices that shard the parameters, the optimizer state and the rows.
    fsdp: Annotated[int, "at least 1"] = 1
    # Devices that shard the attention heads, the MLP and the vocabulary.
    tensor: Annotated[int, "at least 1"] = 1
    # Processes of this run, usually one per host, all started with the same command; -1: as many as
    # the cluster says. With more than one, jax.distributed.initialize() connects them: in the
    # environment of a TPU or of Slurm, or by JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID.
    processes: Annotated[int, "-1 (all there are) or at least 1"] = 1

    def generator_devices(self, available: int) -> int:
        """The devices, the last of those available, on which a generator thread samples: those that
        the mesh leaves, or the fewest that can if `data` is -1.
        """
        if self.data == -1:
            return self.tensor
        return available - self.data * self.fsdp * self.tensor
