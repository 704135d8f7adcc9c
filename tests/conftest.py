"""Eight simulated devices, a persistent compilation cache, and the small models that many tests
share.
"""

import os
import pathlib

import jax
import numpy as np
import pytest
from judge_server import serving

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of what these tests do; they check results, not speed.
jax.config.update("jax_disable_most_optimizations", True)
CACHE = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module", autouse=True)
def programs_of_this_file_alone():
    """What other files compiled is let go: it would fill the memory, and push out programs that a
    test counts.
    """
    jax.clear_caches()


@pytest.fixture
def x64():
    """Run the test in float64: enumeration tests compare to 1e-10."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def start_judge():
    """`with start_judge("--faults", 0.3) as base_url`: the rule-based judge over HTTP."""
    return serving


@pytest.fixture(scope="session")
def judge_server():
    """The base_url of a rule-based judge that never fails."""
    with serving() as base_url:
        yield base_url
