"""Samples from, scores and describes a single checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from opdjax.config import Config, DataConfig, ModelConfig
from opdjax.config.validation import ConfigError
from opdjax.data.prompt_rows import Prompt
from opdjax.data.prompts import collate, encode_prompts
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.evaluate import completions
from opdjax.engine.sampler import sample
from opdjax.models.decoder import RUN_FIELDS
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.rollouts.setup import (
    compute_dtype,
    decoding_of,
    make_evaluator,
    num_ids,
    stop_ids,
    student_view,
)


def complete(
    model: ModelConfig,
    dtype: str,
    prompts: Sequence[str],
    data: DataConfig,
    num_generations: int,
    max_completion_length: int,
    seed: int,
    **distribution: float,
) -> Iterator[tuple[str, str]]:
    """(prompt, completion) of `num_generations` samples per prompt; `distribution`: temperature (0
    is greedy), top_k, top_p, min_p.
    """
    data = dataclasses.replace(student_view(data), source="the command line")
    checkpoint = open_checkpoint(*model.place)
    tokenizer = load_tokenizer(checkpoint.path)
    params = load_params(checkpoint, compute_dtype(dtype))
    encoded = encode_prompts([Prompt(text) for text in prompts], data, tokenizer, tokenizer)
    if encoded.skipped:
        raise ConfigError(
            f"data.max_prompt_length is {data.max_prompt_length}, exceeded by "
            f"{encoded.skipped[0]}; expected more, or shorter prompts"
        )
    how = {"max_completion_length": max_completion_length, **distribution}
    rollouts = sample(
        params,
        collate(encoded, np.arange(len(prompts))),
        seed,
        0,
        config=checkpoint.config,
        decoding=decoding_of(checkpoint, tokenizer, **how),
        num_generations=num_generations,
    )
    for number, text in enumerate(completions(rollouts, tokenizer)):
        yield prompts[number // num_generations], text


def scores_of(config: Config) -> dict[str, Any]:
    """The evaluation scores of the config's student; ConfigError without evaluation prompts."""
    checkpoint = open_checkpoint(*config.student.place)
    evaluator = make_evaluator(config, checkpoint, load_tokenizer(checkpoint.path), None)
    if evaluator is None:
        raise ConfigError("evaluation.source is None; expected a data source with answers")
    if skipped := evaluator.prompts.skipped:
        number = evaluator.prompts.num_skipped
        print(f"{number} prompts were too long and are left out, first {skipped[0]}")
    return evaluator(load_params(checkpoint, compute_dtype(config.train.dtype)))


def describe(model: str) -> dict[str, Any]:
    """Facts about a checkpoint, after reading all of it."""
    checkpoint = open_checkpoint(model)
    load_params(checkpoint, "bfloat16" if checkpoint.stored_dtype == "bfloat16" else "float32")
    tokenizer = load_tokenizer(checkpoint.path)
    fields = dataclasses.asdict(checkpoint.config)
    return {
        "path": str(checkpoint.path),
        "architecture": checkpoint.raw_config["architectures"][0],
        "parameters": checkpoint.num_parameters,
        "stored dtype": checkpoint.stored_dtype,
        **{name: value for name, value in fields.items() if name not in RUN_FIELDS},
        "tokenizer ids": num_ids(checkpoint, tokenizer),
        "stop token ids": stop_ids(checkpoint, tokenizer),
        "has chat template": tokenizer.chat_template is not None,
    }
