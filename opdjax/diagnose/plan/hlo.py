"""What a compiled program says of itself: its collectives, and the largest arrays with a vocabulary
dimension. Text in, numbers out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
}  # the other types end in their width: bf16, s32, f8e4m3fn
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>.*?) (?P<opcode>[a-z][a-z0-9-]*)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.-]+) \(.*\{$")
_CALLEES = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction by which devices exchange data."""

    kind: str
    num_bytes: int  # on a device, each time: the larger of what goes in and what comes out
    loop: str | None  # the while loops that it stands in, outermost first; None: it runs once
    times: (
        int  # that it runs, each loop around it whose rounds only the data tell taken as one round
    )
    is_open: bool  # whether there is such a loop
    source: str  # the operation of the program that it was made for


@dataclasses.dataclass(frozen=True)
class _Instruction:
    computation: str
    name: str
    type: str
    opcode: str
    rest: str

    @property
    def source(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else self.name


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled module (`compiled.as_text()`); a start and its done are one."""
    instructions = _instructions(text)
    sizes = {(each.computation, each.name): _num_bytes(each.type) for each in instructions}
    callers, counts = _callers(instructions), _counts(instructions)
    found, seen = [], set()
    for each in instructions:
        kind = each.opcode.removesuffix("-start")
        if kind not in _KINDS:
            continue
        # XLA for TPU spreads one collective over several fusions, between which it goes on; each
        # repeats the instruction. Elsewhere a channel may be shared by collectives of one shape.
        caller, channel = callers.get(each.computation), re.search(r"channel_id=(\d+)", each.rest)
        if channel and caller is not None and caller.opcode == "fusion":
            if (kind, channel.group(1)) in seen:
                continue
            seen.add((kind, channel.group(1)))
        operands = re.findall(r"%([\w.-]+)", each.rest.partition(")")[0])
        given, made = (
            sum(sizes.get((each.computation, name), 0) for name in operands),
            _num_bytes(each.type),
        )
        if each.opcode != kind and each.type.startswith("(") and kind != "all-reduce":
            made -= given  # such a start returns its operands beside its results
        # XLA for TPU keeps a reduce-scatter as a computation of that name, an all-reduce and a
        # slice in one kernel.
        kind = "reduce-scatter" if each.computation.startswith("all-reduce-scatter") else kind
        loops, times, is_open = _loops_around(each.computation, callers, counts)
        found.append(
            Collective(
                kind, max(given, made), " > ".join(loops) or None, times, is_open, each.source
            )
        )
    return found


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one place."""

    kind: str
    loop: str | None
    instructions: int
    runs: int  # as `Collective.times`, all of them together
    num_bytes: int  # of all runs
    is_open: bool


def traffic(found: list[Collective]) -> list[Traffic]:
    """Collectives by kind and loop, those that send most first."""
    groups: dict[tuple[str, str | None], list[Collective]] = {}
    for each in found:
        groups.setdefault((each.kind, each.loop), []).append(each)
    rows = [
        Traffic(
            kind,
            loop,
            len(members),
            sum(each.times for each in members),
            sum(each.num_bytes * each.times for each in members),
            any(each.is_open for each in members),
        )
        for (kind, loop), members in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.num_bytes)


def most_rows(text: str, widths: Collection[int], sides: Collection[int]) -> int:
    """The most rows that any array has whose last dimension is one of `widths`; a matrix with as
    many rows as one of `sides` aside.

    With `widths` the vocabulary on a device and `sides` the models' widths it tells how many
    tokens' logits are held at once: an unembedding is [V, D], and its transpose is no logits
    either.
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
            computation = header["name"]
        elif instruction := _INSTRUCTION.match(line):
            found.append(
                _Instruction(computation, *instruction.group("name", "type", "opcode", "rest"))
            )
    return found


def _callers(instructions: list[_Instruction]) -> dict[str, _Instruction]:
    """Computation -> the instruction that calls it."""
    callers = {}
    for each in instructions:
        for one, several in _CALLEES.findall(each.rest):
            for name in [one] if one else re.findall(r"%([\w.-]+)", several):
                callers.setdefault(name, each)
    return callers


def _counts(instructions: list[_Instruction]) -> dict[str, int]:
    """Condition of a while loop -> the constant that it counts up to, from 0 as a scan does."""
    constants = {}
    for each in instructions:
        if each.opcode == "constant" and (value := re.match(r"(\d+)\)", each.rest)):
            constants[each.computation, each.name] = int(value.group(1))
    found = {}
    for each in instructions:
        if each.opcode == "compare" and "direction=LT" in each.rest:
            limit = re.match(r"%[\w.-]+, %([\w.-]+)\)", each.rest)
            if limit and (each.computation, limit.group(1)) in constants:
                found[each.computation] = constants[each.computation, limit.group(1)]
    return found


def _rounds(loop: _Instruction, counts: dict[str, int]) -> int | None:
    """How often a while loop goes round: as XLA wrote beside it, or as its condition says; None
    where neither does.
    """
    written = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    return (
        int(written.group(1))
        if written
        else counts.get(re.search(r"condition=%([\w.-]+)", loop.rest).group(1))
    )


def _loops_around(
    computation: str, callers: dict[str, _Instruction], counts: dict[str, int]
) -> tuple[list[str], int, bool]:
    """(names of the while loops around a computation, outermost first; rounds of those that tell;
    whether one does not).
    """
    loops, times, is_open = [], 1, False
    while caller := callers.get(computation):
        if caller.opcode == "while":
            loops.append(caller.source)
            rounds = _rounds(caller, counts)
            times, is_open = times * (rounds or 1), is_open or rounds is None
        computation = caller.computation
    return loops[::-1], times, is_open


def _num_bytes(type_: str) -> int:
    total = 0
    for name, dims in _SHAPE.findall(type_):
        bits = _BITS[name] if name in _BITS else int(re.search(r"\d+", name).group())
        total += math.prod(int(size) for size in dims.split(",") if size) * bits
    return total // 8
