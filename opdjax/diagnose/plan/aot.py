"""The very programs that training runs, compiled for a machine that need not be there: what the
compiler says they take.
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
from opdjax.models.partitioning import shardings_of
from opdjax.ops.sharding import abstract_like, by_row, make_mesh, replicated
from opdjax.types import TeacherScores, TrainBatch


class NoCompilerError(RuntimeError):
    """There is no compiler here for the topology."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What XLA says of one compiled program; bytes are of one device."""

    name: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the output, those written over donated arguments
    peak_bytes: int  # arguments, outputs and everything in between, when most is held
    flops: float  # of one device; a loop whose rounds are not known counts once
    compile_seconds: float
    collectives: list[Collective]
    most_logit_rows: int  # tokens whose logits stand in one array
    problem: str | None = None  # why it was not compiled: it does not fit

    @property
    def temp_bytes(self) -> int:
        """What it holds at its peak beside arguments and outputs. XLA's own figure counts donated
        arguments twice on TPU.
        """
        return self.peak_bytes - self.argument_bytes - self.output_bytes + self.alias_bytes


def describe(topology: Topology) -> list[Any]:
    """The devices of a topology, for `jax.make_mesh`; NoCompilerError where nothing compiles for it
    here.
    """
    if topology.jax_name is None:
        raise NoCompilerError(
            f"{topology.name}: XLA compiles for a GPU only where there is one; plan without --aot, or on the machine"
        )
    # libtpu would otherwise ask a metadata server that is not there, and wait; and refuse a second
    # process, where none holds a chip.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A v4 chip has two cores that act as one device, as on the machine itself.
    more = {"chip_config_name": "megacore"} if topology.chip.jax_name == "v4" else {}
    try:
        name, host = topology.jax_name, topology.host_shape
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=host, **more
        )
    except (RuntimeError, ValueError) as error:
        raise NoCompilerError(
            f"nothing here compiles for {topology.name} ({str(error).splitlines()[0]}); install libtpu beside the same jax: "
            f"pip install 'jax[tpu]=={jax.__version__}'"
        ) from error
    return found.devices


def compile_programs(workload: Workload) -> list[Program]:
    """The programs of a step: the sampler's two, the teacher's pass where there is one, the update."""
    mesh = make_mesh(**workload.mesh, devices=describe(workload.topology))
    found = (
        []
        if workload.config.sampling.completions_from == "references"
        else _compile_sampler(workload, mesh)
    )
    if workload.needs != "none":
        found.append(measure("teacher", partial(_lower_score, workload, mesh), workload)[0])
    return [*found, compile_update(workload, mesh)]


def compile_update(workload: Workload, mesh: Mesh) -> Program:
    """The update alone."""
    return measure("update", partial(_lower_update, workload, mesh), workload)[0]


def _sharded_params(
    model: DecoderConfig, dtype: str, mesh: Mesh, split_over: tuple[str, ...]
) -> Any:
    params = abstract_params(model, dtype)
    return abstract_like(params, shardings_of(params, mesh, split_over))


def _rows(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row(mesh))


def _batch(workload: Workload, mesh: Mesh) -> TrainBatch:
    options, config = workload.config.estimator.options, workload.config
    field = partial(_rows, mesh)
    shape = (config.rows_per_step, workload.columns)
    return TrainBatch(
        tokens=field(jnp.int32, *shape),
        mask=field(jnp.bool_, *shape),
        segment_ids=field(jnp.int32, *shape),
        behavior_logprobs=field(jnp.float32, *shape)
        if config.sampling.completions_from == "student"
        else None,
        advantages=field(jnp.float32, *shape) if has_advantages(config.estimator) else None,
        uniforms=field(jnp.float32, *shape, options["extra_draws"])
        if options.get("extra_draws")
        else None,
    )


def _adapters(workload: Workload, dtype: str, mesh: Mesh, split_over: tuple[str, ...]) -> Any:
    leaves = jax.eval_shape(partial(init_adapters, workload.student, workload.config.lora, 0))
    leaves = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), leaves)
    return abstract_like(leaves, shardings_of(leaves, mesh, split_over))


def _published(workload: Workload, mesh: Mesh) -> Any:
    """The weights that rollouts are drawn with."""
    over = workload.config.sampling.split_over
    whole = _sharded_params(workload.student, workload.dtype, mesh, over)
    return (
        combine(whole, _adapters(workload, workload.dtype, mesh, over))
        if workload.config.lora.rank
        else whole
    )


def _teacher_params(workload: Workload, mesh: Mesh) -> Any:
    if workload.teacher is None and not workload.has_reference:
        return _published(workload, mesh)
    return _sharded_params(
        workload.scoring_model, workload.teacher_dtype, mesh, workload.scoring_split
    )


def _lower_update(workload: Workload, mesh: Mesh) -> Any:
    config = workload.config
    spec = spec_of(config, workload.student, workload.dtype, None, mesh)
    params, frozen = _sharded_params(workload.student, "float32", mesh, spec.split_over), None
    if config.lora.rank:
        params = _adapters(workload, "float32", mesh, spec.split_over)
        frozen = _sharded_params(workload.student, workload.dtype, mesh, spec.split_over)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), params)
    state = abstract_like(state, shardings_of(state, mesh, spec.split_over))
    batch, head = _batch(workload, mesh), None
    if workload.has_reference:
        batch = dataclasses.replace(
            batch, reference_logprobs=_rows(mesh, jnp.float32, *batch.tokens.shape)
        )
    elif workload.needs in ("token", "top_k"):
        field = partial(_rows, mesh)
        scores = TeacherScores(token_logprobs=field(jnp.float32, *batch.tokens.shape))
        if workload.top_k:
            top = (*batch.tokens.shape, workload.top_k)
            scores = dataclasses.replace(
                scores, top_ids=field(jnp.int32, *top), top_logprobs=field(jnp.float32, *top)
            )
        batch = dataclasses.replace(batch, teacher=scores)
    if workload.needs == "vocabulary":
        head = head_of(_teacher_params(workload, mesh))
        hidden = _rows(
            mesh,
            jnp.dtype(workload.teacher_dtype),
            *batch.tokens.shape,
            workload.scoring_model.hidden_size,
        )
        batch = dataclasses.replace(batch, teacher=TeacherScores(hidden=hidden))
    return make_update(spec, config.optimizer, config.train.num_steps).lower(
        state, batch, head, frozen
    )


def _lower_score(workload: Workload, mesh: Mesh) -> Any:
    config, params = workload.config, _teacher_params(workload, mesh)
    parts = config.train.gradient_accumulation_steps
    how = {
        "needs": workload.needs,
        "top_k": workload.top_k,
        "tile": config.estimator.tile,
        "parts": parts,
        "mesh": mesh,
    }
    return score.lower(
        params, head_of(params), _batch(workload, mesh), config=workload.scoring_model, **how
    )


def _sampled(workload: Workload, mesh: Mesh) -> tuple[Any, dict[str, Any], tuple[int, int]]:
    """(parameters, static arguments, (slots, prompts read at a time)) of what the sampler runs."""
    config, sampling = workload.config, workload.config.sampling
    is_student = sampling.completions_from == "student" or workload.teacher is None
    model = workload.student if is_student else workload.teacher
    params = _published(workload, mesh) if is_student else _teacher_params(workload, mesh)
    filters = (sampling.top_k, sampling.top_p, sampling.min_p)
    decoding = Decoding(
        sampling.max_completion_length,
        (0,),
        sampling.temperature,
        *filters,
        kv_dtype=sampling.kv_dtype,
    )
    slots = num_slots(sampling.slots, config.rows_per_step, mesh)
    return (
        params,
        {"config": model, "decoding": decoding, "mesh": mesh},
        (slots, block_size(slots, sampling.num_generations, mesh)),
    )


def _compile_sampler(workload: Workload, mesh: Mesh) -> list[Program]:
    """Reading prompts, and decoding at the longest ring, which takes most."""
    params, static, (slots, block) = _sampled(workload, mesh)
    width, count = workload.prompt_columns, workload.config.rows_per_step
    whole = partial(jax.ShapeDtypeStruct, (block, width), sharding=replicated(mesh))
    splitting = split_layers, (params["layers"], static["config"]), {}
    layer_params = _results(splitting, _lower(splitting).compile())
    reading = (
        prefill,
        (params, layer_params, whole(jnp.int32), whole(jnp.bool_)),
        {"prompt_columns": width, **static},
    )
    of_prefill, compiled = measure("prefill", partial(_lower, reading), workload)
    if compiled is None:
        return [of_prefill]
    empty = (
        start,
        (params,),
        {
            "slots": slots,
            "rows": count,
            "columns": width + static["decoding"].max_completion_length,
            **static,
        },
    )
    state = _results(empty, _lower(empty).compile())
    of_slot, number = np.zeros(slots, np.int32), np.int32(0)
    assignments = Assignments(of_slot, of_slot, of_slot, of_slot)
    arguments = (
        params,
        layer_params,
        state,
        _results(reading, compiled),
        assignments,
        np.zeros(3, np.int32),
        number,
        number,
    )
    decoding = advance, arguments, {"prompt_columns": width, **static}
    return [of_prefill, measure("sample", partial(_lower, decoding), workload)[0]]


def _lower(call: tuple[Any, tuple, dict[str, Any]]) -> Any:
    function, arguments, static = call
    return function.lower(*arguments, **static)


def _results(call: tuple[Any, tuple, dict[str, Any]], compiled: Any) -> Any:
    """What a call returns, laid out as its compiled program returns it."""
    function, arguments, static = call
    return abstract_like(function.eval_shape(*arguments, **static), compiled.output_shardings)


def measure(name: str, lower: Callable, workload: Workload) -> tuple[Program, Any]:
    """(what the compiler says of a program, the program itself; None where it does not fit)."""
    began = time.monotonic()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Program(
            name,
            0,
            0,
            0,
            0,
            0.0,
            time.monotonic() - began,
            [],
            0,
            problem=str(error).partition("\n")[0],
        ), None
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
