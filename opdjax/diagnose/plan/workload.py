"""The sizes of a run, and the arguments of its programs as shapes and shardings.

Both are read from the config and the models' config.json; weights, tokenizers and data are not.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from opdjax.config import Config, FrozenWeights, ModelConfig
from opdjax.config.topology import Topology
from opdjax.data.prompts import padded_width
from opdjax.estimators import estimator_of
from opdjax.models.decoder import DecoderConfig, abstract_params
from opdjax.models.hf import open_checkpoint
from opdjax.models.lora import combine, init_adapters, with_adapters
from opdjax.models.partitioning import SAMPLER_AXES, WEIGHT_AXES, require_divides, shardings_of
from opdjax.models.quantization import in_8_bits, quantize
from opdjax.ops.sharding import abstract_like, by_row, mesh_sizes
from opdjax.rollouts.setup import attention_of, compute_dtype, needs_teacher, require_rows_divide
from opdjax.types import TeacherScores, TrainBatch


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of a run on one topology, with prompts and completions of the maximum length."""

    config: Config
    topology: Topology
    layout: Mesh | AbstractMesh  # of devices, or of their number alone
    student: DecoderConfig
    teacher: DecoderConfig | None  # or the reference policy; None: no second model is loaded
    # What the recipe reads from the teacher, or from the reference policy.
    needs: Literal["none", "token", "top_k", "vocabulary"]
    top_k: int  # the number of most likely ids it reads, if `needs` is top_k
    dtype: str  # of the forward passes
    scoring_split: tuple[str, ...]  # the mesh axes that shard the parameters of that pass
    writer: Literal["student", "teacher", "none"]  # the model that samples the completions
    prompt_columns: int
    columns: int  # of a row that is scored and trained on; packed rows hold several rollouts
    rows: int  # of a step on one device
    micro_rows: int  # of a micro-batch on one device
    slots: int  # rows that one device decodes at a time

    @property
    def row_shards(self) -> int:
        """The number of shards of a batch's rows."""
        return self.layout.shape["data"] * self.layout.shape["fsdp"]

    @property
    def has_reference(self) -> bool:
        """Whether the reference policy scores; such a recipe reads no teacher."""
        return bool(self.config.estimator.reference_kl_coef)

    @property
    def scoring_model(self) -> DecoderConfig:
        """The model that scores: the teacher, or the student if it is its own."""
        return self.teacher or self.student

    @property
    def sampled_model(self) -> DecoderConfig:
        """The model that writes the completions."""
        return self.student if self.writer == "student" else self.scoring_model

    @property
    def cache_dtype(self) -> str:
        """The type in which that model's keys and values are stored."""
        stored = self.config.sampling.kv_dtype
        return self.dtype if stored == "auto" else stored

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the forward passes."""
        return jnp.dtype(self.dtype).itemsize

    def params(
        self,
        model: DecoderConfig,
        dtype: str,
        split_over: tuple[str, ...],
        weights: FrozenWeights = "dtype",
    ) -> Any:
        """A model's parameters."""
        params = abstract_params(model, dtype)
        params = in_8_bits(params, weights, partial(jax.eval_shape, quantize))
        return abstract_like(params, shardings_of(params, self.layout, split_over))

    def adapters(self, dtype: str, split_over: tuple[str, ...]) -> Any:
        """The student's adapters; None if all of its parameters are trained."""
        if not self.config.lora.rank:
            return None
        leaves = jax.eval_shape(partial(init_adapters, self.student, self.config.lora, 0))
        leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), leaves)
        return abstract_like(leaves, shardings_of(leaves, self.layout, split_over))

    def trained(self, dtype: str, split_over: tuple[str, ...]) -> Any:
        """What is trained: the adapters, or the whole student."""
        return self.adapters(dtype, split_over) or self.params(self.student, dtype, split_over)

    @property
    def frozen(self) -> Any:
        """The student's parameters below adapters; None if all are trained."""
        if not self.config.lora.rank:
            return None
        return self.params(self.student, self.dtype, WEIGHT_AXES, self.config.base_weights)

    @property
    def published(self) -> Any:
        """The weights that sample rollouts."""
        kind = (self.dtype, SAMPLER_AXES)
        params = self.params(self.student, *kind, self.config.base_weights)
        adapters = self.adapters(*kind)
        return combine(params, adapters) if adapters else params

    @property
    def scoring(self) -> Any:
        """The parameters of the teacher, or of the reference policy."""
        if self.teacher is None and not self.has_reference:
            return self.published
        config = self.config
        # As the run loads them: a reference policy is held as the base of adapters is.
        weights = config.base_weights if self.has_reference else config.train.frozen_weights
        return self.params(self.scoring_model, self.dtype, self.scoring_split, weights)

    def batch(self) -> TrainBatch:
        """A step's rows before they are scored."""
        config, extra = self.config, self.config.estimator.options.get("extra_draws")
        is_sampled = config.sampling.completions_from == "student"
        is_rewarded = config.estimator.task_reward_coef or config.recipe.is_rewarded
        return TrainBatch(
            tokens=self._rows("int32"),
            mask=self._rows("bool"),
            segment_ids=self._rows("int32"),
            behavior_logprobs=self._rows("float32") if is_sampled else None,
            advantages=self._rows("float32") if is_rewarded else None,
            uniforms=self._rows("float32", extra) if extra else None,
        )

    def scored_batch(self) -> TrainBatch:
        """A step's rows as the update receives them."""
        batch = self.batch()
        if self.needs == "none":
            return batch
        logprobs = self._rows("float32")
        if self.has_reference:
            return dataclasses.replace(batch, reference_logprobs=logprobs)
        if self.needs == "vocabulary":
            hidden = self._rows(self.dtype, self.scoring_model.hidden_size)
            return dataclasses.replace(batch, teacher=TeacherScores(hidden=hidden))
        kinds = ("int32", "float32") if self.needs == "top_k" else ()
        top = [self._rows(dtype, self.top_k) for dtype in kinds]
        return dataclasses.replace(batch, teacher=TeacherScores(logprobs, *top))

    def _rows(self, dtype: str, *columns: int) -> jax.ShapeDtypeStruct:
        shape = (self.config.rows_per_step, self.columns, *columns)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=by_row(self.layout))


def read_workload(config: Config, topology: Topology) -> Workload:
    """Return a run's workload; ConfigError if the mesh does not divide devices, rows or models."""
    sizes, sampling, available = config.mesh, config.sampling, topology.chips
    if config.near_policy.generator == "thread":
        available -= sizes.generator_devices(available)
    mesh = mesh_sizes(sizes.data, sizes.fsdp, sizes.tensor, available, topology.name)
    row_shards = mesh["data"] * mesh["fsdp"]
    require_rows_divide(config, row_shards)

    def shape_of(model: ModelConfig, role: str) -> DecoderConfig:
        checkpoint = open_checkpoint(*model.place, with_weights=False)
        if role == "student":
            checkpoint = with_adapters(checkpoint, config.lora)
        shape = checkpoint.config
        require_divides(shape, mesh, f"the {role} {model.path}")
        attention = attention_of(config.train, shape.head_size, role, topology.backend)
        return dataclasses.replace(shape, attention=attention)

    student = shape_of(config.student, "student")
    dtype = compute_dtype(config.train.dtype, topology.backend)
    estimator, teacher, split = estimator_of(config.estimator), None, SAMPLER_AXES
    needs = estimator.teacher
    if config.estimator.reference_kl_coef:
        # With adapters, the reference policy is the frozen student, which is loaded anyway.
        teacher, needs = None if config.lora.rank else student, "token"
        split = WEIGHT_AXES
    elif needs_teacher(config) and not config.teacher_is_student:
        teacher, split = shape_of(config.teacher, "teacher"), WEIGHT_AXES
    writer = "teacher" if teacher else "student"
    if sampling.completions_from != "teacher":
        writer = "student" if sampling.student_samples else "none"
    columns, rows = padded_width(config.data.max_prompt_length), config.rows_per_step // row_shards
    return Workload(
        *(config, topology, abstract_mesh(mesh), student, teacher, needs, estimator.top_k, dtype),
        scoring_split=split,
        writer=writer,
        prompt_columns=columns,
        columns=config.train.pack_length or columns + sampling.max_completion_length,
        rows=rows,
        micro_rows=rows // config.train.gradient_accumulation_steps,
        slots=rows if sampling.slots is None else min(sampling.slots // row_shards, rows),
    )


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """Return a mesh without devices: enough to count what a device holds."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def bytes_of(tree: Any) -> int:
    """Return the bytes of a tree's leaves on one device."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(map(size, jax.tree.leaves(tree)))
