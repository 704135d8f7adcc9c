"""Low-rank adapters (LoRA, arXiv:2106.09685): a kernel W acts as W + alpha / rank * B A, and only A
and B are trained.

A run never merges them: in bfloat16 a sum with W would round small updates away, and the sampler
would use another function than the update. For the same reason there is no dropout.
"""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.config import LoraConfig, LoraTarget
from opdjax.config.validation import require
from opdjax.models.decoder import DecoderConfig, Params, abstract_params
from opdjax.models.hf import Checkpoint, adapter_matrices

_STREAM = 3  # random stream of the run's seed; the sampler uses streams 0 to 2


def init_adapters(model: DecoderConfig, lora: LoraConfig, seed: int) -> Params:
    """Float32 adapters `{"layers": ...}`: `T_lora_a [L, r, in]` and `T_lora_b [L, out, r]` for each
    target T.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)), as in PEFT, and B is 0: at first the model is the
    one without adapters. The draws of a target do not depend on the other targets.
    """
    stream = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _STREAM)
    kernels, layers = abstract_params(model)["layers"], {}
    for target in lora.targets:
        num_layers, size_out, size_in = kernels[f"{target}_kernel"].shape
        key, bound = jax.random.fold_in(stream, get_args(LoraTarget).index(target)), size_in**-0.5
        layers[f"{target}_lora_a"] = jax.random.uniform(
            key, (num_layers, lora.rank, size_in), jnp.float32, -bound, bound
        )
        layers[f"{target}_lora_b"] = jnp.zeros((num_layers, size_out, lora.rank))
    return {"layers": layers}


def continues(checkpoint: Checkpoint, lora: LoraConfig) -> bool:
    """Whether a run with these settings trains the checkpoint's own adapter further: it has the
    same rank, scale and kernels, in every layer.
    """
    adapter = checkpoint.adapter
    if adapter is None or adapter.rank != lora.rank or not math.isclose(adapter.scale, lora.scale):
        return False
    layers = range(checkpoint.config.num_layers)
    wanted = {(f"{target}_kernel", (layer,)) for target in lora.targets for layer in layers}
    return adapter_matrices(checkpoint).keys() == wanted


def stored_adapters(checkpoint: Checkpoint, lora: LoraConfig) -> Params:
    """The checkpoint's adapter in the form of `init_adapters`; host arrays."""
    matrices, layers = adapter_matrices(checkpoint), {}
    for target in lora.targets:
        numbers = range(checkpoint.config.num_layers)
        kernels = [matrices[f"{target}_kernel", (layer,)] for layer in numbers]
        for letter, stacked in zip("ab", map(np.stack, zip(*kernels))):
            layers[f"{target}_lora_{letter}"] = stacked
    return {"layers": layers}


def with_adapters(student: Checkpoint, lora: LoraConfig) -> Checkpoint:
    """The checkpoint with the scale of a run's adapters. ConfigError for adapters of kernels that
    share a tensor, which PEFT would adapt as one, and of experts.
    """
    names, kernels = student.family.layer_names, abstract_params(student.config)["layers"]
    refused: dict[str, list[str]] = {}
    for target in lora.targets if lora.rank else ():
        name = f"{target}_kernel"
        if name not in kernels:
            refused.setdefault("are kernels of experts", []).append(target)
        elif list(names.values()).count(names[name]) > 1:
            refused.setdefault("share tensors", []).append(target)
    for reason, targets in refused.items():
        expected = f"others than {', '.join(targets)}, which {reason} in {student.path}"
        require(False, "lora.targets", lora.targets, expected)
    config = dataclasses.replace(student.config, lora_scale=lora.scale)
    return dataclasses.replace(student, config=config)


def combine(frozen: Params | None, trained: Params) -> Params:
    """The tree that the decoder takes: frozen parameters (None: all are trained) with the trained
    ones. Nothing is copied.
    """
    if frozen is None:
        return trained
    return {**frozen, "layers": {**frozen["layers"], **trained["layers"]}}


def without_adapters(params: Params) -> Params:
    """The tree without its adapters, which are not merged."""
    layers = {name: leaf for name, leaf in params["layers"].items() if "_lora_" not in name}
    return {**params, "layers": layers}


def merged(params: Params, name: str, index: tuple[int, ...], scale: float) -> jax.Array:
    """Parameter `name` of one layer, or of an expert of one. A kernel with an adapter is
    W + `scale` B A in float32, to be rounded once.
    """
    weight, target = params["layers"][name][index], name.removesuffix("_kernel")
    if f"{target}_lora_a" not in params["layers"]:
        return weight
    a, b = (params["layers"][f"{target}_lora_{letter}"][index] for letter in "ab")
    product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    return weight.astype(jnp.float32) + scale * product
