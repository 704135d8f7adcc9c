"""One checkpoint as a value: load it, sample from it, score texts with it, evaluate it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdjax.config import Config, DataConfig, ModelConfig, SamplingConfig
from opdjax.config.validation import ConfigError, require
from opdjax.data.chat import Messages
from opdjax.data.packing import answer_rows
from opdjax.data.prompt_rows import Prompt
from opdjax.data.prompts import PromptSet, collate, encode_prompts
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.evaluate import completions
from opdjax.engine.sampler import sample as draw
from opdjax.engine.scorer import score as score_batch
from opdjax.models.decoder import RUN_FIELDS, Params, head_of, num_parameters
from opdjax.models.hf import Checkpoint, load_params, open_checkpoint
from opdjax.rollouts.export import check_files, recorded_use
from opdjax.rollouts.setup import (
    compute_dtype,
    decoding_of,
    make_evaluator,
    num_ids,
    open_student,
    stop_ids,
    student_view,
)
from opdjax.types import TrainBatch

_DATA = DataConfig()


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint with its weights and tokenizer. Made by `load`."""

    checkpoint: Checkpoint
    params: Params
    tokenizer: Any
    data: DataConfig = _DATA  # how the run that exported it rendered prompts

    @property
    def valid_vocab(self) -> int:
        """Ids of the tokenizer; the model's embedding may be padded beyond them."""
        return num_ids(self.checkpoint, self.tokenizer)


def load(path: str | os.PathLike, *, dtype: str = "auto") -> Model:
    """The model of a local directory, a hub id (or ID@REVISION), `@mini_student` or
    `@mini_teacher`.

    `dtype` of the forward pass: `float32`, `bfloat16`, or `auto` (float32 on a CPU, else bfloat16).
    Raises CheckpointError and UnsupportedModelError.
    """
    checkpoint = open_checkpoint(*ModelConfig(str(path)).place)
    params = load_params(checkpoint, compute_dtype(dtype))
    use = recorded_use(checkpoint)
    return Model(checkpoint, params, load_tokenizer(checkpoint.path), use.data if use else _DATA)


def sample(
    model: Model,
    prompts: Sequence[str | Messages],
    *,
    num_generations: int = 1,
    max_completion_length: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    data: DataConfig | None = None,
) -> list[list[str]]:
    """`num_generations` completions of each prompt, as text without special tokens.

    A prompt is a text or a list of messages and is rendered as `data` says (None: as in the run
    that exported the model). Temperature 0 is greedy; top_p 1, top_k 0 and min_p 0 are off. A draw
    depends on the seed, the prompt's place and the number of the completion, not on the other
    prompts. ConfigError on a value out of range and on a prompt that is too long.
    """
    # Validation only. A temperature of 0 is allowed here, but not in a run's rollouts.
    SamplingConfig(num_generations, max_completion_length, temperature or 1.0, top_p, top_k)
    require(0 <= min_p < 1, "min_p", min_p, "at least 0 (off) and less than 1")
    Config(seed=seed)
    own = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    own["max_completion_length"] = max_completion_length
    rollouts = draw(
        model.params,
        collate(_encoded(model, prompts, data), np.arange(len(prompts))),
        seed,
        0,
        config=model.checkpoint.config,
        decoding=decoding_of(model.checkpoint, model.tokenizer, **own),
        num_generations=num_generations,
    )
    texts = completions(rollouts, model.tokenizer)
    return [texts[at : at + num_generations] for at in range(0, len(texts), num_generations)]


def score(
    model: Model,
    prompts: Sequence[str | Messages],
    answers: Sequence[str],
    *,
    data: DataConfig | None = None,
) -> list[np.ndarray]:
    """The log-probs of each answer's tokens after its prompt, nats, at temperature 1.

    The answer is encoded without special tokens, so the stop token is not among them. ConfigError
    where prompts and answers differ in number, and on a prompt that is too long.
    """
    expected = f"as many as prompts, {len(prompts)}"
    require(len(answers) == len(prompts), "the number of answers", len(answers), expected)
    ids = [model.tokenizer.encode(text, add_special_tokens=False) for text in answers]
    batch = collate(_encoded(model, prompts, data), np.arange(len(prompts)))
    rows = answer_rows(batch, ids, max(map(len, ids)), 0)
    scores = score_batch(
        model.params,
        head_of(model.params, valid_vocab=model.valid_vocab),
        TrainBatch(rows.tokens, rows.mask, rows.segment_ids, None),
        config=model.checkpoint.config,
        needs="token",
    )
    return [row[mask] for row, mask in zip(np.asarray(scores.teacher_logprobs), rows.mask)]


def _encoded(model: Model, prompts: Sequence[str | Messages], data: DataConfig | None) -> PromptSet:
    """ConfigError if there is no prompt, or one that is too long."""
    data = model.data if data is None else data
    if not prompts:
        raise ConfigError("no prompt given; expected one or more")
    rows = [Prompt(prompt if isinstance(prompt, str) else tuple(prompt)) for prompt in prompts]
    data = dataclasses.replace(student_view(data), source="the caller")
    encoded = encode_prompts(rows, data, model.tokenizer, model.tokenizer)
    if encoded.skipped:
        raise ConfigError(
            f"data.max_prompt_length is {data.max_prompt_length}, exceeded by "
            f"{encoded.skipped[0]}; expected more, or shorter prompts"
        )
    return encoded


def scores_of(config: Config) -> dict[str, Any]:
    """The evaluation scores of the config's student; ConfigError without evaluation prompts."""
    evaluation = dataclasses.replace(config.evaluation, kind="answers")
    config = dataclasses.replace(config, evaluation=evaluation)
    checkpoint = open_student(config)
    evaluator = make_evaluator(config, checkpoint, load_tokenizer(checkpoint.path), None)
    if evaluator is None:
        raise ConfigError("evaluation.source is None; expected a data source with answers")
    if skipped := evaluator.prompts.skipped:
        number = evaluator.prompts.num_skipped
        print(f"{number} prompts were too long and are left out, first {skipped[0]}")
    return evaluator(load_params(checkpoint, compute_dtype(config.train.dtype)))


def describe(model: str) -> dict[str, Any]:
    """Facts about a checkpoint, after reading all of it. CheckpointError if it is damaged."""
    checkpoint = open_checkpoint(model)
    # Digests come last: a reader's error says more than that a file has changed.
    load_params(checkpoint, "bfloat16" if checkpoint.stored_dtype == "bfloat16" else "float32")
    tokenizer = load_tokenizer(checkpoint.path)
    fields = dataclasses.asdict(checkpoint.config)
    return {
        "path": str(checkpoint.path),
        "files": check_files((checkpoint.adapter or checkpoint).path),
        "architecture": checkpoint.raw_config["architectures"][0],
        "parameters": num_parameters(checkpoint.config),
        "parameters of a token": num_parameters(checkpoint.config, of_token=True),
        "stored dtype": checkpoint.stored_dtype,
        **{name: value for name, value in fields.items() if name not in RUN_FIELDS},
        "tokenizer ids": num_ids(checkpoint, tokenizer),
        "stop token ids": stop_ids(checkpoint, tokenizer),
        "has chat template": tokenizer.chat_template is not None,
    }
