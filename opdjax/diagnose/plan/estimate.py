"""The estimate of `opdjax plan`: memory by phase and a lower bound on the time of a step."""

from __future__ import annotations

import dataclasses

from opdjax.diagnose.plan.duration import Bound, bounds_of
from opdjax.diagnose.plan.memory import PHASES, PROGRAMS, Item, items_of
from opdjax.diagnose.plan.workload import Workload


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs on a topology."""

    workload: Workload
    items: tuple[Item, ...]
    bounds: dict[str, Bound]  # by program

    @property
    def capacity(self) -> int:
        """Bytes of memory of a device."""
        return self.workload.topology.chip.hbm_bytes

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of this run."""
        evaluates = self.workload.config.evaluation.source is not None
        return tuple(phase for phase in PHASES if phase != "evaluate" or evaluates)

    @property
    def fits(self) -> bool:
        """Whether every phase fits into a device."""
        return all(self.held(phase) <= self.capacity for phase in self.phases)

    def items_in(self, phase: str) -> list[Item]:
        """Return the items held in a phase."""
        return [item for item in self.items if phase in item.phases]

    def held(self, phase: str) -> int:
        """Return the bytes that a device holds in a phase."""
        return sum(item.num_bytes for item in self.items_in(phase))

    def outside_bytes(self, phase: str) -> int:
        """Return the bytes held in a phase that its program does not receive."""
        return sum(item.num_bytes for item in self.items_in(phase) if phase in item.outside)

    def program_bytes(self, name: str) -> int:
        """Return the most bytes of a program: its arguments and what it makes."""
        return max(self.held(phase) - self.outside_bytes(phase) for phase in PROGRAMS[name])

    def first_overflow(self, phase: str) -> Item | None:
        """Return the first item, in the order of the table, that does not fit after the others."""
        total = 0
        for item in self.items_in(phase):
            total += item.num_bytes
            if total > self.capacity:
                return item
        return None

    def largest(self, phase: str) -> Item:
        """Return the largest item of a phase."""
        return max(self.items_in(phase), key=lambda item: item.num_bytes)


def estimate(workload: Workload) -> Plan:
    """Count what a run holds and computes."""
    return Plan(workload, items_of(workload), bounds_of(workload))
