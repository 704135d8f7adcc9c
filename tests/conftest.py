"""Simulated devices, a persistent compilation cache, and the judge that many tests share."""

import collections
import ctypes
import fcntl
import gc
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from jax._src import pjit
from jax._src.interpreters import pxla
from judge_server import serving

ROOT = pathlib.Path(__file__).parents[1]
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))

# Processes that tests start inherit all of this through the environment, except the eight devices.
# Compiling takes most of the time of these tests, and they check results, not speed.
for name, value in {
    "jax_platforms": "cpu",
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": CACHE,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
jax.config.update("jax_num_cpu_devices", 8)
# gcsfs reads this when it is imported. With it on, it asks for the kind of every bucket by gRPC,
# which the fake server does not speak, and tries for a minute each time.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
# Without the fusion emitters the CPU backend compiles three times as fast, and a program compiled
# in one part takes a tenth less CPU time. An unknown flag would end the process, so newer versions
# of jax, which may have dropped these, do without them.
if jax.__version_info__ < (0, 11):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
# Tracing makes millions of objects that live on: collecting as often as by default slows
# these tests.
gc.set_threshold(100_000, 50, 50)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items):
    """Files with many tests first, but the tutorial, which takes minutes, before them: so that no
    process works long after the other.
    """
    sizes = collections.Counter(item.path for item in items)
    first = lambda item: (item.path.name != "test_tutorial.py", -sizes[item.path])
    items.sort(key=first)


_MEMORY = 1.5e9  # bytes of a process above which all its compiled programs are dropped


@pytest.fixture(autouse=True)
def lowered_modules():
    """Drop the modules that programs were lowered from, which jax keeps: 1 to 10 MB each. The
    compiled programs stay.
    """
    yield
    for module, name in ((pxla, "_cached_lowering_to_hlo"), (pjit, "_pjit_lower")):
        if hasattr(module, name):  # private: another version of jax may not have it
            getattr(module, name).cache_clear()


@pytest.fixture(scope="module", autouse=True)
def own_programs(request):
    """Drop the programs of a file's own functions after its last test, and all programs if the
    process holds much memory: with thousands of them XLA's compiler ends the process.
    """
    yield
    for value in vars(request.module).values():
        if getattr(value, "__module__", "") == request.module.__name__:
            getattr(value, "clear_cache", int)()
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MEMORY:
        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what was freed would count again after the next file


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


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: the directory that `make(directory)` fills, made by one of the processes
    of the session and read by all.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers' common one

    def made(name, make):
        directory, mark = root / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not mark.exists():
                shutil.rmtree(directory, ignore_errors=True)  # of a process that failed
                make(directory)
                mark.touch()
        return directory

    return made


@pytest.fixture(scope="module")
def shared_programs():
    """Runs of this file that have equal settings share what the first of them traced."""
    from tiny_runs import shared_programs

    with shared_programs():
        yield


@pytest.fixture(scope="session")
def tiny(once):
    """(work directory of TINY, which nothing disturbed; the programs of each update it made)."""
    from tiny_runs import TINY, recorded_updates

    from opdjax.train import train

    def run(directory):
        with recorded_updates() as updates:
            train(TINY, directory / "run")
        counts = [update._cache_size() for update in updates]
        (directory / "programs.json").write_text(json.dumps(counts))

    directory = once("tiny", run)
    return directory / "run", json.loads((directory / "programs.json").read_text())


@pytest.fixture(scope="session")
def tiny_run(tiny):
    """Work directory of TINY, which nothing disturbed."""
    return tiny[0]


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Directory of a pair of models that every mesh of eight devices divides."""
    from mesh_pair import make_pair

    directory = tmp_path_factory.mktemp("pair")
    make_pair(directory)
    return directory


@pytest.fixture
def gcs(monkeypatch, tmp_path):
    """A server at which this process and its children find gs://; their scratch is in tmp_path."""
    import fsspec
    import gcsfs
    from fake_gcs import FakeGcs

    from opdjax.runs import object_store

    with FakeGcs() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OPDJAX_SCRATCH", str(tmp_path / "scratch"))
        fsspec.config.set_conf_env(fsspec.config.conf)
        object_store._file_systems.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield server
        object_store._file_systems.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()
