"""The sizes of a run, read from its config and the models' config.json.

Weights, tokenizers and data are not read.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

from opdjax.config import Config, EstimatorConfig, ModelConfig, TrainConfig
from opdjax.config.recipes import RECIPES
from opdjax.config.topology import Topology
from opdjax.data.prompts import padded_width
from opdjax.estimators import estimator_of
from opdjax.models.decoder import DecoderConfig
from opdjax.models.hf import open_checkpoint
from opdjax.models.partitioning import SAMPLER_AXES, WEIGHT_AXES, require_divides
from opdjax.ops.sharding import mesh_sizes
from opdjax.rollouts.requirements import require_rows_divide
from opdjax.rollouts.setup import attention_of, compute_dtype, needs_teacher


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of a run on one topology, with prompts and completions of the maximum length."""

    config: Config
    topology: Topology
    mesh: dict[str, int]  # axis -> devices
    student: DecoderConfig
    teacher: DecoderConfig | None  # or the reference policy; None: no second model is loaded
    # What the recipe reads from the teacher, or from the reference policy.
    needs: Literal["none", "token", "top_k", "vocabulary"]
    top_k: int  # the number of most likely ids it reads, if `needs` is top_k
    prompt_columns: int

    @property
    def dtype(self) -> str:
        """The type of the student's forward pass."""
        return compute_dtype(self.config.train.dtype, self.topology.backend)

    @property
    def has_reference(self) -> bool:
        """Whether the reference policy scores; such a recipe reads no teacher."""
        return bool(self.config.estimator.reference_kl_coef)

    @property
    def teacher_dtype(self) -> str:
        """The type of the teacher's forward pass, or the reference policy's."""
        return self.dtype

    @property
    def scoring_model(self) -> DecoderConfig:
        """The model that scores: the teacher, or the student if it is its own."""
        return self.teacher or self.student

    @property
    def scoring_split(self) -> tuple[str, ...]:
        """The mesh axes over which the scoring model's parameters are sharded."""
        if self.has_reference:
            return WEIGHT_AXES
        return WEIGHT_AXES if self.teacher else SAMPLER_AXES

    @property
    def devices(self) -> int:
        """The number of devices in the mesh."""
        return self.mesh["data"] * self.mesh["fsdp"] * self.mesh["tensor"]

    @property
    def row_shards(self) -> int:
        """The number of shards of a batch's rows."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def rows(self) -> int:
        """Rows of a step on one device."""
        return self.config.rows_per_step // self.row_shards

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch on one device."""
        return self.rows // self.config.train.gradient_accumulation_steps

    @property
    def columns(self) -> int:
        """Columns of a row that is scored and trained on; packed rows hold several rollouts."""
        unpacked = self.prompt_columns + self.config.sampling.max_completion_length
        return self.config.train.pack_length or unpacked

    @property
    def slots(self) -> int:
        """Rows that one device decodes at a time."""
        slots = self.config.sampling.slots
        return self.rows if slots is None else min(slots // self.row_shards, self.rows)


def read_workload(config: Config, topology: Topology) -> Workload:
    """Return the run's workload on `topology`.

    ConfigError if the mesh does not divide its devices, its rows or its models.
    """
    sizes, available = config.mesh, topology.chips
    if config.near_policy.generator == "thread":
        available -= sizes.generator_devices(available)
    mesh = mesh_sizes(sizes.data, sizes.fsdp, sizes.tensor, available, topology.name)
    require_rows_divide(config, mesh["data"] * mesh["fsdp"])
    estimator = estimator_of(config.estimator)
    shape_of = partial(_shape, train=config.train, mesh=mesh, backend=topology.backend)
    student = dataclasses.replace(shape_of(config.student, "student"), lora_scale=config.lora.scale)
    teacher, needs = None, estimator.teacher
    if config.estimator.reference_kl_coef:
        # With adapters, the reference policy is the frozen student, which is loaded anyway.
        teacher, needs = None if config.lora.rank else student, "token"
    elif needs_teacher(config) and not config.teacher_is_student:
        teacher = shape_of(config.teacher, "teacher")
    columns = padded_width(config.data.max_prompt_length)
    return Workload(config, topology, mesh, student, teacher, needs, estimator.top_k, columns)


def has_advantages(estimator: EstimatorConfig) -> bool:
    """Return whether a batch has an advantage of each token."""
    return bool(estimator.task_reward_coef) or RECIPES[estimator.recipe].is_rewarded


def _shape(
    model: ModelConfig, role: str, train: TrainConfig, mesh: dict[str, int], backend: str
) -> DecoderConfig:
    config = open_checkpoint(*model.place, with_weights=False).config
    require_divides(config, mesh, f"the {role} {model.path}")
    attention = attention_of(train, config.head_size, role, backend)
    return dataclasses.replace(config, attention=attention)
