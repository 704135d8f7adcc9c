"""The machines that a run can be planned for, by name. Standard library only, so that the launch
scripts can read it too.
"""

import dataclasses
import difflib
import math

from opdjax.config.validation import ConfigError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator or CPU; a chip is one device of JAX."""

    hbm_bytes: int  # usable by a program: less than the nominal size
    peak_flops: float  # FLOP/s, dense bfloat16; of a CPU float32
    hbm_bandwidth: float  # bytes/s
    cores_in_name: int = 1  # TensorCores per chip where Google's names count them: v5p-8, 4 chips
    jax_name: str | None = None  # for compilation without the machine; None: GPUs and CPUs
    accelerator_type: str | None = None  # gcloud's name of the generation
    runtime_version: str | None = None
    note: str = ""  # where the numbers are assumed


# TPUs: peak and bandwidth from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; usable memory from
# the error of libtpu 0.0.42 for a program that does not fit ("exceeds available HBM (15.75G)").
# GPUs: NVIDIA's data sheets of the SXM modules (A100 with 80 GB), and three quarters of the memory
# that the driver reports, which JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
CHIPS = {
    "v4": Chip(round(30.75 * _GIB), 275e12, 1228e9, 2, "v4", "v4", "tpu-ubuntu2204-base"),
    "v5e": Chip(round(15.75 * _GIB), 197e12, 819e9, 1, "v5e", "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": Chip(round(95.74 * _GIB), 459e12, 2765e9, 2, "v5", "v5p", "v2-alpha-tpuv5"),
    "v6e": Chip(round(31.25 * _GIB), 918e12, 1638e9, 1, "v6e", "v6e", "v2-alpha-tpuv6e"),
    "a100": Chip(round(0.75 * 79.1 * _GIB), 312e12, 2039e9),
    "h100": Chip(round(0.75 * 79.1 * _GIB), 989e12, 3350e9),
    "h200": Chip(round(0.75 * 139.7 * _GIB), 989e12, 4800e9),
    # Eight cores at 2 GHz with 32 float32 operations a cycle each; two channels of DDR4-3200.
    "cpu": Chip(16 * _GIB, 512e9, 51.2e9, note="a generic machine of 8 cores, assumed rates"),
}
# Shapes of slices, and the shape of one host's chips where it is not 2x2x1.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))
_HOST = {(1, 1): (1, 1, 1), (2, 4): (2, 4, 1)}
_SHAPES = {"v4": _DEEP, "v5p": _DEEP, "v5e": _FLAT, "v6e": _FLAT}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of chips of one kind, and their arrangement."""

    name: str
    chip: Chip
    chips: int
    chips_per_host: int
    shape: tuple[int, ...] | None = None  # of a TPU slice; None: GPUs or a CPU
    host_shape: tuple[int, int, int] | None = None

    @property
    def hosts(self) -> int:
        """Number of machines, each of which runs one process."""
        return self.chips // self.chips_per_host

    @property
    def backend(self) -> str:
        """JAX's name of the kind of device."""
        if self.shape is not None:
            return "tpu"
        return "cpu" if self.name == "cpu" else "gpu"

    @property
    def jax_name(self) -> str | None:
        """Name in `jax.experimental.topologies`, such as v5e:2x4; None for GPUs and CPUs."""
        shape = self.shape and "x".join(map(str, self.shape))
        return shape and f"{self.chip.jax_name}:{shape}"

    @property
    def accelerator_type(self) -> str | None:
        """gcloud's name, such as v5litepod-8; None for GPUs and CPUs."""
        if self.shape is None:
            return None
        return f"{self.chip.accelerator_type}-{self.chips * self.chip.cores_in_name}"


def _topologies() -> dict[str, Topology]:
    found = [Topology("cpu", CHIPS["cpu"], 1, 1)]
    for kind, shapes in _SHAPES.items():
        for shape in shapes:
            chips, host = math.prod(shape), _HOST.get(shape, (2, 2, 1))
            name = f"{kind}-{chips * CHIPS[kind].cores_in_name}"
            found.append(Topology(name, CHIPS[kind], chips, math.prod(host), shape, host))
    for kind in ("a100", "h100", "h200"):
        counts = (1, 2, 4, 8, 16, 32, 64)
        found += [Topology(f"{kind}-{n}", CHIPS[kind], n, min(n, 8)) for n in counts]
    return {topology.name: topology for topology in found}


TOPOLOGIES = _topologies()


def topology(name: str) -> Topology:
    """The topology of that name; ConfigError, which lists the nearest names, if there is none."""
    if name in TOPOLOGIES:
        return TOPOLOGIES[name]
    kind = name.rpartition("-")[0]
    near = [known for known in TOPOLOGIES if known.startswith(f"{kind}-")]
    near = near or difflib.get_close_matches(name, TOPOLOGIES, n=5) or TOPOLOGIES
    hint = "KIND-CHIPS"
    if kind in ("v4", "v5p"):
        hint = "the number in v4 and v5p names counts TensorCores, two per chip, as Google's does"
    raise ConfigError(f"there is no topology {name!r}; expected one of {', '.join(near)} ({hint})")
