"""Sampled and greedy answers to held-out prompts, their grades, and the record of these in
eval.jsonl.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from opdjax.config import EvaluationConfig
from opdjax.data.grading import grader_named, votes
from opdjax.data.prompt_rows import Prompt
from opdjax.data.prompts import PromptSet, collate
from opdjax.engine.decoding import EVAL_STREAM, Decoding
from opdjax.engine.sampler import sample
from opdjax.models.decoder import DecoderConfig, Params
from opdjax.ops.multihost import (
    agreed,
    from_process_zero,
    numbers_from_process_zero,
    on_process_zero,
)
from opdjax.ops.sharding import is_process_zero, num_row_shards, to_host
from opdjax.runs.statistics import avg_at_k, by_benchmark, mean_and_interval, pass_at_k, score_label
from opdjax.runs.workdir import NUMBER, append_lines, read_lines, require

EVALUATION_SLOTS = 512  # rows of an evaluation decoded at a time, unless sampling.slots says less
# Runs answer the same prompts with the same random numbers, so that they can be compared.
_SEED = 0
_NUM_SHOWN, _MAX_SHOWN_CHARS = 16, 4000  # answers kept as text, and characters of each
_SCORES = ("avg@k", "pass@k", "greedy")


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A fixed set of prompts with answers, and how to sample and grade completions. Samples depend
    only on the evaluation's seed and the parameters.
    """

    model: DecoderConfig
    prompts: PromptSet
    tokenizer: Any
    config: EvaluationConfig
    decoding: Decoding  # at any temperature
    mesh: Mesh | None = None
    slots: int | None = None  # rows decoded at a time; None: EVALUATION_SLOTS

    def __call__(self, params: Params) -> dict[str, Any]:
        """Scores of these parameters: `avg@k`, `pass@k`, `greedy`, each with the half width of its
        95 % interval.

        `per_prompt` and `per_prompt_greedy` are the numbers of right answers by prompt, for paired
        comparisons of runs; `answers` are the greedy answers to the first prompts, as text. If
        prompts belong to benchmarks, `benchmarks` holds the same three scores of each benchmark and
        their macro mean (see `by_benchmark`).
        """
        greedy, *_, texts = self._grade(params, 0.0, 1)
        scores = self.sampled(params, self.config.temperature)
        scores["greedy"], scores["greedy_interval"] = mean_and_interval(avg_at_k(greedy))
        scores["per_prompt_greedy"] = greedy.sum(axis=1).tolist()
        for name, more in self._benchmarks({"greedy": avg_at_k(greedy)}).items():
            scores["benchmarks"][name] |= more
        first = zip(self.prompts.prompts[:_NUM_SHOWN], texts, greedy[:, 0].tolist())
        return scores | {"answers": [_shown(*answer) for answer in first]}

    def _benchmarks(self, scores: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Scores by benchmark, from one score per prompt; empty if no prompt has a benchmark."""
        names = [prompt.benchmark for prompt in self.prompts.prompts]
        return by_benchmark(names, scores) if any(names) else {}

    def sampled(self, params: Params, temperature: float) -> dict[str, Any]:
        """The scores of sampled answers, at any temperature."""
        k = self.config.num_samples
        correct, lengths, truncated, _ = self._grade(params, temperature, k)
        result: dict[str, Any] = {"temperature": temperature, "n": k, "k": k}
        result["num_prompts"] = len(correct)
        per_prompt = {"avg@k": avg_at_k(correct), "pass@k": pass_at_k(correct, k)}
        for name, values in per_prompt.items():
            result[name], result[f"{name}_interval"] = mean_and_interval(values)
        result |= {"length_mean": float(lengths.mean()), "truncated_ratio": float(truncated.mean())}
        result["per_prompt"] = correct.sum(axis=1).tolist()
        benchmarks = self._benchmarks(per_prompt)
        return result | ({"benchmarks": benchmarks} if benchmarks else {})

    def records(self, params: Params, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The sampled answers to the prompts of these indices, in full and graded, a row each. A
        draw depends on its own index alone, not on the others.
        """
        k = self.config.num_samples
        *columns, texts = self._grade(params, self.config.temperature, k, np.asarray(indices))
        rows = []
        for n, (index, *own) in enumerate(zip(indices, *(column.tolist() for column in columns))):
            prompt, answers = self.prompts.prompts[index], texts[n * k : (n + 1) * k]
            row = {"prompt": prompt.with_tools, "answer": prompt.answer, "completions": answers}
            row |= dict(zip(("correct", "lengths", "truncated"), own))
            rows.append(row | {"votes": votes(self.config.grader, answers)})
        return rows

    def _grade(
        self,
        params: Params,
        temperature: float,
        num_samples: int,
        indices: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """(correct, completion length, truncated), each `[P, num_samples]`, and all completions of
        the prompts of these indices (None: of all).
        """
        indices = np.arange(len(self.prompts)) if indices is None else indices
        devices = num_row_shards(self.mesh)
        rollouts = sample(
            params,
            collate(self.prompts, indices),
            _SEED,
            0,
            config=self.model,
            decoding=dataclasses.replace(self.decoding, temperature=temperature),
            num_generations=num_samples,
            stream=EVAL_STREAM,
            mesh=self.mesh,
            slots=-(-(self.slots or EVALUATION_SLOTS) // devices) * devices,
        )
        rollouts = to_host(rollouts)
        answers = [self.prompts.prompts[n].answer for n in indices for _ in range(num_samples)]
        texts = completions(rollouts, self.tokenizer)
        correct = graded(texts, answers, self.config.grader)
        by_prompt = lambda x: np.asarray(x, np.int32).reshape(-1, num_samples)
        return *map(by_prompt, (correct, rollouts.mask.sum(1), rollouts.is_truncated)), texts


def evaluate(
    evaluator: Evaluator | None, workdir: pathlib.Path, step: int, weights: Callable[[], Params]
) -> dict[str, float] | None:
    """Append this step's scores to eval.jsonl unless they are there; return them, or None without
    an evaluator. Step 0 is also evaluated at the other temperatures.

    `weights` is called only if something is missing.
    """
    if evaluator is None:
        return None
    file, config = workdir / "eval.jsonl", evaluator.config
    found = {(row["step"], row["temperature"]): row for row in read_lines(file)}
    wanted: dict[float, Callable[[Params], dict[str, Any]]] = {config.temperature: evaluator}
    for temperature in config.temperatures if step == 0 else ():
        wanted.setdefault(temperature, partial(evaluator.sampled, temperature=temperature))
    missing = [temperature for temperature in wanted if agreed((step, temperature) not in found)]
    params = weights() if missing else None
    for temperature in missing:
        row = found[step, temperature] = {"step": step, **wanted[temperature](params)}
        on_process_zero(partial(append_lines, file, [row]))
        if temperature == config.temperature and is_process_zero():
            line = "  ".join(f"{score_label(name, row['k'])} {row[name]:.3f}" for name in _SCORES)
            print(f"evaluation at step {step}: {line}")
    # A row of an earlier call is in the file of process zero alone.
    types = {"k": int, "per_prompt": list, "per_prompt_greedy": list}
    types |= dict.fromkeys(_SCORES, NUMBER)
    own = lambda: require(found[step, config.temperature], f"{file}, step {step},", **types)
    return numbers_from_process_zero(_SCORES, own)


def _shown(prompt: Prompt, text: str, is_right: int) -> dict[str, Any]:
    """An answer for the reader; a long one is cut to its start and its end, where the result is."""
    half = _MAX_SHOWN_CHARS // 2
    return {
        "prompt": prompt.prompt,
        "answer": prompt.answer,
        "completion": text if len(text) <= 2 * half else f"{text[:half]} […] {text[-half:]}",
        "is_right": bool(is_right),
    }


def graded(texts: Sequence[str], answers: Sequence[str], grader: str) -> np.ndarray:
    """1 for each text whose answer is right, else 0; `[B]`, int32.

    Only process zero grades: a grader may stop at a timeout, so that two processes could disagree.
    """
    grade = grader_named(grader)
    grades = lambda: np.array(list(map(grade, texts, answers)), np.int32)
    return from_process_zero(grades, np.zeros(len(answers), np.int32))


def completions(rollouts, tokenizer) -> list[str]:
    """The sampled text of each row, without special tokens."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    ids = [row[keep].tolist() for row, keep in zip(tokens, mask)]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def last_tokens(rollouts) -> np.ndarray:
    """The last sampled token of each row, `[B]`; undefined for an empty row."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    return tokens[np.arange(len(tokens)), mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)]
