"""A sweep as workloads of xpk on a GKE cluster, whose queue schedules them; the package is in an
image (tpu/Dockerfile).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from opdjax.config.validation import ConfigError
from opdjax.sweeps.fleet.shards import Fleet, SweepShard, require_program, submit_all

_ONE_HOST = ("v4-8", "v5p-8", "v6e-1", "v6e-4")  # the slices that xpk (1.16) makes of one host
# with which opdjax ends; Kubernetes restarts it no more than the other low ones unless it is told
_USER_ERROR = 2


def launch(fleet: Fleet, say: Callable[[str], None], *, is_dry: bool) -> int:
    """Create the workloads, or, dry, print the commands; how many were created. A name that is
    taken is refused by the cluster.
    """
    made = [(shard.name, command(shard, fleet)) for shard in fleet.shards]
    if is_dry:
        say("\n".join(shlex.join(words) for _, words in made))
        return 0
    require_program("xpk", "xpk")
    return submit_all(made, set(), say)


def command(shard: SweepShard, fleet: Fleet) -> list[str]:
    """What creates the workload of a shard; ConfigError where xpk could not."""
    config, machine = fleet.config, fleet.machine
    if machine.backend != "tpu":
        raise ConfigError(
            f"fleet.topology is {machine.name}; expected a TPU slice where --launch is xpk, or --launch skypilot"
        )
    if machine.name not in _ONE_HOST:
        raise ConfigError(
            f"fleet.topology is {machine.name}, which xpk makes of several hosts of four chips, or not at all; expected one of "
            f"{', '.join(_ONE_HOST)}: a point of a sweep is one process"
        )
    for name, what in (
        ("cluster", "the name of a cluster"),
        ("image", "the image that tpu/Dockerfile was built to"),
    ):
        if not getattr(config, name):
            raise ConfigError(f"fleet.{name} is empty; expected {what} where --launch is xpk")
    if fleet.secrets:
        raise ConfigError(
            f"the points need {', '.join(fleet.secrets)}, and xpk would write keys into its manifests; use --launch skypilot"
        )
    optional = {"--zone": config.zone, "--project": config.project}
    return [
        *("xpk", "workload", "create", "--cluster", config.cluster, "--workload", shard.name),
        *(
            "--tpu-type",
            str(machine.accelerator_type),
            "--docker-image",
            config.image,
            "--command",
            shard.command,
        ),
        *("--max-restarts", str(config.max_restarts), "--restart-on-exit-codes", str(_USER_ERROR)),
        *(word for flag, value in optional.items() if value for word in (flag, value)),
        *(("--spot",) if config.spot else ()),
    ]
