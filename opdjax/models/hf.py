"""Hugging Face checkpoints: safetensors, in one file or several with an index, read by the family's
name table.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from opdjax.config import FrozenWeights
from opdjax.models.decoder import DecoderConfig, Params, abstract_params
from opdjax.models.families import Family, family_of
from opdjax.models.partitioning import WEIGHT_AXES, shardings_of
from opdjax.models.places import find
from opdjax.models.quantization import quantize, quantized_names, with_scales
from opdjax.models.stored_tensors import (
    STORED_DTYPES,
    CheckpointError,
    StoredTensor,
    aligned_array,
    open_weights,
)
from opdjax.runs.bounds import CONFIG_BYTES, MODEL_SIZE, parse_json, read_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of PEFT
_CONFIGS = ("config.json", "generation_config.json", ADAPTER_CONFIG)
DTYPES = {"float32": STORED_DTYPES["F32"], "bfloat16": STORED_DTYPES["BF16"]}
_SAMPLE_BYTES = 2**20
# Where a tensor goes: a parameter, and its index there: none, a layer, or a layer and an expert.
Place = tuple[str, tuple[int, ...]]
_MAX_STOP_STRINGS = 100


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The description of a PEFT directory with low-rank adapters."""

    path: pathlib.Path
    base: tuple[str, str | None]  # directory or hub id of its base model, and revision
    rank: int
    scale: float  # a kernel W acts as W + scale B A


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The description of a checkpoint directory, without weights."""

    path: pathlib.Path
    raw_config: dict[str, Any]
    family: Family
    config: DecoderConfig
    stop_token_ids: tuple[int, ...]  # eos_token_id of the generation config, else of the config
    stored_dtype: str
    stop_strings: tuple[str, ...] = ()  # of the generation config
    # Adapters that `load_params` merges into the kernels; the other fields are those of their base.
    adapter: Adapter | None = None


def open_checkpoint(
    path_or_id: str | os.PathLike, revision: str | None = None, *, with_weights: bool = True
) -> Checkpoint:
    """Describe a local directory, a hub repository (downloaded to the hub's cache), a built-in
    model (`@mini_student`), or the exported student of a run's work directory. The directory of a
    PEFT adapter stands for its base model with it. Raises CheckpointError and
    UnsupportedModelError.

    Without weights, config.json is enough, and only the configs of a repository are downloaded.
    """
    path = find(str(path_or_id), revision, _FILES if with_weights else _CONFIGS)
    if _is_adapter(path):
        return _open_adapted(path, with_weights)
    raw = _read_json(path / "config.json")
    if "environment" in raw and isinstance(raw.get("config"), dict):
        path = _student_of_run(path)
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
    texts = generation.get("stop_strings") or ()
    texts = (texts,) if isinstance(texts, str) else texts
    is_list = isinstance(texts, (list, tuple)) and len(texts) <= _MAX_STOP_STRINGS
    if not is_list or not all(isinstance(text, str) and text for text in texts):
        raise CheckpointError(
            f"{file} sets stop_strings {texts!r}; expected at most {_MAX_STOP_STRINGS} texts"
        )
    stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(stored, str):
        raise CheckpointError(
            f"{path / 'config.json'} sets dtype {stored!r}; expected the name of a dtype, such as "
            "'bfloat16'"
        )
    return Checkpoint(path, raw, family, config, stop_ids, stored, tuple(texts))


def _is_adapter(path: pathlib.Path) -> bool:
    return (path / ADAPTER_CONFIG).exists() and not (path / "config.json").exists()


def _open_adapted(path: pathlib.Path, with_weights: bool) -> Checkpoint:
    """The base model of a PEFT adapter, with the adapter."""
    file, raw = path / ADAPTER_CONFIG, _read_json(path / ADAPTER_CONFIG)
    base = raw.get("base_model_name_or_path"), raw.get("revision")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    # Other kinds of adapter have other tensors, which `adapter_matrices` refuses.
    is_plain = raw.get("peft_type") == "LORA" and not raw.get("alpha_pattern")
    is_number = type(rank) is int and 0 < rank <= MODEL_SIZE
    is_number = is_number and type(alpha) in (int, float) and 0 < alpha <= MODEL_SIZE
    if not (is_plain and is_number and isinstance(base[0], str)):
        names = ("peft_type", "r", "lora_alpha", "alpha_pattern", "base_model_name_or_path")
        found = ", ".join(f"{name} {raw.get(name)!r}" for name in names)
        raise CheckpointError(
            f"{file} sets {found}; expected LORA with one alpha, and the name of its base: merge "
            "another adapter into its base with PEFT"
        )
    try:
        base_path = find(*base, _FILES if with_weights else _CONFIGS)
        if _is_adapter(base_path):
            raise CheckpointError(f"{base_path} is an adapter as well; merge that one first")
        checkpoint = open_checkpoint(base_path, with_weights=with_weights)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is a PEFT adapter, and its base cannot be opened: {error}; expected a "
            f"directory or a hub id as base_model_name_or_path in {file}"
        ) from error
    scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
    return dataclasses.replace(checkpoint, adapter=Adapter(path, base, rank, scale))


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
    files = sorted(set(_locate_tensors(checkpoint.path).values()))
    if (adapter := checkpoint.adapter) is not None:
        digest.update(f"{adapter.rank} {adapter.scale}".encode())
        files.append(adapter.path / ADAPTER)
    for file in files:
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
    *,
    with_adapter: bool = True,
    weights: FrozenWeights = "dtype",
) -> Params:
    """The stacked parameters that the decoder takes, cast to `dtype` or, as `weights` says, held in
    8 bits; on a `mesh`, sharded by `models/partitioning.py`. The checkpoint's adapter is merged in
    float32, or left out.

    Each process reads the slices of its own devices, one at a time, so that no host holds the whole
    model. Tensors are read straight into the memory of the stacked parameter, which a CPU keeps.
    CheckpointError lists the tensors that are missing, unexpected or of another shape.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"cannot load as {dtype!r}; expected one of {sorted(DTYPES)}")
    tensors = _Tensors(checkpoint.path)
    _check_tensors(checkpoint, tensors)
    params = abstract_params(checkpoint.config, DTYPES[dtype])
    in_8_bits = quantized_names(weights)
    if in_8_bits and checkpoint.config.num_experts:
        raise CheckpointError(
            f"{checkpoint.path} has experts, whose weights are not held in 8 bits; expected "
            "weights = dtype"
        )
    parts = {}  # place -> its tensor, and its first row there
    depths = {}  # parameter -> its stacked axes
    for tensor, places in tensor_places(checkpoint).items():
        starts = itertools.accumulate((_shape(params, each)[0] for each in places), initial=0)
        parts |= {place: (tensor, start) for place, start in zip(places, starts)}
        depths |= {name: len(index) for name, index in places}
    shardings = [] if mesh is None else [shardings_of(params, mesh, split_over)]
    pairs = adapter_matrices(checkpoint) if with_adapter else {}

    def fill(out, place, index):
        name, start = parts[place]
        first, last, _ = index[0].indices(_shape(params, place)[0])
        stored, tensor = (slice(start + first, start + last), *index[1:]), tensors[name]
        if place not in pairs:
            return tensor.read_into(out, stored)
        (a, b), (rows, columns) = pairs[place], index
        delta = checkpoint.adapter.scale * (b[rows] @ a[:, columns])
        out[...] = tensor.mapped()[stored].astype(np.float32) + delta

    def load(path, leaf, sharding=None):
        name, depth = path[-1].key, depths[path[-1].key]

        def read(index):
            ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape)]
            out = aligned_array(tuple(map(len, ranges)), leaf.dtype)
            for at in np.ndindex(out.shape[:depth]):
                stacked = tuple(part[i] for part, i in zip(ranges, at))
                fill(out[at], (name, stacked), index[depth:])
            return out

        if sharding is None:
            found = jax.device_put(read((slice(None),) * len(leaf.shape)))
        else:
            found = _place(leaf.shape, sharding, read)
        # One stacked parameter at a time is held in both forms.
        return quantize(found) if name in in_8_bits else found

    loaded = with_scales(jax.tree_util.tree_map_with_path(load, params, *shardings))
    if mesh is None or not in_8_bits:
        return loaded
    return jax.device_put(loaded, shardings_of(loaded, mesh, split_over))


def adapter_matrices(checkpoint: Checkpoint) -> dict[Place, tuple[np.ndarray, np.ndarray]]:
    """A `[r, in]` and B `[out, r]` in float32, by place; empty without an adapter.
    CheckpointError for a tensor that is no adapter of a kernel, or of another shape.
    """
    if checkpoint.adapter is None:
        return {}
    file, rank = checkpoint.adapter.path / ADAPTER, checkpoint.adapter.rank
    stored, shapes, found = open_weights(file), tensor_shapes(checkpoint), {}
    params, unread = abstract_params(checkpoint.config), set(stored)
    for tensor, places in tensor_places(checkpoint).items():
        module = f"base_model.model.{tensor.removesuffix('.weight')}"
        pair = tuple(f"{module}.lora_{letter}.weight" for letter in "AB")
        if not places[0][0].endswith("_kernel") or not unread.issuperset(pair):
            continue
        a, b = (stored[name] for name in pair)
        is_right = (*b.shape, *a.shape) == (shapes[tensor][0], rank, rank, shapes[tensor][1])
        if is_right and {a.kind, b.kind} <= set(STORED_DTYPES):
            a, b = (each.mapped().astype(np.float32) for each in (a, b))
            ends = itertools.accumulate(_shape(params, place)[0] for place in places)
            found |= {place: (a, part) for place, part in zip(places, np.split(b, [*ends]))}
            unread -= set(pair)
    if unread or not found:
        raise CheckpointError(
            f"{file} holds {sorted(unread)[:1] or 'nothing'}; expected the lora_A and lora_B of "
            f"kernels of {checkpoint.path} alone, of rank {rank}, as PEFT saves them"
        )
    return found


def _place(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """The array with this sharding. A slice is read once, though several devices may hold it."""
    holders: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        values = read(tuple(slice(*bound) for bound in bounds))
        shards += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _student_of_run(workdir: pathlib.Path) -> pathlib.Path:
    """The student that a finished run has exported; CheckpointError if it is not there."""
    result = workdir / "result.json"
    name = str(_read_json(result).get("student")) if result.exists() else ""
    student = workdir / name
    if not name or not is_inside(student, workdir) or not student.is_dir():
        raise CheckpointError(
            f"{workdir} is the work directory of a run without a student; expected a model: finish "
            f"the run, or write a checkpoint's student with opdjax export {workdir} OUT"
        )
    return student


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} has no {path.name}; expected a Hugging Face checkpoint directory"
        )
    try:
        value = parse_json(read_bytes(path, CONFIG_BYTES))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error}; download or copy it again"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; expected a file of a Hugging Face checkpoint"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def is_inside(file: pathlib.Path, directory: pathlib.Path) -> bool:
    """Whether a path stands in a directory itself, and is no link out of it (but the hub's cache
    keeps the files of a snapshot beside it).
    """
    try:
        own, held = (pathlib.Path(os.path.realpath(each)) for each in (directory, file))
        file.exists()
    except (OSError, ValueError):  # no name of a file
        return False
    if file.parent != directory or file.name == "..":
        return False
    blobs = own.parents[1] / "blobs" if own.parent.name == "snapshots" else own
    return held.parent in (own, blobs)


def _locate_tensors(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name -> file."""
    if (path / INDEX).exists():
        weight_map = _read_json(path / INDEX).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        if not files or not all(isinstance(file, str) for file in files):
            raise CheckpointError(
                f"{path / INDEX} has no weight_map; expected tensor names and their files"
            )
        if foreign := [file for file in files if not is_inside(path / file, path)]:
            raise CheckpointError(
                f"{path / INDEX} names {foreign[0]!r}, which is not in its directory; expected the "
                "names of files beside it: copy the file there"
            )
        absent = sorted({file for file in files if not (path / file).is_file()})
        if absent:
            raise CheckpointError(
                f"{path / INDEX} names files that do not exist (download them too): "
                f"{', '.join(absent)}"
            )
        if SINGLE not in files and (path / SINGLE).exists():
            raise CheckpointError(
                f"{path} holds {SINGLE} and, in {INDEX}, other files of weights: one of them is "
                "stale, and transformers would load the former; move the stale one out "
                "of the directory that student.path or teacher.path names"
            )
        return {name: path / file for name, file in weight_map.items()}
    if not (path / SINGLE).exists():
        raise CheckpointError(
            f"{path} has neither {SINGLE} nor {INDEX}; convert the weights to safetensors first"
        )
    return dict.fromkeys(open_weights(path / SINGLE), path / SINGLE)


class _Tensors:
    """The stored tensors of a directory. Each file is opened once."""

    def __init__(self, directory: pathlib.Path):
        self.located, self._open = _locate_tensors(directory), functools.cache(open_weights)

    def __getitem__(self, name: str) -> StoredTensor:
        held = self._open(path := self.located[name])
        if name not in held:  # an index names the wrong file
            raise CheckpointError(f"{path} does not hold the tensor {name}; correct {INDEX}")
        return held[name]


def tensor_places(checkpoint: Checkpoint) -> dict[str, list[Place]]:
    """Tensor name -> its place, as the config implies. A tensor that fuses several parameters holds
    the rows of one after those of the other.
    """
    family, params = checkpoint.family, abstract_params(checkpoint.config)
    places = {
        tensor: [(name, ())] for name, tensor in family.global_names.items() if name in params
    }
    for name, template in family.layer_names.items():
        if name in params["layers"]:
            stacked = params["layers"][name].shape[: 1 + ("{e}" in template)]
            for index in np.ndindex(stacked):
                tensor = template.format(i=index[0], e=index[-1])
                places.setdefault(tensor, []).append((name, index))
    return places


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as the config implies."""
    params, shapes = abstract_params(checkpoint.config), {}
    for tensor, places in tensor_places(checkpoint).items():
        parts = [_shape(params, place) for place in places]
        shapes[tensor] = (sum(part[0] for part in parts), *parts[0][1:])
    return shapes


def _shape(params: Params, place: Place) -> tuple[int, ...]:
    name, index = place
    return (params["layers"] if index else params)[name].shape[len(index) :]


def _check_tensors(checkpoint: Checkpoint, tensors: _Tensors) -> None:
    expected, located = tensor_shapes(checkpoint), tensors.located
    # Old Llama checkpoints store the rotary frequencies of each layer, which config.json implies.
    extra = {name for name in located if not name.endswith(".rotary_emb.inv_freq")} - set(expected)
    is_tied = "true" if checkpoint.config.ties_embeddings else "false"
    other = (
        "false if the model has a head of its own" if is_tied == "true" else "true if it has none"
    )
    tied = f" (tie_word_embeddings is {is_tied} in config.json, or by default: set it to {other})"
    hints = {checkpoint.family.global_names["head"]: tied}
    problems = [f"missing tensor {name}" for name in sorted(set(expected) - set(located))]
    for name in sorted(extra):
        if not _is_tied_copy(checkpoint, tensors, name):
            problems.append(f"unexpected tensor {name}")
    problems = [problem + hints.get(problem.rpartition(" ")[2], "") for problem in problems]
    for name in sorted(set(expected) & set(located)):
        if (shape := tensors[name].shape) != expected[name]:
            problems.append(f"{name} has shape {shape}; config.json implies {expected[name]}")
        if (kind := tensors[name].kind) not in STORED_DTYPES:
            problems.append(
                f"{name} is stored as {kind}; expected one of {', '.join(STORED_DTYPES)}, weights "
                "that are not quantized"
            )
    if problems:
        wrong = f"{checkpoint.path} does not hold the model that its config.json describes:"
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise CheckpointError("\n  ".join([wrong, *problems[:20], *more]))


def _is_tied_copy(checkpoint: Checkpoint, tensors: _Tensors, name: str) -> bool:
    """Whether this is the unembedding of a tied model, a copy that some checkpoints store too."""
    head, embedding = (checkpoint.family.global_names[key] for key in ("head", "embedding"))
    if not checkpoint.config.ties_embeddings or name != head or embedding not in tensors.located:
        return False
    ours, theirs = tensors[name], tensors[embedding]
    is_alike = (ours.kind, ours.shape) == (theirs.kind, theirs.shape) and ours.kind in STORED_DTYPES
    return is_alike and np.array_equal(ours.mapped(), theirs.mapped())
