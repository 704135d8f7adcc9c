"""Compiling for an absent slice: needs libtpu, no TPU."""

import importlib.util

import pytest

from opdjax.config import ModelConfig, TrainConfig
from opdjax.config.topology import topology
from opdjax.diagnose.plan.aot import NoCompilerError, compile_programs, describe
from opdjax.diagnose.plan.estimate import estimate

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_the_error_says_what_to_install():
    with pytest.raises(
        NoCompilerError, match=r"install libtpu for this jax: pip install 'jax\[tpu\]=="
    ):
        describe(topology("v5e-8"))


def test_a_cpu_is_described_by_this_machine():
    (device, *_) = describe(topology("cpu"))
    assert device.platform == "cpu"


@pytest.mark.long
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: pip install 'jax[tpu]'")
def test_a_small_run_compiles_for_v5e(run_of, model):
    """The model is so wide that the padding of a TPU hardly matters."""
    wide = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    wide["num_hidden_layers"] = 6
    models = {
        role: ModelConfig(model(f"wide {role}", vocab_size=2048, **wide))
        for role in ("student", "teacher")
    }
    train = TrainConfig(prompts_per_step=8, remat="layer")  # as in runs that need a slice
    workload = run_of("v5e-8", fsdp=8, train=train, **models)
    plan = estimate(workload)
    programs = {program.name: program for program in compile_programs(workload)}
    assert set(programs) == {"prefill", "sample", "teacher", "update"}
    update = programs["update"]
    counted = sum(item.num_bytes for item in plan.items if "loss" in (item.received_by or ()))
    assert counted <= update.argument_bytes <= 1.01 * counted
    assert 0.85 < plan.program_bytes("update") / update.peak_bytes < 1.15
    assert update.most_logit_rows <= 8
    assert any(each.kind == "all-gather" and each.loop for each in update.collectives)
