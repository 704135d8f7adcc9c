"""A plan as a person reads it."""

from __future__ import annotations

from collections import defaultdict

from opdjax.diagnose.plan.aot import Program
from opdjax.diagnose.plan.arithmetic import PROGRAMS, Plan
from opdjax.diagnose.plan.hlo import traffic

_GIB, _MIB = 2**30, 2**20
_AHEAD = "\nrollouts are drawn ahead; all is counted on the learner's devices, as if every step drew and scored its own"


def text(plan: Plan, programs: list[Program] | None = None) -> str:
    """The table of the arithmetic, and where there are compiled programs what their compiler says."""
    blocks = [_heading(plan), _memory(plan), _work(plan), verdict(plan, programs)]
    if programs is not None:
        blocks[3:3] = [_compiled(plan, programs), *(_traffic(program) for program in programs)]
    return "\n\n".join(block for block in blocks if block)


def _heading(plan: Plan) -> str:
    workload = plan.workload
    topology, config = workload.topology, workload.config
    hosts = "1 host" if topology.hosts == 1 else f"{topology.hosts} hosts"
    mesh = " x ".join(f"{axis} {size}" for axis, size in workload.mesh.items())
    idle = topology.chips - workload.devices
    generator = (
        config.near_policy.generator_devices if config.near_policy.generator == "thread" else 0
    )
    rest = f"; {generator} devices generate" if generator else ""
    rest += f"; {idle - generator} devices are left idle" if idle > generator else ""
    parts = config.train.gradient_accumulation_steps
    packed = f", packed into rows of {config.train.pack_length}" if config.train.pack_length else ""
    tokens = f"{workload.prompt_columns} + {config.sampling.max_completion_length} tokens{packed}"
    return (
        f"{topology.name}: {topology.chips} devices of {topology.chip.hbm_bytes / _GIB:.2f} GiB, {hosts}; mesh {mesh}{rest}\n"
        f"a step: {config.rows_per_step} rows of {tokens}; on a device "
        f"{workload.rows} rows, {workload.micro_rows} at a time ({parts} micro-batches)"
        f"{'' if config.near_policy.schedule == 'none' else _AHEAD}"
    )


def _memory(plan: Plan) -> str:
    phases = plan.phases
    lines = [f"{'GiB on a device':46}" + "".join(f"{phase:>12}" for phase in phases)]
    for name, sizes in _by_name(plan).items():
        lines.append(f"{name:46}" + "".join(_cell(sizes.get(phase, 0)) for phase in phases))
    lines.append(f"{'in all':46}" + "".join(_cell(plan.held(phase)) for phase in phases))
    lines.append(
        f"{'left of what programs may use':46}"
        + "".join(_cell(plan.capacity - plan.held(phase)) for phase in phases)
    )
    return "\n".join(lines)


def _by_name(plan: Plan) -> dict[str, dict[str, int]]:
    """Name -> phase -> bytes: what is held in two phases in different sizes stands in one line."""
    rows: dict[str, dict[str, int]] = defaultdict(dict)
    for item in plan.items:
        rows[item.name] |= dict.fromkeys(item.phases, item.num_bytes)
    return rows


def _cell(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:12.3f}" if num_bytes else f"{'':12}"


def _work(plan: Plan) -> str:
    lines = [f"{'work of a step':46}" + "".join(f"{phase:>12}" for phase in PROGRAMS)]
    bounds = [plan.bounds[phase] for phase in PROGRAMS]
    lines.append(
        f"{'10^12 floating-point operations, all devices':46}"
        + "".join(f"{bound.flops / 1e12:12.1f}" for bound in bounds)
    )
    lines.append(
        f"{'seconds at least, nothing sent between devices':46}"
        + "".join(f"{bound.seconds:12.3f}" for bound in bounds)
    )
    limits = (
        "" if bound.seconds == 0 else "memory" if bound.is_by_memory else "arithmetic"
        for bound in bounds
    )
    lines.append(f"{'limited by':46}" + "".join(f"{limit:>12}" for limit in limits))
    config = plan.workload.config
    drawn = config.rows_per_step * config.sampling.max_completion_length
    seconds = sum(bound.seconds for bound in bounds)
    lines.append(
        f"at most {drawn:,} tokens of completions a step, in at least {seconds:.2f} s: {drawn / seconds:,.0f} a second"
    )
    return "\n".join(lines)


def _compiled(plan: Plan, programs: list[Program]) -> str:
    title = f"compiled for {plan.workload.topology.jax_name}, GiB on a device"
    names = ("arguments", "temporary", "peak", "counted", "ratio", "seconds")
    lines = [f"{title:46}" + "".join(f"{name:>11}" for name in names)]
    for program in programs:
        if program.problem is not None:
            lines.append(f"{program.name:46}{program.problem}")
            continue
        counted = plan.of_program(program.name)
        sizes = (program.argument_bytes, program.temp_bytes, program.peak_bytes, counted)
        cells = "".join(f"{size / _GIB:11.3f}" for size in sizes)
        lines.append(
            f"{program.name:46}{cells}{counted / program.peak_bytes:11.2f}{program.compile_seconds:11.0f}"
        )
    tile = min(
        plan.workload.config.estimator.tile, plan.workload.micro_rows * plan.workload.columns
    )
    widest = max(
        (program.most_logit_rows for program in programs if program.name in ("teacher", "update")),
        default=0,
    )
    tokens = plan.workload.micro_rows * plan.workload.columns
    lines.append(
        f"logits of at most {widest:,} tokens stand in one array; a tile has {tile:,}, a micro-batch {tokens:,} on a device"
    )
    return "\n".join(lines)


def _traffic(program: Program) -> str:
    """Collectives of a program by kind and loop, those that send most first."""
    if not program.collectives:
        return ""
    lines = [f"{program.name + ': collectives':20}{'':>4}{'runs':>14}{'MiB':>12}  in the loop"]
    for row in traffic(program.collectives):
        runs = f"{row.runs}{' a round' if row.is_open else ''}"
        lines.append(
            f"{row.kind:20}{row.instructions:>4}{runs:>14}{row.num_bytes / _MIB:>12.1f}  {_place(row.loop)}"
        )
    return "\n".join(lines)


def _place(loop: str | None) -> str:
    """The innermost loop by the end of its name; the rest of it repeats how it was reached."""
    return "(no loop)" if loop is None else " > ".join(_short(name) for name in loop.split(" > "))


def _short(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("closed_call", "body", "checkpoint")]
    return "/".join(parts[-2:])


def verdict(plan: Plan, programs: list[Program] | None = None) -> str:
    """One line a phase that does not fit, or one that says that all do."""
    lines = []
    for phase in plan.phases:
        if (item := plan.first_over(phase)) is not None:
            lines.append(
                f"does not fit: {phase} holds {plan.held(phase) / _GIB:.2f} GiB of {plan.capacity / _GIB:.2f}; the first item too many is "
                f"{item.name!r}, the largest {plan.largest(phase).name!r}"
            )
    lines += [
        f"does not fit: {program.name}: {program.problem}"
        for program in programs or ()
        if program.problem is not None
    ]
    for program in programs or ():
        beside = max(plan.beside(phase) for phase in PROGRAMS[program.name])
        if program.problem is None and program.peak_bytes + beside > plan.capacity:
            held = (
                f"{program.peak_bytes / _GIB:.2f} GiB as compiled and {beside / _GIB:.2f} beside it"
            )
            lines.append(
                f"does not fit: {program.name} holds {held}, of {plan.capacity / _GIB:.2f}"
            )
    fullest = max(plan.phases, key=plan.held)
    return (
        "\n".join(lines)
        or f"fits: {fullest} holds most, {plan.held(fullest) / _GIB:.2f} of {plan.capacity / _GIB:.2f} GiB"
    )


def fits(plan: Plan, programs: list[Program] | None = None) -> bool:
    """Whether neither the arithmetic nor the compiler found something too large."""
    return verdict(plan, programs).startswith("fits")
