"""The tensors of a safetensors file, read straight into the memory that will hold them."""

from __future__ import annotations

import dataclasses
import math
import mmap
import pathlib

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from opdjax.runs.bounds import WEIGHTS_HEADER_BYTES, BoundedError, parse_json

STORED_DTYPES = {  # of weights, by the format's name
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}


class CheckpointError(BoundedError):
    """The directory is not a readable checkpoint: a file, tensor or shape is missing or wrong."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a file holds a tensor."""

    file: pathlib.Path
    kind: str  # a name of STORED_DTYPES, or one of the format's other dtypes
    shape: tuple[int, ...]
    start: int  # its first byte

    def mapped(self) -> np.ndarray:
        """The tensor as a view of the file, which is in memory while the view exists."""
        dtype = STORED_DTYPES[self.kind]
        return np.asarray(np.memmap(self.file, dtype, "r", self.start, self.shape))

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Write the slice at `index` to `out`, a contiguous array of any dtype."""
        (first, *_), *others = (part.indices(size) for part, size in zip(index, self.shape))
        has_whole_rows = others == [(0, size, 1) for size in self.shape[1:]]
        if not has_whole_rows or out.dtype != STORED_DTYPES[self.kind]:
            out[...] = self.mapped()[index]
            return
        with self.file.open("rb") as file:
            file.seek(self.start + first * math.prod(self.shape[1:]) * out.itemsize)
            if file.readinto(out.reshape(-1).view(np.uint8)) != out.nbytes:
                raise CheckpointError(f"{self.file} has become shorter; download or copy it again")


def aligned_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in pages of its own, which `jax.device_put` on a CPU takes without a copy because
    they are aligned; freed, they return to the system.
    """
    # numpy would ask for huge pages, which a machine short of them makes slower than the read.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=private)
    return np.frombuffer(memory, dtype).reshape(shape)


def open_weights(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name; CheckpointError if it is damaged."""
    try:
        if not path.is_file():
            raise SafetensorError("it is no regular file")
        with path.open("rb") as file:  # the header says how large it is; the library takes 100 MB
            size = int.from_bytes(file.read(8), "little")
            if size > WEIGHTS_HEADER_BYTES:
                raise SafetensorError(
                    f"its header has {size} bytes; {WEIGHTS_HEADER_BYTES} are many"
                )
            with safe_open(path, framework="numpy"):  # it checks every dtype, shape and offset
                header = parse_json(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        found = f"it has {path.stat().st_size} bytes" if path.is_file() else "it is not a file"
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {error}; it may be truncated: download or "
            f"copy it again ({found})"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path, each["dtype"], tuple(each["shape"]), 8 + size + each["data_offsets"][0]
        )
        for name, each in header.items()
    }
