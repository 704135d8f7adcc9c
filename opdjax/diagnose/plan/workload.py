"""What a run is made of, in sizes alone: read from its config and the models' config.json, never
from weights, tokenizers or data.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

from opdjax.config import Config, EstimatorConfig, ModelConfig
from opdjax.config.recipes import RECIPES
from opdjax.config.topology import Topology
from opdjax.data.prompts import padded_width
from opdjax.estimators import estimator_of
from opdjax.models.decoder import DecoderConfig
from opdjax.models.hf import open_checkpoint
from opdjax.models.partitioning import require_divides
from opdjax.ops.sharding import mesh_sizes
from opdjax.rollouts.requirements import require_rows_divide
from opdjax.rollouts.setup import attention_of, compute_dtype, needs_teacher


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of a run on one topology. Prompts are taken as long as data.max_prompt_length lets
    them be, completions likewise.
    """

    config: Config
    topology: Topology
    mesh: dict[str, int]  # axis -> devices
    student: DecoderConfig
    teacher: (
        DecoderConfig | None
    )  # or the reference; None: no frozen model stands beside the student
    needs: Literal[
        "none", "token", "top_k", "vocabulary"
    ]  # what the recipe asks a teacher for, or the reference
    top_k: int  # of its most likely ids, where that is top_k
    prompt_columns: int

    @property
    def dtype(self) -> str:
        """Of the student's forward pass."""
        return compute_dtype(self.config.student, self.topology.backend)

    @property
    def has_reference(self) -> bool:
        """Whether the model that scores is the student as it starts; no such recipe reads a teacher
        too.
        """
        return bool(self.config.estimator.reference_kl_coef)

    @property
    def teacher_dtype(self) -> str:
        """Of the teacher's, or the reference's."""
        return (
            self.dtype
            if self.has_reference
            else compute_dtype(self.config.teacher_model, self.topology.backend)
        )

    @property
    def scoring_model(self) -> DecoderConfig:
        """The model that scores: the teacher, or the student where it is its own, now or as it
        starts.
        """
        return self.teacher or self.student

    @property
    def scoring_split(self) -> tuple[str, ...]:
        """The mesh axes that the parameters of the model that scores lie split over."""
        if self.has_reference:
            return self.config.student.split_over
        return self.config.teacher.split_over if self.teacher else self.config.sampling.split_over

    @property
    def devices(self) -> int:
        """That the mesh uses."""
        return self.mesh["data"] * self.mesh["fsdp"] * self.mesh["tensor"]

    @property
    def row_shards(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def rows(self) -> int:
        """Of a step, on one device."""
        return self.config.rows_per_step // self.row_shards

    @property
    def micro_rows(self) -> int:
        """Of a micro-batch, on one device."""
        return self.rows // self.config.train.gradient_accumulation_steps

    @property
    def columns(self) -> int:
        """Of a row that is scored and trained on: prompt and completion, or what several rollouts
        share.
        """
        return (
            self.config.train.pack_length
            or self.prompt_columns + self.config.sampling.max_completion_length
        )

    @property
    def slots(self) -> int:
        """Rows that one device decodes at a time in a step."""
        slots = self.config.sampling.slots
        return self.rows if slots is None else min(slots // self.row_shards, self.rows)


def read_workload(config: Config, topology: Topology) -> Workload:
    """The run that `config` describes, on `topology`; ConfigError where its mesh, its rows or its
    models do not divide.
    """
    near = config.near_policy
    available = topology.chips - (near.generator_devices if near.generator == "thread" else 0)
    mesh = mesh_sizes(
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor, available, topology.name
    )
    require_rows_divide(config, mesh["data"] * mesh["fsdp"])
    estimator = estimator_of(config.estimator)
    shape_of = partial(_shape, mesh=mesh, backend=topology.backend)
    student = dataclasses.replace(shape_of(config.student, "student"), lora_scale=config.lora.scale)
    teacher, needs = None, estimator.teacher
    if config.estimator.reference_kl_coef:
        # Beside adapters the reference is the frozen student that is there already.
        teacher, needs = None if config.lora.rank else student, "token"
    elif needs_teacher(config) and not config.teacher_is_student:
        teacher = shape_of(config.teacher, "teacher")
    return Workload(
        config,
        topology,
        mesh,
        student,
        teacher,
        needs,
        estimator.top_k,
        padded_width(config.data.max_prompt_length),
    )


def has_advantages(estimator: EstimatorConfig) -> bool:
    """Whether a batch carries an advantage of each token."""
    return bool(estimator.task_reward_coef) or RECIPES[estimator.recipe].is_rewarded


def _shape(model: ModelConfig, role: str, mesh: dict[str, int], backend: str) -> DecoderConfig:
    config = open_checkpoint(model.path, model.revision, with_weights=False).config
    require_divides(config, mesh, f"the {role} {model.path}")
    return dataclasses.replace(
        config, attention=attention_of(model, config.head_size, role, backend)
    )
