"""The sampler's schedule, planned on the host from the prompts and the free slots: which prompts
are prefilled together, and which row each free slot starts.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from functools import partial

import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from opdjax.config.validation import require
from opdjax.data.prompts import padded_width
from opdjax.ops.sharding import num_row_shards
from opdjax.types import PromptBatch

# Columns. Attention over a shorter ring is so cheap that another program is not worth compiling.
_SHORTEST_RING = 128
BLOCKS_PER_FILL = 4  # number of prompt blocks whose rows fill all slots


@dataclasses.dataclass(frozen=True)
class PromptBlock:
    """Prompts that are prefilled together: padded to one width, and to `size` by empty prompts."""

    width: int
    prompts: tuple[int, ...]
    size: int

    def read(self, batch: PromptBatch) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask, `[size, width]`."""
        tokens = np.zeros((self.size, self.width), np.int32)
        mask = np.zeros((self.size, self.width), bool)
        count, chosen = len(self.prompts), list(self.prompts)
        tokens[:count] = np.asarray(batch.tokens)[chosen, -self.width :]
        mask[:count] = np.asarray(batch.mask)[chosen, -self.width :]
        return tokens, mask

    def rows(self, num_generations: int) -> Iterator[tuple[int, int]]:
        """(row of the block, row of the rollouts) of every completion of these prompts."""
        for block_row, prompt in enumerate(self.prompts):
            for number in range(num_generations):
                yield block_row, prompt * num_generations + number


def prompt_blocks(mask: Bool[np.ndarray, "P T"], size: int) -> Iterator[PromptBlock]:
    """Blocks of all prompts that have tokens, the widest first; all prompts of a block share one
    width.
    """
    lengths = mask.sum(axis=1)
    widths = np.array([min(padded_width(int(length)), mask.shape[1]) for length in lengths])
    for width in sorted({int(width) for width in widths[lengths > 0]}, reverse=True):
        members = np.flatnonzero((widths == width) & (lengths > 0)).tolist()
        for start in range(0, len(members), size):
            yield PromptBlock(width, tuple(members[start : start + size]), size)


def block_size(slots: int, num_generations: int, mesh: Mesh | None) -> int:
    """Prompts that are prefilled together. It does not depend on the prompts, so that one program
    serves every block of a width.
    """
    shards = num_row_shards(mesh)
    return -(-slots // (num_generations * BLOCKS_PER_FILL * shards)) * shards


def require_slots(slots: int | None, shards: int) -> None:
    """ConfigError if the slots cannot be divided evenly among the devices that rows are on."""
    expected = f"a multiple of {shards}, the number of devices that rows are sharded over "
    expected += "(mesh.data x mesh.fsdp)"
    require(slots is None or slots % shards == 0, "sampling.slots", slots, expected)


def num_slots(slots: int | None, rows: int, mesh: Mesh | None) -> int:
    """Rows decoded at a time; ConfigError if they cannot be divided evenly among the devices."""
    shards = num_row_shards(mesh)
    require_slots(slots, shards)
    most = -(-rows // shards) * shards
    return most if slots is None else min(slots, most)


def ring_sizes(length: int) -> list[int]:
    """Powers of two in ascending order, then the longest completion: no row needs a longer ring."""
    sizes = [_SHORTEST_RING << i for i in range(length.bit_length())]
    return [*(size for size in sizes if 2 * size <= length), length]


@struct.dataclass
class Assignments:
    """The row that each slot starts, `[S]`."""

    block_row: Int[Array, " S"]  # of the block prefilled last; -1: the slot keeps its row
    row: Int[Array, " S"]  # of the rollouts
    prompt_id: Int[Array, " S"]
    sample_id: Int[Array, " S"]


@struct.dataclass
class RowIds:
    """Ids of all rows, `[B]`; rows of one prompt are adjacent."""

    prompt_id: Int[Array, " B"]
    sample_id: Int[Array, " B"]

    @classmethod
    def of(cls, prompts: PromptBatch, num_generations: int, first_sample: int) -> RowIds:
        """Ids of `num_generations` completions of each prompt."""
        # A prompt can occur twice in a batch (a step may end one epoch and begin the next); its
        # second occurrence must get other completions.
        count, occurrence = len(prompts.prompt_id), prompts.occurrence
        occurrence = np.zeros(count, np.int32) if occurrence is None else np.asarray(occurrence)
        numbers = np.tile(np.arange(num_generations, dtype=np.int32), count)
        repeat = partial(np.repeat, repeats=num_generations)
        return cls(
            repeat(np.asarray(prompts.prompt_id, np.int32)),
            first_sample + repeat(occurrence) * num_generations + numbers,
        )

    def assign(
        self, waiting: deque[tuple[int, int]], free: Int[np.ndarray, " F"], slots: int
    ) -> Assignments:
        """Assign waiting rows to the free slots, in order, and remove them from `waiting`."""
        block_row, row = np.full(slots, -1, np.int32), np.zeros(slots, np.int32)
        for slot in free[: len(waiting)]:
            block_row[slot], row[slot] = waiting.popleft()
        return Assignments(block_row, row, self.prompt_id[row], self.sample_id[row])
