"""Collectives and the largest logits of a compiled program, read from its HLO text."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any, NamedTuple

_KINDS = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"}
_KINDS |= {"collective-permute", "collective-broadcast"}
# The names of the other types hold their width: bf16, s32, f8e4m3fn.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$")
_CALLEES = re.compile(
    r"(?:calls|to_apply|body|condition|(?:true|false)_computation)=%[\w.-]+"
    r"|branch_computations=\{[^}]*\}"
)


class Collective(NamedTuple):
    """An instruction by which devices exchange data."""

    kind: str
    num_bytes: int  # on a device, per run: the larger of operands and results
    loop: str | None  # the while loops around it, outermost first; None: it runs once
    times: int  # runs; a loop of unknown trip count counts as one round
    is_open: bool  # whether a loop around it has an unknown trip count


class _Instruction(NamedTuple):
    computation: str
    name: str
    type: str
    opcode: str
    rest: str


def collectives(text: str) -> list[Collective]:
    """Return the collectives of a compiled module, `as_text()`; a start and its done are one."""
    instructions = _instructions(text)
    sizes = {(each.computation, each.name): _num_bytes(each.type) for each in instructions}
    callers, counts = _callers(instructions), _counts(instructions)
    found, seen = [], set()
    for each in instructions:
        kind, caller = each.opcode.removesuffix("-start"), callers.get(each.computation)
        # XLA for TPU spreads one collective over several fusions, which each repeat the
        # instruction. Outside fusions, several collectives of one shape may share a channel.
        channel = re.search(r"channel_id=(\d+)", each.rest)
        is_spread = channel and caller is not None and caller.opcode == "fusion"
        if kind not in _KINDS or (is_spread and (kind, channel.group(1)) in seen):
            continue
        if is_spread:
            seen.add((kind, channel.group(1)))
        operands = _NAME.findall(each.rest.partition(")")[0])
        received = sum(sizes.get((each.computation, name), 0) for name in operands)
        returned = _num_bytes(each.type)
        if each.opcode != kind and each.type.startswith("(") and kind != "all-reduce":
            returned -= received  # such a start returns its operands next to its results
        # XLA for TPU implements a reduce-scatter as a computation of this name: an all-reduce and a
        # slice in one kernel.
        kind = "reduce-scatter" if each.computation.startswith("all-reduce-scatter") else kind
        around = _loops_around(each.computation, callers, counts)
        found.append(Collective(kind, max(received, returned), *around))
    return found


def traffic(found: list[Collective]) -> list[dict[str, Any]]:
    """Group collectives by kind and loop, the largest number of bytes of all runs first."""
    rows = []
    for kind, loop in dict.fromkeys((each.kind, each.loop) for each in found):
        group = [each for each in found if (each.kind, each.loop) == (kind, loop)]
        row = {"kind": kind, "loop": loop, "instructions": len(group)}
        row["runs"] = sum(each.times for each in group)
        row["num_bytes"] = sum(each.num_bytes * each.times for each in group)
        rows.append(row | {"is_open": any(each.is_open for each in group)})
    return sorted(rows, key=lambda row: -row["num_bytes"])


def most_rows(text: str, widths: Collection[int], sides: Collection[int]) -> int:
    """Return the most rows of any array whose last dimension is in `widths`, without matrices whose
    number of rows is in `sides`. With the vocabulary on a device and the models' widths, this is
    the number of tokens whose logits exist at once: heads [V, D] and transposes are not counted.
    """
    most = 0
    for dims in {match.group(2) for match in _SHAPE.finditer(text)}:
        *rows, width = [int(size) for size in dims.split(",") if size] or [0]
        if width in widths and not (len(rows) == 1 and rows[0] in sides):
            most = max(most, math.prod(rows))
    return most


def _instructions(text: str) -> list[_Instruction]:
    computation, found = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header.group(1)
        elif instruction := _INSTRUCTION.match(line):
            found.append(_Instruction(computation, *instruction.groups()))
    return found


def _callers(instructions: list[_Instruction]) -> dict[str, _Instruction]:
    """Return for each computation the instruction that calls it first."""
    callers = {}
    for each in instructions:
        for name in _NAME.findall(" ".join(_CALLEES.findall(each.rest))):
            callers.setdefault(name, each)
    return callers


def _counts(instructions: list[_Instruction]) -> dict[str, int]:
    """Return for each condition of a while loop the constant that it counts up to, from 0."""
    constants, found = {}, {}  # an operand is defined before it is used
    for each in instructions:
        if each.opcode == "constant" and (value := re.match(r"(\d+)\)", each.rest)):
            constants[each.computation, each.name] = int(value.group(1))
        elif each.opcode == "compare" and "direction=LT" in each.rest:
            limit = re.match(r"%[\w.-]+, %([\w.-]+)\)", each.rest)
            if limit and (each.computation, limit.group(1)) in constants:
                found[each.computation] = constants[each.computation, limit.group(1)]
    return found


def _loops_around(
    computation: str, callers: dict[str, _Instruction], counts: dict[str, int]
) -> tuple[str | None, int, bool]:
    """Return `Collective.loop`, `times` and `is_open` of the instructions of a computation."""
    loops, times, is_open = [], 1, False
    while caller := callers.get(computation):
        if caller.opcode == "while":
            operation = re.search(r'op_name="([^"]*)"', caller.rest)
            loops.insert(0, operation.group(1) if operation else caller.name)
            # The trip count is in XLA's annotation or in the loop's condition.
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', caller.rest)
            condition = re.search(r"condition=%([\w.-]+)", caller.rest).group(1)
            rounds = int(known.group(1)) if known else counts.get(condition)
            times, is_open = times * (rounds or 1), is_open or rounds is None
        computation = caller.computation
    return " > ".join(loops) or None, times, is_open


def _num_bytes(type_: str) -> int:
    total = 0
    for name, dims in _SHAPE.findall(type_):
        bits = _BITS[name] if name in _BITS else int(re.search(r"\d+", name).group())
        total += math.prod(int(size) for size in dims.split(",") if size) * bits
    return total // 8
