"""Compile the programs of training for a machine that need not be present, and report their sizes.

AOT: ahead of time.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from opdjax.config.topology import Topology
from opdjax.diagnose.plan.hlo import Collective, collectives, most_rows
from opdjax.diagnose.plan.workload import Workload, has_advantages
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import advance, prefill, split_layers, start
from opdjax.engine.scheduling import Assignments, block_size, num_slots
from opdjax.engine.scorer import score
from opdjax.engine.update import init_state, make_optimizer, make_update, spec_of
from opdjax.models.decoder import DecoderConfig, abstract_params, head_of
from opdjax.models.lora import combine, init_adapters
from opdjax.models.partitioning import SAMPLER_AXES, WEIGHT_AXES, shardings_of
from opdjax.ops.sharding import abstract_like, by_row, make_mesh, replicated
from opdjax.ops.vocab import TILE
from opdjax.types import TeacherScores, TrainBatch


class NoCompilerError(RuntimeError):
    """No compiler for the topology is installed."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What XLA reports of a compiled program; bytes are those of one device."""

    name: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # the part of the output that overwrites donated arguments
    peak_bytes: int  # the most that arguments, outputs and temporaries hold at once
    flops: float  # of one device; a loop of unknown trip count counts once
    compile_seconds: float
    collectives: list[Collective]
    most_logit_rows: int  # tokens whose logits are in one array
    problem: str | None = None  # why it did not compile: it does not fit

    @property
    def temp_bytes(self) -> int:
        """Bytes at the peak without arguments and outputs.

        XLA's own figure counts donated arguments twice on TPU.
        """
        return self.peak_bytes - self.argument_bytes - self.output_bytes + self.alias_bytes


def describe(topology: Topology) -> list[Any]:
    """Return the devices of a topology for `jax.make_mesh`.

    NoCompilerError if no compiler for it is installed.
    """
    if topology.jax_name is None:
        raise NoCompilerError(
            f"{topology.name}: XLA compiles for a GPU only on a machine with one; plan without "
            "--aot, or on that machine"
        )
    # Otherwise libtpu waits for a metadata server, and refuses a second process although none
    # holds a chip.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # The two cores of a v4 chip act as one device.
    more = {"chip_config_name": "megacore"} if topology.chip.jax_name == "v4" else {}
    try:
        name, host = topology.jax_name, topology.host_shape
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=host, **more
        )
    except (RuntimeError, ValueError) as error:
        raise NoCompilerError(
            f"no compiler for {topology.name} is installed ({str(error).splitlines()[0]}); install "
            f"libtpu for this jax: pip install 'jax[tpu]=={jax.__version__}'"
        ) from error
    return found.devices


def compile_programs(workload: Workload) -> list[Program]:
    """Compile the programs of a step: the sampler's two, the teacher's pass, the update.

    A run without sampling or without a teacher lacks theirs.
    """
    mesh = make_mesh(**workload.mesh, devices=describe(workload.topology))
    programs = []
    if workload.config.sampling.completions_from != "references":
        programs = _compile_sampler(workload, mesh)
    if workload.needs != "none":
        programs.append(measure("teacher", partial(_lower_score, workload, mesh), workload)[0])
    return [*programs, compile_update(workload, mesh)]


def compile_update(workload: Workload, mesh: Mesh) -> Program:
    """Compile the update alone."""
    return measure("update", partial(_lower_update, workload, mesh), workload)[0]


def _sharded_params(
    model: DecoderConfig, dtype: str, mesh: Mesh, split_over: tuple[str, ...]
) -> Any:
    """Return the shapes, types and shardings of a model's parameters."""
    params = abstract_params(model, dtype)
    return abstract_like(params, shardings_of(params, mesh, split_over))


def _rows(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row(mesh))


def _batch(workload: Workload, mesh: Mesh) -> TrainBatch:
    config, shape = workload.config, (workload.config.rows_per_step, workload.columns)
    field, extra = partial(_rows, mesh), config.estimator.options.get("extra_draws")
    is_sampled = config.sampling.completions_from == "student"
    return TrainBatch(
        tokens=field(jnp.int32, *shape),
        mask=field(jnp.bool_, *shape),
        segment_ids=field(jnp.int32, *shape),
        behavior_logprobs=field(jnp.float32, *shape) if is_sampled else None,
        advantages=field(jnp.float32, *shape) if has_advantages(config.estimator) else None,
        uniforms=field(jnp.float32, *shape, extra) if extra else None,
    )


def _adapters(workload: Workload, dtype: str, mesh: Mesh, split_over: tuple[str, ...]) -> Any:
    leaves = jax.eval_shape(partial(init_adapters, workload.student, workload.config.lora, 0))
    leaves = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), leaves)
    return abstract_like(leaves, shardings_of(leaves, mesh, split_over))


def _published(workload: Workload, mesh: Mesh) -> Any:
    """Return the weights that sample rollouts."""
    over = SAMPLER_AXES
    whole = _sharded_params(workload.student, workload.dtype, mesh, over)
    if not workload.config.lora.rank:
        return whole
    return combine(whole, _adapters(workload, workload.dtype, mesh, over))


def _teacher_params(workload: Workload, mesh: Mesh) -> Any:
    if workload.teacher is None and not workload.has_reference:
        return _published(workload, mesh)
    model, dtype = workload.scoring_model, workload.teacher_dtype
    return _sharded_params(model, dtype, mesh, workload.scoring_split)


def _lower_update(workload: Workload, mesh: Mesh) -> Any:
    config = workload.config
    spec = spec_of(config, workload.student, workload.dtype, None, mesh)
    params, frozen = _sharded_params(workload.student, "float32", mesh, WEIGHT_AXES), None
    if config.lora.rank:
        params = _adapters(workload, "float32", mesh, WEIGHT_AXES)
        frozen = _sharded_params(workload.student, workload.dtype, mesh, WEIGHT_AXES)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), params)
    state = abstract_like(state, shardings_of(state, mesh, WEIGHT_AXES))
    batch, head, field = _batch(workload, mesh), None, partial(_rows, mesh)
    shape = batch.tokens.shape
    if workload.has_reference:
        batch = dataclasses.replace(batch, reference_logprobs=field(jnp.float32, *shape))
    elif workload.needs == "vocabulary":
        head = head_of(_teacher_params(workload, mesh))
        dtype, width = jnp.dtype(workload.teacher_dtype), workload.scoring_model.hidden_size
        batch = dataclasses.replace(
            batch, teacher=TeacherScores(hidden=field(dtype, *shape, width))
        )
    elif workload.needs != "none":
        scores = TeacherScores(teacher_logprobs=field(jnp.float32, *shape))
        if workload.needs == "top_k":
            top = (*shape, workload.top_k)
            scores = dataclasses.replace(
                scores,
                teacher_top_ids=field(jnp.int32, *top),
                teacher_top_logprobs=field(jnp.float32, *top),
            )
        batch = dataclasses.replace(batch, teacher=scores)
    update = make_update(spec, config.optimizer, config.train.num_steps)
    return update.lower(state, batch, head, frozen)


def _lower_score(workload: Workload, mesh: Mesh) -> Any:
    config, params = workload.config, _teacher_params(workload, mesh)
    return score.lower(
        params,
        head_of(params),
        _batch(workload, mesh),
        config=workload.scoring_model,
        needs=workload.needs,
        top_k=workload.top_k,
        tile=TILE,
        parts=config.train.gradient_accumulation_steps,
        mesh=mesh,
    )


def _sampler_inputs(workload: Workload, mesh: Mesh) -> tuple[Any, dict[str, Any], tuple[int, int]]:
    """Return (parameters, static arguments, (slots, prompts in a block)) of the sampler."""
    config, sampling = workload.config, workload.config.sampling
    is_student = sampling.completions_from == "student" or workload.teacher is None
    decoding = Decoding(
        sampling.max_completion_length,
        stop_token_ids=(0,),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        kv_dtype=sampling.kv_dtype,
    )
    model = workload.student if is_student else workload.teacher
    static = {"config": model, "decoding": decoding, "mesh": mesh}
    slots = num_slots(sampling.slots, config.rows_per_step, mesh)
    params = (_published if is_student else _teacher_params)(workload, mesh)
    return params, static, (slots, block_size(slots, sampling.num_generations, mesh))


def _compile_sampler(workload: Workload, mesh: Mesh) -> list[Program]:
    """Compile prefill, and decoding with the longest cache, which needs most."""
    params, static, (slots, block) = _sampler_inputs(workload, mesh)
    width, rows = workload.prompt_columns, workload.config.rows_per_step
    columns = width + static["decoding"].max_completion_length
    whole = partial(jax.ShapeDtypeStruct, (block, width), sharding=replicated(mesh))
    inputs = (params["layers"], static["config"])
    layer_params = _results(split_layers, inputs, {}, split_layers.lower(*inputs).compile())
    inputs = (params, layer_params, whole(jnp.int32), whole(jnp.bool_))
    options = {"prompt_columns": width, **static}
    program, compiled = measure("prefill", partial(prefill.lower, *inputs, **options), workload)
    if compiled is None:
        return [program]
    prefix = _results(prefill, inputs, options, compiled)
    options = {"slots": slots, "rows": rows, "columns": columns, **static}
    state = _results(start, (params,), options, start.lower(params, **options).compile())
    of_slot, number = np.zeros(slots, np.int32), np.int32(0)
    assignments = Assignments(of_slot, of_slot, of_slot, of_slot)
    stream_ids = np.zeros(3, np.int32)
    inputs = (params, layer_params, state, prefix, assignments, stream_ids, number, number)
    lower = partial(advance.lower, *inputs, prompt_columns=width, **static)
    return [program, measure("sample", lower, workload)[0]]


def _results(function: Any, inputs: tuple, options: dict[str, Any], compiled: Any) -> Any:
    """Return the shapes of a call's results with the shardings of its compiled program."""
    return abstract_like(function.eval_shape(*inputs, **options), compiled.output_shardings)


def measure(name: str, lower: Callable, workload: Workload) -> tuple[Program, Any]:
    """Compile a program; return (what the compiler reports, the program or None if too large)."""
    began = time.monotonic()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds, problem = time.monotonic() - began, str(error).partition("\n")[0]
        return Program(name, 0, 0, 0, 0, 0.0, seconds, [], 0, problem), None
    seconds = time.monotonic() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    models = [model for model in (workload.student, workload.teacher) if model is not None]
    widths = {
        model.vocab_size // split for model in models for split in (1, workload.mesh["tensor"])
    }
    found = Program(
        name=name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        flops=compiled.cost_analysis().get("flops", 0.0),
        compile_seconds=seconds,
        collectives=collectives(text),
        most_logit_rows=most_rows(text, widths, {model.hidden_size for model in models}),
    )
    return found, compiled
