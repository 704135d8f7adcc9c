"""A run that trains adapters: it samples what it trains, keeps nothing else, resumes bit for bit
and exports both forms.
"""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_pair import mesh_config
from safetensors.numpy import load_file
from tiny_runs import (
    TINY,
    assert_close_run,
    assert_equal_trees,
    assert_same_run,
    column,
    final_weights,
    interrupted_at,
    recorded_updates,
    vary,
    without_times,
)

from opdjax.cli.export import export_step
from opdjax.config import MINI_PAIR, LoraConfig, MeshConfig, ModelConfig, SamplingConfig
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.models.lora import combine
from opdjax.rollouts.export import export_student
from opdjax.rollouts.setup import prepare
from opdjax.rollouts.weights import load_student
from opdjax.train import train

LORA = dataclasses.replace(
    vary(
        train={"num_steps": 3},
        evaluation={"source": None},
        checkpoint={"every": 1},
        optimizer={"learning_rate": 2e-2, "warmup_steps": 0},
    ),
    lora=LoraConfig(rank=4, alpha=8.0, targets=("q", "v", "down")),
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(work directory of an undisturbed run, how often its update was compiled)."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    with recorded_updates() as updates:
        train(LORA, workdir)
    return workdir, updates[0]._cache_size()


def test_the_sampler_writes_from_what_is_trained(straight):
    workdir, num_compiled = straight
    # The adapters stay unmerged in sampler and update.
    assert max(column(workdir, "rollout/logprob_gap")) < 1e-5
    kl = column(workdir, "kl/student_teacher")
    assert kl[0] != kl[2]
    assert num_compiled == 1


def test_the_exports_are_the_base_and_what_was_learned(straight):
    workdir, _ = straight
    found, base = final_weights(workdir), load_params(open_checkpoint(LORA.student.path), "float32")
    adapter = load_file(workdir / "student_adapter" / "adapter_model.safetensors")
    moved = [
        name
        for name, leaf in found["layers"].items()
        if not jnp.array_equal(leaf, base["layers"][name])
    ]
    assert sorted(moved) == ["down_kernel", "q_kernel", "v_kernel"]
    np.testing.assert_array_equal(found["embedding"], base["embedding"])
    module = "base_model.model.model.layers.2.mlp.down_proj.lora_{}.weight"
    delta = 2.0 * adapter[module.format("B")] @ adapter[module.format("A")]
    np.testing.assert_allclose(
        found["layers"]["down_kernel"][2], base["layers"]["down_kernel"][2] + delta, atol=1e-6
    )
    assert np.abs(delta).max() > 1e-3
    config = json.loads((workdir / "student_adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(MINI_PAIR / "student")


def test_checkpoints_hold_adapters_alone_and_any_of_them_is_exported(straight, tmp_path):
    workdir, _ = straight
    stored = json.loads((workdir / "checkpoints" / "3" / "default" / "_METADATA").read_text())[
        "tree_metadata"
    ]
    names = {name for name in stored if "'params'" in name}
    assert len(names) == 6
    assert all("_lora_" in name for name in names)
    out = export_step(workdir, "latest", tmp_path / "out", None)
    assert_equal_trees(load_params(open_checkpoint(out), "float32"), final_weights(workdir))
    for directory in (workdir / "student_adapter", tmp_path / "out_adapter"):
        adapter = load_file(directory / "adapter_model.safetensors")
        assert adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (
            4,
            96,
        )


@pytest.mark.long
def test_an_interrupted_run_ends_like_an_undisturbed_one(straight, tmp_path):
    with interrupted_at(2):
        train(LORA, tmp_path / "run")
    train(LORA, tmp_path / "run")
    assert_same_run(straight[0], tmp_path / "run")
    name = "student_adapter/adapter_model.safetensors"
    assert (straight[0] / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.long
def test_a_run_continues_the_adapter_of_its_student(straight, tmp_path):
    """It starts from the stored matrices, not from their merged product, and exports them again as
    an adapter of the same base.
    """
    workdir, _ = straight
    source = dataclasses.replace(LORA, student=ModelConfig(str(workdir / "student_adapter")))
    adapters, frozen = load_student(prepare(source))
    stored = load_file(workdir / "student_adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    np.testing.assert_array_equal(adapters["layers"]["v_lora_a"][1], stored[name])
    assert_equal_trees(frozen, load_params(open_checkpoint(LORA.student.path), "float32"))
    config = vary(source, train={"num_steps": 1})
    train(config, tmp_path / "run")
    written = tmp_path / "run" / "student_adapter"
    base = json.loads((written / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(MINI_PAIR / "student")
    assert np.abs(load_file(written / "adapter_model.safetensors")[name] - stored[name]).max() > 0
    merged = load_params(open_checkpoint(written), "float32")
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-6), merged, final_weights(written.parent)
    )
    out = export_step(tmp_path / "run", "latest", tmp_path / "out", None)
    assert_equal_trees(load_params(open_checkpoint(out), "float32"), final_weights(written.parent))


@pytest.mark.parametrize(
    "lora", [LoraConfig(), pytest.param(LoraConfig(rank=2), marks=pytest.mark.long)]
)
def test_an_adapter_is_merged_where_lora_is_set_otherwise(lora, straight, tmp_path, capsys):
    workdir, _ = straight
    config = dataclasses.replace(
        LORA, student=ModelConfig(str(workdir / "student_adapter")), lora=lora
    )
    setup = prepare(config)
    trained, frozen = load_student(setup)
    assert "is merged into its base: lora is set otherwise" in capsys.readouterr().out
    found = trained if frozen is None else frozen
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, final_weights(workdir))
    weights = combine(frozen, trained)
    export_student(weights, setup.student, config, workdir, tmp_path / "out", "float32", 0)
    assert not (tmp_path / "out_adapter").exists()


@pytest.mark.long
def test_adapters_on_a_mesh_are_those_of_one_device(pair, tmp_path):
    """Adapters split as their kernels are; the sampler is sent a base without `fsdp`."""
    sampling = SamplingConfig(max_completion_length=12)
    for mesh in (MeshConfig(1), MeshConfig(2, 2, 2)):
        config = mesh_config(pair, mesh, lora=LoraConfig(rank=3), sampling=sampling)
        train(config, tmp_path / str(mesh.tensor))
    assert_close_run(tmp_path / "2", tmp_path / "1")
    one, eight = (
        load_file(tmp_path / name / "student_adapter" / "adapter_model.safetensors")
        for name in ("1", "2")
    )
    for name, matrix in one.items():
        np.testing.assert_allclose(eight[name], matrix, atol=1e-5, err_msg=name)


@pytest.mark.long
def test_a_student_with_adapters_is_its_own_teacher_adapters_included(tmp_path):
    shown = {"teacher_prompt_format": "{reference}\n{prompt}", "max_prompt_length": 64}
    config = dataclasses.replace(
        LORA,
        data=dataclasses.replace(TINY.data, **shown),
        estimator=dataclasses.replace(TINY.estimator, recipe="full_kl"),
    )
    rows = {}
    for teacher in ("@student", "@mini_student"):
        train(dataclasses.replace(config, teacher=ModelConfig(teacher)), tmp_path / teacher)
        rows[teacher] = without_times(tmp_path / teacher)
    assert rows["@student"][0] == rows["@mini_student"][0]
    assert rows["@student"][1]["kl/k1"] != rows["@mini_student"][1]["kl/k1"]
