"""Hugging Face checkpoints in and out: safetensors read and written by the family's name table.

A directory holds `config.json`, `model.safetensors` (or shards with an index), a tokenizer and
perhaps a generation config. Everything that is not weights is carried over on export, so that the
result runs wherever the original ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opdjax.config import MINI_PAIR, MINI_STUDENT, MINI_TEACHER, STUDENT, LoraConfig, ModelConfig
from opdjax.config.validation import nearest
from opdjax.models.decoder import DecoderConfig, Params, abstract_params, num_parameters
from opdjax.models.families import Family, UnsupportedModelError, family_of
from opdjax.models.lora import merged, without_adapters
from opdjax.models.partitioning import WEIGHT_AXES, shardings_of
from opdjax.ops.sharding import is_process_zero, to_host
from opdjax.runs.object_store import is_remote, local_copy

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_CONFIGS = ("config.json", "generation_config.json")
_CARRIED = (
    "tokenizer*",
    "*.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_STORED = ("F32", "BF16", "F16", "F64")  # how safetensors call what can be cast to those
_SAMPLE_BYTES = 2**20
_SHARD_BYTES = 5 * 2**30


class CheckpointError(ValueError):
    """The directory is not a checkpoint that can be read: a file, tensor or shape is not what it
    should be.
    """


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, described; no weights are in memory."""

    path: pathlib.Path
    raw_config: dict[str, Any]
    family: Family
    config: DecoderConfig
    stop_token_ids: tuple[
        int, ...
    ]  # end-of-sequence ids of the generation config, else of the config
    stored_dtype: str

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return num_parameters(self.config)


def open_checkpoint(
    path_or_id: str | os.PathLike, revision: str | None = None, *, with_weights: bool = True
) -> Checkpoint:
    """Describe a local directory, the hub repository of that id (downloaded to the hub's cache), or
    a built-in model (`@mini_student`).

    Without weights a directory that holds config.json alone will do, and of a repository no more
    than the configs are downloaded.
    """
    path = _resolve(str(path_or_id), revision, _WANTED if with_weights else _CONFIGS)
    raw = _read_json(path / "config.json")
    family = family_of(raw)
    try:
        config = family.read_config(raw)
    except KeyError as error:
        raise CheckpointError(f"{path / 'config.json'} lacks the field {error}") from error
    generation = (
        _read_json(path / "generation_config.json")
        if (path / "generation_config.json").exists()
        else {}
    )
    stop_ids = _read_stop_ids(path, raw, config.vocab_size)
    if "eos_token_id" in generation:
        stop_ids = _read_stop_ids(path, generation, config.vocab_size, "generation_config.json")
    stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(stored, str):
        raise CheckpointError(
            f"{path / 'config.json'} sets dtype {stored!r}; expected the name of a type, such as 'bfloat16'"
        )
    return Checkpoint(path, raw, family, config, stop_ids, stored)


def _read_stop_ids(
    path: pathlib.Path, values: dict[str, Any], vocab_size: int, file: str = "config.json"
) -> tuple[int, ...]:
    found = values.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise CheckpointError(
            f"{path / file} sets eos_token_id {found!r}; expected an id from 0 to {vocab_size - 1}, or a list of them"
        )
    return tuple(ids)


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of config and weights, of which it reads the size and three samples a file: cheap,
    and a swapped model shows.
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
    """The parameters as the stacked tree that the decoder takes, cast to `dtype`; on a `mesh` laid
    out by `models/layout.py`.

    Each process reads the slices of its own devices, one at a time: none ever holds the whole
    model. Raises CheckpointError naming every tensor that is missing, extra or of another shape.
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"cannot load as {dtype!r}; expected one of {sorted(_DTYPES)}")
    located = _locate_tensors(checkpoint.path)
    _check_tensors(checkpoint, located)
    global_names, layer_names = checkpoint.family.names(checkpoint.config)
    kept = abstract_params(checkpoint.config, _DTYPES[dtype])
    shardings = None if mesh is None else shardings_of(kept, mesh, split_over)

    with _Files() as files:

        def read_global(name, index):
            return files.read(located, global_names[name], index)

        def read_layers(name, index):
            layers, *inside = index
            numbers = range(*layers.indices(checkpoint.config.num_layers))
            return np.stack(
                [
                    files.read(located, layer_names[name].format(i=number), tuple(inside))
                    for number in numbers
                ]
            )

        def load(path, leaf):
            names = [entry.key for entry in path]
            read = partial(read_layers if names[0] == "layers" else read_global, names[-1])
            if shardings is None:
                return jnp.asarray(read((slice(None),) * len(leaf.shape)).astype(leaf.dtype))
            sharding = (
                shardings["layers"][names[-1]] if names[0] == "layers" else shardings[names[-1]]
            )
            return _place(leaf.shape, sharding, lambda index: read(index).astype(leaf.dtype))

        return jax.tree_util.tree_map_with_path(load, kept)


def _place(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """The array of that sharding; each of this process's slices is read once, whichever of its
    devices hold it, and then let go.
    """
    holders: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(
            tuple(part.indices(size)[:2] for part, size in zip(index, shape)), []
        ).append(device)
    shards = []
    for bounds, devices in holders.items():
        values = read(tuple(slice(*bound) for bound in bounds))
        shards += [jax.device_put(values, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def export(
    params: Params, source: Checkpoint, out: str | os.PathLike, dtype: str | None = None
) -> pathlib.Path:
    """Write `params` as a checkpoint like `source`: its config, tokenizer, templates and generation
    config come along.

    Adapters are merged into their kernels. `dtype` defaults to the source's. The directory appears
    complete or not at all.
    """
    out, dtype = pathlib.Path(out), dtype or source.stored_dtype
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"cannot export as {dtype!r}; expected one of {sorted(_DTYPES)}: name one as --dtype"
        )
    with _new_directory(out) as staging:
        _check_shapes(without_adapters(params), source)
        if is_process_zero():
            for pattern in _CARRIED:
                for file in source.path.glob(pattern):
                    shutil.copy(file, staging / file.name)
            config = {
                name: value for name, value in source.raw_config.items() if name != "torch_dtype"
            } | {"dtype": dtype}
            (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_files(params, source, _DTYPES[dtype], staging)
    return out


def export_adapter(
    params: Params, source: Checkpoint, lora: LoraConfig, student: ModelConfig, out: pathlib.Path
) -> None:
    """Write the adapters among `params`, in float32, as PEFT reads them:
    `PeftModel.from_pretrained(model, out)`.

    `student` names the model that they belong to. The directory appears complete or not at all.
    """
    names, tensors = source.family.layer_names, {}
    for name, stacked in params["layers"].items():
        target, is_adapter, letter = name.partition("_lora_")
        for layer, matrix in enumerate(to_host(stacked) if is_adapter else ()):
            module = names[f"{target}_kernel"].format(i=layer).removesuffix(".weight")
            tensors[f"base_model.model.{module}.lora_{letter.upper()}.weight"] = (
                np.ascontiguousarray(matrix, np.float32)
            )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # A built-in model is known by its name to nobody else.
        "base_model_name_or_path": str(source.path)
        if student.path.startswith("@")
        else student.path,
        "revision": student.revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [names[f"{target}_kernel"].split(".")[-2] for target in lora.targets],
        "inference_mode": True,
    }
    with _new_directory(out) as staging:
        if is_process_zero():
            (staging / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})


@contextlib.contextmanager
def _new_directory(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write what then becomes `out`; the lead process makes and moves it. CheckpointError
    where `out` is taken.
    """
    if any(place.exists() and not place.is_dir() for place in (out, *out.parents)):
        raise CheckpointError(f"{out} is a file or lies in one; export into a new directory")
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} exists and is not empty; export into a new directory")
    staging = out.with_name(out.name + ".partial")
    if is_process_zero():
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    try:
        yield staging
        if is_process_zero():
            if out.exists():
                out.rmdir()
            staging.rename(out)
    finally:
        if is_process_zero():
            shutil.rmtree(staging, ignore_errors=True)


def _resolve(path_or_id: str, revision: str | None, wanted: tuple[str, ...]) -> pathlib.Path:
    if path_or_id.startswith("@"):
        return _built_in(path_or_id)
    if is_remote(path_or_id):
        return local_copy(
            path_or_id, lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in wanted)
        )
    path = pathlib.Path(os.path.expanduser(path_or_id))
    if path_or_id and path.is_dir():
        return path
    is_id = path_or_id.count("/") == 1 and not path_or_id.startswith((".", "/", "~"))
    if not is_id:
        raise CheckpointError(f"{path_or_id!r} is no directory and no hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return pathlib.Path(
            snapshot_download(path_or_id, revision=revision, allow_patterns=list(wanted))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{path_or_id!r} is no local directory, and the hub did not give it: {error}"
        ) from error


def _built_in(name: str) -> pathlib.Path:
    built_in = {MINI_TEACHER: MINI_PAIR / "teacher", MINI_STUDENT: MINI_PAIR / "student"}
    if name == STUDENT:
        raise CheckpointError(
            f"{name!r} is a teacher's name for the student of its run; expected a model: a directory, a hub id or {MINI_STUDENT}"
        )
    if name not in built_in:
        raise CheckpointError(
            f"{name!r} is no built-in model; {nearest(name, built_in)} (a directory of that name is ./{name})"
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
    if (path / _INDEX).exists():
        weight_map = _read_json(path / _INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(file, str) for file in weight_map.values())
        ):
            raise CheckpointError(
                f"{path / _INDEX} has no weight_map; expected tensor names and their files"
            )
        absent = sorted({file for file in weight_map.values() if not (path / file).is_file()})
        if absent:
            raise CheckpointError(
                f"{path / _INDEX} names files that are not there (download them too): {', '.join(absent)}"
            )
        return {name: path / file for name, file in weight_map.items()}
    if not (path / _SINGLE).exists():
        raise CheckpointError(
            f"{path} has neither {_SINGLE} nor {_INDEX}; convert the weights to safetensors first"
        )
    with _Files() as files:
        return dict.fromkeys(files.open(path / _SINGLE).keys(), path / _SINGLE)


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
                    f"{path} is not a readable safetensors file: {error}; expected it whole: download or copy it again ({_size(path)})"
                ) from error
        return self._open[path]

    def read(self, located, name, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the slice of it at `index`, of which alone the file is read."""
        return self._get(located[name], "get_slice", name)[index or ...]

    def shape(self, located, name) -> tuple[int, ...]:
        return tuple(self._get(located[name], "get_slice", name).get_shape())

    def stored_type(self, located, name) -> str:
        return self._get(located[name], "get_slice", name).get_dtype()

    def _get(self, path, method, name):
        try:
            return getattr(self.open(path), method)(name)
        except SafetensorError as error:  # an index that names the wrong file
            raise CheckpointError(f"{path} does not give the tensor {name}: {error}") from error


def _size(path: pathlib.Path) -> str:
    return f"it has {path.stat().st_size} bytes" if path.is_file() else "it is no file"


def _expected_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    global_names, layer_names = checkpoint.family.names(checkpoint.config)
    params = abstract_params(checkpoint.config)
    expected = {tensor: params[name].shape for name, tensor in global_names.items()}
    for name, template in layer_names.items():
        for layer in range(checkpoint.config.num_layers):
            expected[template.format(i=layer)] = params["layers"][name].shape[1:]
    return expected


def _check_tensors(checkpoint: Checkpoint, located: dict[str, pathlib.Path]) -> None:
    expected = _expected_shapes(checkpoint)
    # Old Llama checkpoints store the rotary frequencies of each layer; config.json says the same,
    # and they are no parameter.
    extra = {
        name for name in set(located) - set(expected) if not name.endswith(".rotary_emb.inv_freq")
    }
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
                    f"{name} is stored as {kind}; expected one of {', '.join(_STORED)}, weights that are not quantized"
                )
    if problems:
        listed = "\n  ".join(problems[:20]) + (
            "" if len(problems) <= 20 else f"\n  and {len(problems) - 20} more"
        )
        raise CheckpointError(
            f"{checkpoint.path} does not hold the model that its config.json describes:\n  {listed}"
        )


def _is_tied_copy(checkpoint, located, files, name) -> bool:
    """Some tied checkpoints store the unembedding as well; that is fine as long as it equals the
    embedding.
    """
    names = checkpoint.family.global_names
    if (
        not checkpoint.config.ties_embeddings
        or name != names["head"]
        or names["embedding"] not in located
    ):
        return False
    return np.array_equal(files.read(located, name), files.read(located, names["embedding"]))


def _check_shapes(params: Params, source: Checkpoint) -> None:
    keystr = jax.tree_util.keystr
    found, wanted = (
        {keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, abstract_params(source.config))
    )
    if found != wanted:
        wrong = sorted(
            name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
        )
        listed = "; ".join(
            f"{name} {found.get(name, 'missing')}, expected {wanted.get(name, 'none')}"
            for name in wrong[:5]
        )
        raise CheckpointError(f"parameters do not fit the source checkpoint: {listed}")


def _write_files(params: Params, source: Checkpoint, dtype: np.dtype, out: pathlib.Path) -> None:
    """One file, or several of at most 5 GiB with an index; what is held on the host at a time is
    one file's tensors.
    """
    files: list[list[str]] = [[]]
    sizes = {
        name: int(np.prod(shape)) * dtype.itemsize
        for name, shape in _expected_shapes(source).items()
    }
    for name, size in sizes.items():
        if files[-1] and sum(sizes[other] for other in files[-1]) + size > _SHARD_BYTES:
            files.append([])
        files[-1].append(name)
    read, weight_map = _tensor_reader(params, source, dtype), {}
    for number, names in enumerate(files, 1):
        file = _SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {
            name: read(name) for name in names
        }  # by every process: a tensor may lie spread over all of them
        if is_process_zero():
            save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1 and is_process_zero():
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (out / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensor_reader(
    params: Params, source: Checkpoint, dtype: np.dtype
) -> Callable[[str], np.ndarray]:
    """Tensor name -> its values on the host."""
    global_names, layer_names = source.family.names(source.config)
    places = {tensor: (name, None) for name, tensor in global_names.items()}
    for name, template in layer_names.items():
        places |= {
            template.format(i=layer): (name, layer) for layer in range(source.config.num_layers)
        }

    def read(tensor: str) -> np.ndarray:
        name, layer = places[tensor]
        array = (
            params[name] if layer is None else merged(params, name, layer, source.config.lora_scale)
        )
        return np.ascontiguousarray(np.asarray(to_host(array)).astype(dtype))

    return read


__all__ = [
    "Checkpoint",
    "CheckpointError",
    "UnsupportedModelError",
    "export",
    "load_params",
    "open_checkpoint",
]
