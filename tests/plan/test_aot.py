"""Compiling for a slice that is not here: needs libtpu, no TPU."""

import importlib.util

import pytest

from opdjax.plan.aot import NoCompilerError, compile_programs, describe
from opdjax.plan.arithmetic import foresee
from opdjax.plan.topology import topology

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_it_is_said_what_to_install():
    with pytest.raises(NoCompilerError, match=r"install libtpu beside the same jax: pip install 'jax\[tpu\]=="):
        describe(topology("v5e-8"))


@pytest.mark.long
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: pip install 'jax[tpu]'")
def test_a_tiny_run_compiles_for_v5e(run_of):
    workload = run_of("v5e-8", micro=1, fsdp=8)
    programs = {program.name: program for program in compile_programs(workload)}
    assert set(programs) == {"prefill", "sample", "teacher", "update"}
    update = programs["update"]
    counted = sum(
        item.num_bytes for item in foresee(workload).items if "loss" in item.phases and "loss" not in item.outside and item.is_argument
    )
    assert counted <= update.argument_bytes <= counted + 64  # the counters
    assert update.most_logit_rows <= 8
    assert any(each.kind == "all-gather" for each in update.collectives)
