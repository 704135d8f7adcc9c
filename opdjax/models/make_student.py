"""A student from its teacher: the same model with fewer layers, coarser or noisier kernels."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from opdjax.models.families import layer_fields
from opdjax.models.hf import Checkpoint, CheckpointError, load_params, open_checkpoint
from opdjax.models.hf_export import export

_GROUP = 64  # weights of a row that share a scale, where they divide the row


def make_student(
    model: str,
    out: pathlib.Path,
    *,
    keep_layers: Sequence[int] | None = None,
    bits: int | None = None,
    noise: float = 0.0,
    dtype: str | None = None,
    seed: int = 0,
) -> pathlib.Path:
    """Write a checkpoint made from another, with a card that says how; without options it is a
    copy, which converts a GGUF file and merges an adapter.

    `keep_layers` numbers the layers that stay. `bits` rounds the kernels of the layers to
    2^(bits-1) - 1 steps on either side of zero, with a scale for each group of 64 weights of a row.
    `noise` adds Gaussian noise of this fraction of each kernel's standard deviation.
    CheckpointError for layers that the model does not have.
    """
    source = open_checkpoint(model)
    params, changes = load_params(source, "float32"), []
    if keep_layers is not None:
        kept, number = sorted(set(keep_layers)), source.config.num_layers
        if not kept or not 0 <= kept[0] <= kept[-1] < number:
            raise CheckpointError(
                f"{model} has the layers 0 to {number - 1}; expected some of them, found "
                f"{kept[-1] if kept else 'none'}"
            )
        dropped = [layer for layer in range(number) if layer not in kept]
        changes.append(f"without the layers {dropped} of {number}")
        source = _with_layers(source, kept)
        params["layers"] = {name: leaf[np.array(kept)] for name, leaf in params["layers"].items()}
    if bits is not None:
        changes.append(f"kernels rounded to {bits} bits")
        params["layers"] = _changed(params["layers"], lambda kernel: _rounded(kernel, bits))
    if noise:
        changes.append(f"kernels with noise of {noise:g} standard deviations, seed {seed}")
        draw = np.random.default_rng(seed).standard_normal
        scaled = lambda kernel: noise * kernel.std(axis=(-2, -1), keepdims=True)
        params["layers"] = _changed(
            params["layers"],
            lambda kernel: kernel + scaled(kernel) * draw(kernel.shape, np.float32),
        )
    return export(params, source, out, dtype, lambda files: _write_card(files, model, changes))


def _with_layers(source: Checkpoint, kept: list[int]) -> Checkpoint:
    raw = source.raw_config | layer_fields(source.config, kept, source.raw_config)
    return dataclasses.replace(source, raw_config=raw, config=source.family.read_config(raw))


def _changed(layers: dict, change: Callable[[np.ndarray], np.ndarray]) -> dict:
    """`layers` with their kernels `[layers, (experts,) out, in]` changed."""
    return {
        name: change(np.asarray(leaf)) if name.endswith("_kernel") else leaf
        for name, leaf in layers.items()
    }


def _rounded(kernel: np.ndarray, bits: int) -> np.ndarray:
    group = _GROUP if kernel.shape[-1] % _GROUP == 0 else kernel.shape[-1]
    groups = kernel.reshape(*kernel.shape[:-1], -1, group)
    scale = np.abs(groups).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    steps = np.round(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
    return (steps * scale).reshape(kernel.shape)


def _write_card(directory: pathlib.Path, model: str, changes: list[str]) -> None:
    is_gguf = model.lower().endswith(".gguf")
    origin = "; dequantised weights, which are not the published ones" if is_gguf else ""
    lines = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n",
        f"# {pathlib.Path(model).name}{', changed' if changes else ''}\n",
        f"Made by opdjax from `{pathlib.Path(model).name}`{origin}.\n",
        *(f"- {change}" for change in changes),
    ]
    (directory / "README.md").write_text("\n".join(lines).rstrip() + "\n", "utf-8")
