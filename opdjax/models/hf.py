"""Hugging Face checkpoints: safetensors read by the family's name table.

A checkpoint directory holds `config.json`, `model.safetensors` (or several files with an index), a
tokenizer and optionally a generation config.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open

from opdjax.config import MINI_PAIR, MINI_STUDENT, MINI_TEACHER, STUDENT
from opdjax.config.validation import nearest
from opdjax.models.decoder import DecoderConfig, Params, abstract_params, num_parameters
from opdjax.models.families import Family, family_of
from opdjax.models.partitioning import WEIGHT_AXES, shardings_of
from opdjax.runs.object_store import is_remote, local_copy

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_CONFIGS = ("config.json", "generation_config.json")
_COPIED = (
    "tokenizer*",
    "*.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_STORED = ("F32", "BF16", "F16", "F64")  # dtypes of safetensors that can be cast to those
_SAMPLE_BYTES = 2**20


class CheckpointError(ValueError):
    """The directory is not a readable checkpoint: a file, tensor or shape is missing or wrong."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The description of a checkpoint directory, without weights."""

    path: pathlib.Path
    raw_config: dict[str, Any]
    family: Family
    config: DecoderConfig
    stop_token_ids: tuple[int, ...]  # eos_token_id of the generation config, else of the config
    stored_dtype: str

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return num_parameters(self.config)


def open_checkpoint(
    path_or_id: str | os.PathLike, revision: str | None = None, *, with_weights: bool = True
) -> Checkpoint:
    """Describe a local directory, a hub repository (downloaded to the hub's cache), or a built-in
    model (`@mini_student`). Raises CheckpointError and UnsupportedModelError.

    Without weights, config.json is enough, and only the configs of a repository are downloaded.
    """
    path = _resolve(str(path_or_id), revision, _FILES if with_weights else _CONFIGS)
    raw = _read_json(path / "config.json")
    family = family_of(raw)
    try:
        config = family.read_config(raw)
    except KeyError as error:
        raise CheckpointError(f"{path / 'config.json'} lacks the field {error}") from error
    stop_ids, generation = _read_stop_ids(path / "config.json", raw, config.vocab_size), {}
    if (file := path / "generation_config.json").exists():
        generation = _read_json(file)
    if "eos_token_id" in generation:
        stop_ids = _read_stop_ids(file, generation, config.vocab_size)
    stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(stored, str):
        raise CheckpointError(
            f"{path / 'config.json'} sets dtype {stored!r}; expected the name of a dtype, such as "
            "'bfloat16'"
        )
    return Checkpoint(path, raw, family, config, stop_ids, stored)


def _read_stop_ids(file: pathlib.Path, values: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    found = values.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise CheckpointError(
            f"{file} sets eos_token_id {found!r}; expected an id from 0 to {vocab_size - 1}, or a "
            "list of them"
        )
    return tuple(ids)


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of the config and of the weight files: their sizes and three samples of each. It is
    cheap and still detects another model.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.raw_config, sort_keys=True).encode())
    for file in sorted(set(_locate_tensors(checkpoint.path).values())):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for start in (0, size // 2, max(size - _SAMPLE_BYTES, 0)):
                weights.seek(start)
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def load_params(
    checkpoint: Checkpoint,
    dtype: str,
    mesh: Mesh | None = None,
    split_over: tuple[str, ...] = WEIGHT_AXES,
) -> Params:
    """The stacked parameters that the decoder takes, cast to `dtype`; on a `mesh`, sharded by
    `models/partitioning.py`.

    Each process reads the slices of its own devices, one at a time, so that no host holds the whole
    model. CheckpointError lists the tensors that are missing, unexpected or of another shape.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"cannot load as {dtype!r}; expected one of {sorted(DTYPES)}")
    located = _locate_tensors(checkpoint.path)
    _check_tensors(checkpoint, located)
    global_names, layer_names = checkpoint.family.names(checkpoint.config)
    params = abstract_params(checkpoint.config, DTYPES[dtype])
    shardings = [] if mesh is None else [shardings_of(params, mesh, split_over)]

    with _Files() as files:

        def read_global(name, index):
            return files.read(located, global_names[name], index)

        def read_layers(name, index):
            layers, *inside = index
            numbers = range(*layers.indices(checkpoint.config.num_layers))
            tensors = (layer_names[name].format(i=number) for number in numbers)
            return np.stack([files.read(located, tensor, tuple(inside)) for tensor in tensors])

        def load(path, leaf, sharding=None):
            read = partial(read_layers if len(path) == 2 else read_global, path[-1].key)
            if sharding is None:
                return jnp.asarray(read((slice(None),) * len(leaf.shape)).astype(leaf.dtype))
            return _place(leaf.shape, sharding, lambda index: read(index).astype(leaf.dtype))

        return jax.tree_util.tree_map_with_path(load, params, *shardings)


def _place(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """The array with this sharding. Each slice of this process is read once, even if several of its
    devices hold it, and then released.
    """
    holders: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        values = read(tuple(slice(*bound) for bound in bounds))
        shards += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _resolve(path_or_id: str, revision: str | None, wanted: tuple[str, ...]) -> pathlib.Path:
    if path_or_id.startswith("@"):
        return _built_in(path_or_id)
    if is_remote(path_or_id):
        is_wanted = lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in wanted)
        return local_copy(path_or_id, is_wanted)
    path = pathlib.Path(os.path.expanduser(path_or_id))
    if path_or_id and path.is_dir():
        return path
    is_id = path_or_id.count("/") == 1 and not path_or_id.startswith((".", "/", "~"))
    if not is_id:
        raise CheckpointError(f"{path_or_id!r} is neither a directory nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(path_or_id, revision=revision, allow_patterns=list(wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{path_or_id!r} is not a local directory, and downloading it from the hub failed: "
            f"{error}"
        ) from error
    return pathlib.Path(path)


def _built_in(name: str) -> pathlib.Path:
    built_in = {MINI_TEACHER: MINI_PAIR / "teacher", MINI_STUDENT: MINI_PAIR / "student"}
    if name == STUDENT:
        raise CheckpointError(
            f"{name!r} is a teacher's name for the student of its run; expected a model: a "
            f"directory, a hub id or {MINI_STUDENT}"
        )
    if name not in built_in:
        raise CheckpointError(
            f"{name!r} is not a built-in model; {nearest(name, built_in)} (write ./{name} for a "
            "directory of that name)"
        )
    return built_in[name]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} has no {path.name}; expected a Hugging Face checkpoint directory"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; expected a file of a Hugging Face checkpoint"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _locate_tensors(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name -> file."""
    if (path / INDEX).exists():
        weight_map = _read_json(path / INDEX).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        if not files or not all(isinstance(file, str) for file in files):
            raise CheckpointError(
                f"{path / INDEX} has no weight_map; expected tensor names and their files"
            )
        absent = sorted({file for file in files if not (path / file).is_file()})
        if absent:
            raise CheckpointError(
                f"{path / INDEX} names files that do not exist (download them too): "
                f"{', '.join(absent)}"
            )
        return {name: path / file for name, file in weight_map.items()}
    if not (path / SINGLE).exists():
        raise CheckpointError(
            f"{path} has neither {SINGLE} nor {INDEX}; convert the weights to safetensors first"
        )
    with _Files() as files:
        return dict.fromkeys(files.open(path / SINGLE).keys(), path / SINGLE)


class _Files:
    """Open safetensors files, each opened once."""

    def __init__(self):
        self._open: dict[pathlib.Path, Any] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._open.clear()

    def open(self, path: pathlib.Path):
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a readable safetensors file: {error}; it may be truncated: "
                    f"download or copy it again ({_size(path)})"
                ) from error
        return self._open[path]

    def read(self, located, name, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or its slice at `index`; only the slice is read from the file."""
        return self._get(located[name], "get_slice", name)[index or ...]

    def shape(self, located, name) -> tuple[int, ...]:
        return tuple(self._get(located[name], "get_slice", name).get_shape())

    def stored_type(self, located, name) -> str:
        return self._get(located[name], "get_slice", name).get_dtype()

    def _get(self, path, method, name):
        try:
            return getattr(self.open(path), method)(name)
        except SafetensorError as error:  # an index that names the wrong file
            raise CheckpointError(f"{path} does not hold the tensor {name}: {error}") from error


def _size(path: pathlib.Path) -> str:
    return f"it has {path.stat().st_size} bytes" if path.is_file() else "it is not a file"


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as the config implies."""
    global_names, layer_names = checkpoint.family.names(checkpoint.config)
    params = abstract_params(checkpoint.config)
    expected = {tensor: params[name].shape for name, tensor in global_names.items()}
    for name, template in layer_names.items():
        for layer in range(checkpoint.config.num_layers):
            expected[template.format(i=layer)] = params["layers"][name].shape[1:]
    return expected


def _check_tensors(checkpoint: Checkpoint, located: dict[str, pathlib.Path]) -> None:
    expected = tensor_shapes(checkpoint)
    # Old Llama checkpoints store the rotary frequencies of each layer, which config.json implies.
    extra = {name for name in located if not name.endswith(".rotary_emb.inv_freq")} - set(expected)
    problems = [f"missing tensor {name}" for name in sorted(set(expected) - set(located))]
    with _Files() as files:
        for name in sorted(extra):
            if not _is_tied_copy(checkpoint, located, files, name):
                problems.append(f"unexpected tensor {name}")
        for name in sorted(set(expected) & set(located)):
            found = files.shape(located, name)
            if found != expected[name]:
                problems.append(f"{name} has shape {found}; config.json implies {expected[name]}")
            if (kind := files.stored_type(located, name)) not in _STORED:
                problems.append(
                    f"{name} is stored as {kind}; expected one of {', '.join(_STORED)}, weights "
                    "that are not quantized"
                )
    if problems:
        wrong = f"{checkpoint.path} does not hold the model that its config.json describes:"
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise CheckpointError("\n  ".join([wrong, *problems[:20], *more]))


def _is_tied_copy(checkpoint, located, files, name) -> bool:
    """Whether the tensor is the unembedding of a tied model, and equal to the embedding: some
    checkpoints store both.
    """
    head, embedding = (checkpoint.family.global_names[key] for key in ("head", "embedding"))
    if not checkpoint.config.ties_embeddings or name != head or embedding not in located:
        return False
    return np.array_equal(files.read(located, name), files.read(located, embedding))
