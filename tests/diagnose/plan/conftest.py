"""A tiny pair of models without weights, and runs of it."""

import json

import pytest

from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.topology import topology
from opdjax.diagnose.plan.workload import read_workload

# Two layers of 8 wide, 2 heads of 4, 1 of keys and values, MLP 16, 32 ids; tied, without norms of
# queries and keys.
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}


@pytest.fixture
def model(tmp_path):
    """model(name, **changes) -> the directory of a checkpoint with only a config.json."""

    def write(name, **changes):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(TINY | changes))
        return str(directory)

    return write


@pytest.fixture
def run_of(model, monkeypatch):
    """run_of(topology, **fields) -> a workload: 8 rows of 16 + 16 tokens, a teacher of twice the
    width.
    """
    for name in ("estimate", "table"):
        monkeypatch.setattr(f"opdjax.diagnose.plan.{name}.TILE", 8)
    student = model("student")
    teacher = model(
        "teacher", hidden_size=16, head_dim=8, intermediate_size=32, tie_word_embeddings=False
    )

    def read(name, *, recipe="full_kl", fsdp=2, tensor=1, micro=2, **sections):
        config = Config(
            **{
                "student": ModelConfig(student),
                "teacher": ModelConfig(teacher),
                "data": DataConfig(max_prompt_length=9),
                "sampling": SamplingConfig(max_completion_length=16),
                "estimator": EstimatorConfig(recipe=recipe),
                "train": TrainConfig(prompts_per_step=8, gradient_accumulation_steps=micro),
                "evaluation": EvaluationConfig(source=None),
                "mesh": MeshConfig(fsdp=fsdp, tensor=tensor),
            }
            | sections
        )
        return read_workload(config, topology(name))

    return read
