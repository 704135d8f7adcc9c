"""A sweep as workloads of xpk on a GKE cluster, whose queue schedules them. The package is in an
image made by tpu/Dockerfile.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from opdjax.config.validation import ConfigError, require
from opdjax.sweeps.fleet.shards import Fleet, SweepShard, require_program, submit_all

_ONE_HOST = ("v4-8", "v5p-8", "v6e-1", "v6e-4")  # slices for which xpk 1.16 uses one host
# Exit status of opdjax that Kubernetes would not restart by default.
_USER_ERROR = 2


def launch(fleet: Fleet, log: Callable[[str], None], *, is_dry: bool) -> int:
    """Create the workloads and return their number; a dry run only prints the commands."""
    commands = [(shard.name, command(shard, fleet)) for shard in fleet.shards]
    if is_dry:
        log("\n".join(shlex.join(words) for _, words in commands))
        return 0
    require_program("xpk", "xpk")
    return submit_all(commands, set(), log)


def command(shard: SweepShard, fleet: Fleet) -> list[str]:
    """The command that creates the workload of a shard; ConfigError if xpk could not run it."""
    config, machine = fleet.config, fleet.machine
    expected = f"one of {', '.join(_ONE_HOST)}, for which xpk uses one host, or --launch skypilot"
    require(machine.name in _ONE_HOST, "fleet.topology", machine.name, expected)
    expected = "the name of a cluster with --launch xpk"
    require(config.cluster, "fleet.cluster", config.cluster, expected)
    expected = "the name of the image built from tpu/Dockerfile with --launch xpk"
    require(config.image, "fleet.image", config.image, expected)
    if fleet.secrets:
        raise ConfigError(
            f"the points need {', '.join(fleet.secrets)}, and xpk would write keys into its "
            "manifests; use --launch skypilot"
        )
    optional = {"--zone": config.zone, "--project": config.project}
    return [
        *("xpk", "workload", "create", "--cluster", config.cluster, "--workload", shard.name),
        *("--tpu-type", str(machine.accelerator_type), "--docker-image", config.image),
        *("--command", shard.command),
        *("--max-restarts", str(config.max_restarts), "--restart-on-exit-codes", str(_USER_ERROR)),
        *(word for flag, value in optional.items() if value for word in (flag, value)),
        *(("--spot",) if config.spot else ()),
    ]
