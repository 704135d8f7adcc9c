"""Sampled and greedy answers to held-out prompts, graded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from opdjax.config import EvaluationConfig
from opdjax.data.grading import GRADERS
from opdjax.data.prompt_rows import Prompt
from opdjax.data.prompts import PromptSet, collate
from opdjax.engine.decoding import EVAL_STREAM, Decoding
from opdjax.engine.sampler import sample
from opdjax.models.decoder import DecoderConfig, Params
from opdjax.ops.multihost import from_process_zero
from opdjax.ops.sharding import num_row_shards, to_host
from opdjax.runs.statistics import avg_at_k, by_benchmark, mean_and_interval, pass_at_k

_SHOWN, _LETTERS = 16, 4000  # answers kept as text, and letters of each


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A fixed set of prompts with answers, and how to draw and grade completions. Draws depend on
    the evaluation's seed alone.
    """

    model: DecoderConfig
    prompts: PromptSet
    tokenizer: Any
    config: EvaluationConfig
    stop_token_ids: tuple[int, ...]
    valid_vocab: int
    mesh: Mesh | None = None

    def __call__(self, params: Params) -> dict[str, Any]:
        """Scores of these parameters: `avg@k`, `pass@k`, `greedy`, each with the half width of its
        95 % interval.

        `per_prompt` and `per_prompt_greedy` hold the right answers of each prompt, so that runs
        compare prompt by prompt; `answers` the greedy ones to the first prompts as text, to be read
        side by side. Where prompts belong to benchmarks, `benchmarks` holds the same three scores
        of each and their macro mean (see `by_benchmark`).
        """
        greedy, _, _, texts = self._grade(params, 0.0, 1)
        scores = self.sampled(params, self.config.temperature)
        mean, interval = mean_and_interval(avg_at_k(greedy))
        scores |= {
            "greedy": mean,
            "greedy_interval": interval,
            "per_prompt_greedy": greedy.sum(axis=1).tolist(),
        }
        for name, more in self._benchmarks({"greedy": avg_at_k(greedy)}).items():
            scores["benchmarks"][name] |= more
        return scores | {
            "answers": [
                _shown(*each)
                for each in zip(self.prompts.prompts[:_SHOWN], texts, greedy[:, 0].tolist())
            ]
        }

    def _benchmarks(self, scores: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Of one score a prompt; nothing where prompts belong to no benchmark."""
        names = [prompt.benchmark for prompt in self.prompts.prompts]
        return by_benchmark(names, scores) if any(names) else {}

    def sampled(self, params: Params, temperature: float) -> dict[str, Any]:
        """The scores of sampled answers alone, at any temperature."""
        k = self.config.num_samples
        correct, lengths, truncated, _ = self._grade(params, temperature, k)
        result: dict[str, Any] = {
            "temperature": temperature,
            "n": k,
            "k": k,
            "num_prompts": len(correct),
        }
        per_prompt = {"avg@k": avg_at_k(correct), "pass@k": pass_at_k(correct, k)}
        for name, each in per_prompt.items():
            result[name], result[f"{name}_interval"] = mean_and_interval(each)
        result |= {"length_mean": float(lengths.mean()), "truncated_ratio": float(truncated.mean())}
        found = self._benchmarks(per_prompt)
        return (
            result
            | {"per_prompt": correct.sum(axis=1).tolist()}
            | ({"benchmarks": found} if found else {})
        )

    def _grade(
        self, params, temperature, num_samples
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """(correct, completion length, truncated), each `[P, num_samples]`, and the texts of all."""
        config = self.config
        decoding = Decoding(
            config.max_completion_length,
            self.stop_token_ids,
            temperature=temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            valid_vocab=self.valid_vocab,
        )
        devices = num_row_shards(self.mesh)
        rollouts = sample(
            params,
            collate(self.prompts, np.arange(len(self.prompts))),
            config.seed,
            0,
            config=self.model,
            decoding=decoding,
            num_generations=num_samples,
            stream=EVAL_STREAM,
            mesh=self.mesh,
            slots=-(-config.batch_size // devices) * devices,
        )
        rollouts = to_host(rollouts)
        answers = [prompt.answer for prompt in self.prompts.prompts for _ in range(num_samples)]
        texts = completions(rollouts, self.tokenizer)
        correct = graded_texts(texts, answers, config.grader)
        lengths, truncated = np.asarray(rollouts.mask).sum(1), np.asarray(rollouts.is_truncated)
        return *(
            np.asarray(column, np.int32).reshape(-1, num_samples)
            for column in (correct, lengths, truncated)
        ), texts


def _shown(prompt: Prompt, text: str, is_right: int) -> dict[str, Any]:
    """An answer to be read; of a long one its start and its end, where the result stands."""
    cut = (
        text if len(text) <= _LETTERS else f"{text[: _LETTERS // 2]} […] {text[-(_LETTERS // 2) :]}"
    )
    return {
        "prompt": prompt.prompt,
        "answer": prompt.answer,
        "completion": cut,
        "is_right": bool(is_right),
    }


def graded(rollouts, answers: Sequence[str], tokenizer, grader: str) -> np.ndarray:
    """1 for each completion (on the host) whose answer is right, 0 for the others; `[B]`, int32."""
    return graded_texts(completions(rollouts, tokenizer), answers, grader)


def graded_texts(texts: Sequence[str], answers: Sequence[str], grader: str) -> np.ndarray:
    """1 for each text whose answer is right, 0 for the others; `[B]`, int32.

    Of several processes the lead alone grades: a grader may give up by the clock, so that two of
    them could disagree.
    """
    grade = GRADERS[grader]
    grades = lambda: np.array(
        [grade(text, answer) for text, answer in zip(texts, answers)], np.int32
    )
    return from_process_zero(grades, np.zeros(len(answers), np.int32))


def completions(rollouts, tokenizer) -> list[str]:
    """The sampled text of each row, special tokens left out."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    return tokenizer.batch_decode(
        [row[keep].tolist() for row, keep in zip(tokens, mask)], skip_special_tokens=True
    )
