"""The machines by name."""

import math
import subprocess
import sys

import pytest

from opdjax.config.topology import TOPOLOGIES, topology


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "jax_name", "accelerator_type"),
    [
        ("v5e-1", 1, 1, "v5e:1x1", "v5litepod-1"),
        ("v5e-8", 8, 1, "v5e:2x4", "v5litepod-8"),
        ("v6e-16", 16, 4, "v6e:4x4", "v6e-16"),
        ("v5p-8", 4, 1, "v5:2x2x1", "v5p-8"),  # counted in cores
        ("v4-32", 16, 4, "v4:2x2x4", "v4-32"),
        ("h100-8", 8, 1, None, None),
        ("h200-16", 16, 2, None, None),
        ("cpu", 1, 1, None, None),
    ],
)
def test_names_as_google_and_jax_have_them(name, chips, hosts, jax_name, accelerator_type):
    found = topology(name)
    assert (found.chips, found.hosts, found.jax_name, found.accelerator_type) == (
        chips,
        hosts,
        jax_name,
        accelerator_type,
    )


def test_backends_as_jax_names_them():
    names = ("v5e-8", "h100-8", "cpu")
    assert [topology(name).backend for name in names] == ["tpu", "gpu", "cpu"]


def test_every_slice_divides_into_hosts():
    for found in TOPOLOGIES.values():
        assert found.chips % found.chips_per_host == 0
        if found.shape is not None:
            assert math.prod(found.shape) == found.chips
            assert math.prod(found.host_shape) == found.chips_per_host


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v6e-9", "expected one of v6e-1, v6e-4, v6e-8"),
        ("v5p-4", "expected one of v5p-8.*counts TensorCores"),
        ("v5-8", "v5e-8"),
        ("cpu-1", "cpu"),
    ],
)
def test_an_unknown_name_lists_those_that_are_near(name, message):
    with pytest.raises(ValueError, match=f"there is no topology '{name}'; .*{message}"):
        topology(name)


def test_the_scripts_can_ask_without_anything_installed():
    code = (
        "import sys, opdjax.config.topology, opdjax.diagnose.plan.hlo; assert not {'jax', 'numpy', "
        "'tyro'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
