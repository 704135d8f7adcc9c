"""What a workload is read from, and what is refused."""

import dataclasses
import pathlib

import huggingface_hub
import jax
import pytest

from opdjax.config import (
    Config,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    NearPolicyConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.topology import topology
from opdjax.config.validation import ConfigError
from opdjax.diagnose.plan.estimate import estimate
from opdjax.diagnose.plan.table import text
from opdjax.diagnose.plan.workload import read_workload
from opdjax.models.hf import CheckpointError, load_params, open_checkpoint


def test_a_teacher_in_8_bits_holds_a_byte_a_weight_and_a_scale_a_channel(run_of):
    plain = run_of("v5e-4")
    train = dataclasses.replace(plain.config.train, frozen_weights="int8_head")
    config = dataclasses.replace(plain.config, train=train)
    # Untied, of width 16: kernels q and o 16 x 16, k and v 8 x 16, three of the MLP 32 x 16, in two
    # layers; two tables of 32 x 16.
    weights = 2 * (2 * 256 + 2 * 128 + 3 * 512) + 2 * 512
    channels = 2 * (2 * 16 + 2 * 8 + 2 * 32 + 16) + 2 * 32
    of_bytes = lambda workload: sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(workload.scoring)
    )
    norms = of_bytes(plain) - 2 * weights
    held = of_bytes(dataclasses.replace(plain, config=config))
    assert held == weights + 4 * channels + norms


def test_sizes_of_a_run(run_of):
    workload = run_of("v5e-8", micro=1)
    assert dict(workload.layout.shape) == {
        "data": 4,
        "fsdp": 2,
        "tensor": 1,
    }  # data takes the devices that are left
    assert (workload.layout.size, workload.row_shards, workload.rows) == (8, 8, 1)
    assert (workload.prompt_columns, workload.columns) == (
        16,
        32,
    )  # prompts are padded as the run pads them
    assert workload.dtype == "bfloat16"  # of the topology, not of this machine
    assert workload.needs == "vocabulary"


def test_a_generator_in_the_process_leaves_the_learner_fewer_devices(run_of):
    near_policy = NearPolicyConfig(schedule="continuous", max_staleness=2, generator="thread")
    workload = run_of("v5e-8", near_policy=near_policy, mesh=MeshConfig(2, 2))
    assert workload.layout.size == 4
    assert "; 4 devices generate\n" in text(estimate(workload))
    assert "rollouts are asynchronous" in text(estimate(workload))


def test_a_config_json_alone_is_enough(model):
    path = model("alone")
    assert [file.name for file in pathlib.Path(path).iterdir()] == ["config.json"]
    checkpoint = open_checkpoint(path, with_weights=False)
    assert checkpoint.config.hidden_size == 8
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        load_params(checkpoint, "float32")


def test_only_the_configs_of_a_hub_id_are_downloaded(model, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns, local_files_only):
        asked.append((name, revision, allow_patterns))
        return model("downloaded" + str(len(asked)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    config = Config(
        student=ModelConfig("owner/one@main"),
        teacher=ModelConfig("owner/two"),
        train=TrainConfig(prompts_per_step=8),
    )
    read_workload(config, topology("v5e-8"))
    wanted = ["config.json", "generation_config.json", "adapter_config.json"]
    assert asked == [("owner/one", "main", wanted), ("owner/two", None, wanted)]


def test_a_student_that_is_its_own_teacher_is_read_once(run_of):
    workload = run_of("v5e-4", teacher=ModelConfig("@student"))
    assert workload.teacher is None
    assert workload.scoring_model == workload.student


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            MeshConfig(fsdp=8, tensor=2),
            "mesh.fsdp 8, mesh.tensor 2: 16 devices, but there are 8 v5e-8 devices",
        ),
        (
            MeshConfig(tensor=2),
            "mesh.tensor is 2, which does not divide num_key_value_heads 1 of the student",
        ),
        (MeshConfig(data=3), "8 rows a step .* do not divide into 2 micro-batches .* on 3 devices"),
        (MeshConfig(data=8), "on 8 devices .*; micro-batches that divide: 1"),
    ],
)
def test_a_mesh_that_cannot_divide_is_refused(run_of, mesh, message):
    workload = run_of("v5e-4")
    with pytest.raises(ConfigError, match=message):
        read_workload(dataclasses.replace(workload.config, mesh=mesh), topology("v5e-8"))


def test_the_teacher_is_refused_by_its_own_name(run_of, model):
    config = run_of("v5e-4").config
    odd = dataclasses.replace(config, teacher=ModelConfig(model("odd", hidden_size=9)))
    with pytest.raises(
        ConfigError,
        match=r"mesh.fsdp is 2, which does not divide hidden_size 9 of the teacher .*odd",
    ):
        read_workload(odd, topology("v5e-4"))


def test_evaluation_is_counted_if_there_is_one(run_of):
    plan = estimate(
        run_of(
            "v5e-4",
            evaluation=EvaluationConfig(max_completion_length=48),
            sampling=SamplingConfig(max_completion_length=16, slots=12),
        )
    )
    cache = next(
        item for item in plan.items if item.phases == ("evaluate",) and "KV cache" in item.name
    )
    assert cache.num_bytes == 2 * 2 * 3 * (16 + 48) * 4 * 2  # 12 rows on four devices: 3 on each


def test_an_evaluation_of_the_divergence_is_counted(run_of):
    """64 rows of 16 + 48 columns over four devices: both models' hidden states of 8 and 16 wide in
    bfloat16. The teacher, which is wider, has the larger cache.
    """
    divergence = EvaluationConfig(max_completion_length=48, kind="divergence")
    plan = estimate(run_of("v5e-4", evaluation=divergence))
    assert plan.phases[-2:] == ("evaluate", "divergence")
    held = {item.name: item.num_bytes for item in plan.items if item.phases == ("divergence",)}
    assert held["hidden states of both models"] == 16 * 64 * (8 + 16) * 2
    scores = 16 * 64 * 64 * 2 * 4 + 2 * 16 * 64 * 16 * 4
    assert held["a layer's activations, or vocabulary tiles"] == scores
    answers = EvaluationConfig(max_completion_length=48)
    cache = lambda plan: next(
        item.num_bytes
        for item in plan.items
        if item.phases == ("evaluate",) and item.name == "KV cache, prompt and completion"
    )
    rows = cache(estimate(run_of("v5e-4", evaluation=answers))) / cache(plan)
    assert rows == 512 / (2 * 128)  # decoded at a time; its heads are twice as wide
    few = dataclasses.replace(divergence, num_prompts=2, num_samples=2)  # a row on each device
    assert cache(plan) == 32 * cache(estimate(run_of("v5e-4", evaluation=few)))
