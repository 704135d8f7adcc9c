"""A plan as text."""

from __future__ import annotations

import itertools
import operator
import re
from collections import defaultdict
from collections.abc import Iterable

from opdjax.diagnose.plan.aot import Program
from opdjax.diagnose.plan.estimate import PROGRAMS, Plan
from opdjax.diagnose.plan.hlo import traffic
from opdjax.models.decoder import DecoderConfig, num_parameters
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
    mesh = " x ".join(f"{axis} {size}" for axis, size in workload.layout.shape.items())
    generating = config.mesh.generator_devices(topology.chips) if near.generator == "thread" else 0
    idle = topology.chips - workload.layout.size - generating
    text = f"{topology.name} ({topology.chip.note})" if topology.chip.note else topology.name
    text += f": {topology.chips} devices of {plan.capacity / _GIB:.2f} GiB"
    text += f", {topology.hosts} host{'s' if topology.hosts > 1 else ''}; mesh {mesh}"
    text += f"; {generating} devices generate" if generating else ""
    text += f"; {idle} devices are idle" if idle > 0 else ""
    text += f"\nparameters: {_parameters('student', workload.student)}"
    if workload.teacher is not None and not workload.has_reference:
        text += f"; {_parameters('teacher', workload.teacher)}"
    text += f"\na step: {config.rows_per_step} rows of {workload.prompt_columns}"
    text += f" + {config.sampling.max_completion_length} tokens"
    text += f", packed into rows of {packed}" if packed else ""
    text += f"; on a device {workload.rows} rows, {workload.micro_rows} at a time"
    text += f" ({config.train.gradient_accumulation_steps} micro-batches)"
    if near.schedule != "none":
        text += "\nrollouts are asynchronous: everything is counted on the learner's devices, "
        text += "as if every step sampled and scored its own"
    return text


def _parameters(role: str, model: DecoderConfig) -> str:
    text = f"{role} {num_parameters(model):,}"
    if model.num_experts:
        text += f", of which {num_parameters(model, of_token=True):,} act on a token"
    return text


def _line(name: str, cells: Iterable[str], width: int = 12) -> str:
    return f"{name:46}" + "".join(f"{cell:>{width}}" for cell in cells)


def _memory(plan: Plan) -> str:
    phases, held = plan.phases, [plan.held(phase) for phase in plan.phases]
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
    seconds = sum(x.seconds for x in bounds)
    flops = "10^12 floating-point operations, all devices"
    lines = [
        _line("work of a step", PROGRAMS),
        _line(flops, (f"{x.flops / 1e12:.1f}" for x in bounds)),
        _line("least seconds, without communication", (f"{x.seconds:.3f}" for x in bounds)),
        _line("limited by", (limit(x) if x.seconds else "" for x in bounds)),
    ]
    most = f"at most {tokens:,} completion tokens a step, in at least {seconds:.2f} s: "
    return "\n".join([*lines, f"{most}{tokens / seconds:,.0f} a second"])


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
    rows = [each.most_logit_rows for each in programs if each.name in ("teacher", "update")]
    most = f"the largest array of logits holds {max(rows, default=0):,} tokens; "
    most += f"a tile has {min(TILE, tokens):,}, a micro-batch {tokens:,} on a device"
    return "\n".join([*lines, most])


def _traffic(program: Program) -> str:
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
    holds = lambda phase: f"{plan.held(phase) / _GIB:.2f} of {capacity}"
    for phase in plan.phases:
        items, size = plan.items_in(phase), operator.attrgetter("num_bytes")
        totals = itertools.accumulate(map(size, items))
        if over := [item for item, total in zip(items, totals) if total > plan.capacity]:
            text = f"{phase} holds {holds(phase)}; the first item that does not fit is "
            problems.append(f"{text}{over[0].name!r}, the largest is {max(items, key=size).name!r}")
    for program in programs or ():
        outside = max(plan.outside_bytes(phase) for phase in PROGRAMS[program.name])
        if program.problem is not None:
            problems.append(f"{program.name}: {program.problem}")
        elif program.peak_bytes + outside > plan.capacity:
            text = f"{program.name} holds {program.peak_bytes / _GIB:.2f} GiB as compiled and "
            problems.append(f"{text}{outside / _GIB:.2f} outside the program, of {capacity}")
    fullest = max(plan.phases, key=plan.held)
    most = f"fits: {fullest} holds most, {holds(fullest)}"
    return "\n".join(f"does not fit: {problem}" for problem in problems) or most


def fits(plan: Plan, programs: list[Program] | None = None) -> bool:
    """Return whether everything fits by the estimate and, with programs, by the compiler."""
    return verdict(plan, programs).startswith("fits")
