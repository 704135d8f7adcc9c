"""Export to Hugging Face checkpoints, which run wherever their source ran, and PEFT adapters."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from opdjax.config import LoraConfig, ModelConfig
from opdjax.models.decoder import Params, abstract_params
from opdjax.models.hf import (
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    CheckpointError,
    is_inside,
    tensor_places,
    tensor_shapes,
)
from opdjax.models.lora import merged, without_adapters
from opdjax.ops.sharding import is_process_zero, to_host

_COPIED = (  # all that tokenizers and chat templates of published models are stored in
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
_FILE_BYTES = 5 * 2**30


def export(
    params: Params,
    source: Checkpoint,
    out: str | os.PathLike,
    dtype: str | None = None,
    complete: Callable[[pathlib.Path], None] | None = None,
) -> pathlib.Path:
    """Write `params` as a checkpoint with config, tokenizer, templates and generation config of
    `source`.

    Adapters are merged into their kernels. `dtype` defaults to the source's. `complete` may change
    the small files before the directory appears, complete or not at all. CheckpointError if `out`
    is not new or `params` do not fit.
    """
    out, dtype = pathlib.Path(out), dtype or source.stored_dtype
    if dtype not in DTYPES:
        raise CheckpointError(
            f"cannot export as {dtype!r}; expected one of {sorted(DTYPES)}: name one as --dtype"
        )
    with _new_directory(out) as staging:
        _check_shapes(without_adapters(params), source)
        if is_process_zero():
            for file in filter(os.path.lexists, map(source.path.joinpath, _COPIED)):
                if not is_inside(file, source.path) or not file.is_file():
                    raise CheckpointError(
                        f"{file} is no file of its directory; expected no links out of it, whose "
                        "content an export would give away: copy the file there, or remove it"
                    )
                shutil.copy(file, staging / file.name)
            config = source.raw_config | {"dtype": dtype}
            # Nothing exported asks its readers to run code.
            for name in ("torch_dtype", "auto_map"):
                config.pop(name, None)
            (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if source.stop_strings:
                file = staging / "generation_config.json"
                generation = json.loads(file.read_text("utf-8")) if file.exists() else {}
                generation["stop_strings"] = list(source.stop_strings)
                file.write_text(json.dumps(generation, indent=2) + "\n")
        _write_files(params, source, DTYPES[dtype], staging)
        if complete is not None and is_process_zero():
            complete(staging)
    return out


def export_adapter(
    params: Params,
    source: Checkpoint,
    lora: LoraConfig,
    student: ModelConfig,
    out: pathlib.Path,
    complete: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Write the adapters of `params` in float32 for PEFT: `PeftModel.from_pretrained(model, out)`.

    `student` names the base model, or an adapter of it that was trained further. `complete`
    may add files before the directory appears, complete or not at all.
    """
    name, revision = source.adapter.base if source.adapter else student.place
    names, tensors, is_built_in = source.family.layer_names, {}, name.startswith("@")
    for leaf, stacked in params["layers"].items():
        target, is_adapter, letter = leaf.partition("_lora_")
        for layer, matrix in enumerate(to_host(stacked) if is_adapter else ()):
            module = names[f"{target}_kernel"].format(i=layer).removesuffix(".weight")
            tensor = f"base_model.model.{module}.lora_{letter.upper()}.weight"
            tensors[tensor] = np.ascontiguousarray(matrix, np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # Only this package knows a built-in model by its name.
        "base_model_name_or_path": str(source.path if is_built_in else name),
        "revision": revision,
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
            _save(tensors, staging / "adapter_model.safetensors")
            if complete is not None:
                complete(staging)


@contextlib.contextmanager
def _new_directory(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A staging directory that becomes `out` on success; process zero creates and moves it."""
    if any(place.exists() and not place.is_dir() for place in (out, *out.parents)):
        raise CheckpointError(f"{out} is a file or is inside one; export into a new directory")
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


def _check_shapes(params: Params, source: Checkpoint) -> None:
    keystr = jax.tree_util.keystr
    found, wanted = (
        {keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, abstract_params(source.config))
    )
    if found != wanted:
        names = sorted(found.keys() | wanted.keys())
        wrong = [name for name in names if found.get(name) != wanted.get(name)]
        describe = lambda name: (
            f"{name} {found.get(name, 'missing')}, expected {wanted.get(name, 'none')}"
        )
        listed = "; ".join(map(describe, wrong[:5]))
        raise CheckpointError(f"parameters do not fit the source checkpoint: {listed}")


def _write_files(params: Params, source: Checkpoint, dtype: np.dtype, out: pathlib.Path) -> None:
    """Write one file, or several of at most 5 GiB with an index; the host holds one at a time."""
    files: list[list[str]] = [[]]
    shapes = tensor_shapes(source)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    for name, size in sizes.items():
        if files[-1] and sum(sizes[other] for other in files[-1]) + size > _FILE_BYTES:
            files.append([])
        files[-1].append(name)
    places, weight_map, scale = tensor_places(source), {}, source.config.lora_scale

    def read_part(name: str, index: tuple[int, ...]) -> np.ndarray:
        array = merged(params, name, index, scale) if index else params[name]
        return np.ascontiguousarray(np.asarray(to_host(array)).astype(dtype))

    def read(tensor: str) -> np.ndarray:
        parts = [read_part(*place) for place in places[tensor]]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    for number, names in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # Every process reads: a tensor may be sharded over all of them.
        tensors = {name: read(name) for name in names}
        if is_process_zero():
            _save(tensors, out / file)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1 and is_process_zero():
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: dict[str, np.ndarray], file: pathlib.Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} could not be written: {error}; make room there, and run the command again"
        ) from error
