"""A plan as text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from opdjax.diagnose.plan.aot import Program
from opdjax.diagnose.plan.estimate import PROGRAMS, Plan
from opdjax.diagnose.plan.hlo import traffic
from opdjax.ops.vocab import TILE

_GIB, _MIB = 2**30, 2**20


def text(plan: Plan, programs: list[Program] | None = None) -> str:
    """Return the tables of the estimate and, with compiled programs, of the compiler's report."""
    blocks = [_heading(plan), _memory(plan), _work(plan)]
    if programs is not None:
        blocks += [_compiled(plan, programs), *(_traffic(program) for program in programs)]
    return "\n\n".join(block for block in [*blocks, verdict(plan, programs)] if block)


def _heading(plan: Plan) -> str:
    workload, topology, config = plan.workload, plan.workload.topology, plan.workload.config
    near, packed = config.near_policy, config.train.pack_length
    mesh = " x ".join(f"{axis} {size}" for axis, size in workload.mesh.items())
    generating = config.mesh.generator_devices(topology.chips) if near.generator == "thread" else 0
    idle = topology.chips - workload.devices - generating
    devices = f"{topology.name} ({topology.chip.note})" if topology.chip.note else topology.name
    devices += f": {topology.chips} devices of {plan.capacity / _GIB:.2f} GiB"
    devices += f", {topology.hosts} host{'s' if topology.hosts > 1 else ''}; mesh {mesh}"
    devices += f"; {generating} devices generate" if generating else ""
    devices += f"; {idle} devices are idle" if idle > 0 else ""
    rows = f"a step: {config.rows_per_step} rows of {workload.prompt_columns}"
    rows += f" + {config.sampling.max_completion_length} tokens"
    rows += f", packed into rows of {packed}" if packed else ""
    rows += f"; on a device {workload.rows} rows, {workload.micro_rows} at a time"
    rows += f" ({config.train.gradient_accumulation_steps} micro-batches)"
    note = "rollouts are asynchronous: everything is counted on the learner's devices, as if "
    note += "every step sampled and scored its own"
    return "\n".join([devices, rows, *([note] if near.schedule != "none" else [])])


def _line(name: str, cells: Iterable[str], width: int = 12) -> str:
    return f"{name:46}" + "".join(f"{cell:>{width}}" for cell in cells)


def _memory(plan: Plan) -> str:
    phases = plan.phases
    held = [plan.held(phase) for phase in phases]
    # Items of one name and different sizes in different phases share a line.
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    for item in plan.items:
        sizes[item.name] |= dict.fromkeys(item.phases, item.num_bytes)
    rows = {name: [each.get(phase, 0) for phase in phases] for name, each in sizes.items()}
    rows |= {"total": held, "free": [plan.capacity - each for each in held]}
    gib = lambda sizes: (f"{num_bytes / _GIB:.3f}" if num_bytes else "" for num_bytes in sizes)
    lines = [_line(name, gib(cells)) for name, cells in rows.items()]
    return "\n".join([_line("GiB on a device", phases), *lines])


def _work(plan: Plan) -> str:
    config, bounds = plan.workload.config, [plan.bounds[name] for name in PROGRAMS]
    limit = lambda bound: "memory" if bound.is_by_memory else "arithmetic"
    tokens = config.rows_per_step * config.sampling.max_completion_length
    seconds = sum(bound.seconds for bound in bounds)
    rows = {
        "work of a step": PROGRAMS,
        "10^12 floating-point operations, all devices": (f"{x.flops / 1e12:.1f}" for x in bounds),
        "least seconds, without communication": (f"{x.seconds:.3f}" for x in bounds),
        "limited by": (limit(x) if x.seconds else "" for x in bounds),
    }
    most = f"at most {tokens:,} completion tokens a step, in at least {seconds:.2f} s: "
    most += f"{tokens / seconds:,.0f} a second"
    return "\n".join([*(_line(name, cells) for name, cells in rows.items()), most])


def _compiled(plan: Plan, programs: list[Program]) -> str:
    names = ("arguments", "temporary", "peak", "counted", "ratio", "seconds")
    machine = plan.workload.topology.jax_name or plan.workload.topology.name
    lines = [_line(f"compiled for {machine}, GiB on a device", names, 11)]
    for program in programs:
        if program.problem is not None:
            lines.append(f"{program.name:46}{program.problem}")
            continue
        counted = plan.program_bytes(program.name)
        sizes = (program.argument_bytes, program.temp_bytes, program.peak_bytes, counted)
        ratio, seconds = counted / program.peak_bytes, program.compile_seconds
        cells = [*(f"{size / _GIB:.3f}" for size in sizes), f"{ratio:.2f}", f"{seconds:.0f}"]
        lines.append(_line(program.name, cells, 11))
    tokens = plan.workload.micro_rows * plan.workload.columns
    tile = min(TILE, tokens)
    rows = [each.most_logit_rows for each in programs if each.name in ("teacher", "update")]
    lines.append(
        f"the largest array of logits holds {max(rows, default=0):,} tokens; a tile has {tile:,}, "
        f"a micro-batch {tokens:,} on a device"
    )
    return "\n".join(lines)


def _traffic(program: Program) -> str:
    """Return the collectives of a program by kind and loop, the most bytes first."""
    if not program.collectives:
        return ""
    lines = [f"{program.name + ': collectives':20}{'':>4}{'runs':>14}{'MiB':>12}  in the loop"]
    for row in traffic(program.collectives):
        runs = f"{row['runs']}{' a round' if row['is_open'] else ''}"
        # Loops by the end of their names; the rest repeats the path to them.
        loop = re.sub(r"/(closed_call|body|checkpoint)\b", "", row["loop"] or "(no loop)")
        loop = " > ".join("/".join(path.split("/")[-2:]) for path in loop.split(" > "))
        cells = f"{row['instructions']:>4}{runs:>14}{row['num_bytes'] / _MIB:>12.1f}"
        lines.append(f"{row['kind']:20}{cells}  {loop}")
    return "\n".join(lines)


def verdict(plan: Plan, programs: list[Program] | None = None) -> str:
    """Return one line for each phase or program that does not fit, or one line if all fit."""
    problems, capacity = [], f"{plan.capacity / _GIB:.2f} GiB"
    for phase in plan.phases:
        largest = max(plan.items_in(phase), key=lambda item: item.num_bytes)
        if (item := plan.first_overflow(phase)) is not None:
            problems.append(
                f"{phase} holds {plan.held(phase) / _GIB:.2f} of {capacity}; the first item that "
                f"does not fit is {item.name!r}, the largest is {largest.name!r}"
            )
    for program in programs or ():
        outside = max(plan.outside_bytes(phase) for phase in PROGRAMS[program.name])
        if program.problem is not None:
            problems.append(f"{program.name}: {program.problem}")
        elif program.peak_bytes + outside > plan.capacity:
            problems.append(
                f"{program.name} holds {program.peak_bytes / _GIB:.2f} GiB as compiled and "
                f"{outside / _GIB:.2f} outside the program, of {capacity}"
            )
    fullest = max(plan.phases, key=plan.held)
    most = f"fits: {fullest} holds most, {plan.held(fullest) / _GIB:.2f} of {capacity}"
    return "\n".join(f"does not fit: {problem}" for problem in problems) or most


def fits(plan: Plan, programs: list[Program] | None = None) -> bool:
    """Return whether everything fits by the estimate and, with programs, by the compiler."""
    return verdict(plan, programs).startswith("fits")
