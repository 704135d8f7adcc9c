"""How far a student is from its teacher on held-out prompts: exact divergences at every token of
answers that the student samples, and of answers that the teacher samples.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from opdjax.config import Config
from opdjax.data.packing import answer_rows, for_teacher, to_train_batch
from opdjax.data.prompt_rows import first_of_each, read_prompts
from opdjax.data.prompts import PromptSet, collate, encode_prompts
from opdjax.data.sources import ColumnMap
from opdjax.engine.decoding import EVAL_STREAM, Decoding
from opdjax.engine.sampler import sample
from opdjax.engine.scorer import score
from opdjax.estimators.diagnostics import entropy
from opdjax.estimators.divergence import forward_kl, jsd, reverse_kl
from opdjax.models.decoder import DecoderConfig, Params, head_of
from opdjax.ops.multihost import agreed, numbers_from_process_zero, on_process_zero
from opdjax.ops.sharding import is_process_zero, num_row_shards, shard_rows, to_host
from opdjax.ops.tile import Head, VocabTile
from opdjax.ops.vocab import TILE, TokenInputs, tiled_stats
from opdjax.runs.results import DIVERGENCES
from opdjax.runs.statistics import clustered_ratio
from opdjax.runs.workdir import append_lines, read_lines, require
from opdjax.types import PromptBatch, Rollouts, TrainBatch

LOG = "divergence.jsonl"
_SEED = 0  # runs draw with the same random numbers, so that they can be compared
ROWS_AT_A_TIME = 64  # rows whose hidden states exist at a time
DIVERGENCE_SLOTS = 128  # rows decoded at a time, unless sampling.slots says less


@dataclasses.dataclass(frozen=True)
class DivergenceEvaluator:
    """A fixed set of prompts, a frozen teacher that shares the student's ids, and how both answer.
    What it measures depends only on the student's parameters.
    """

    student: DecoderConfig
    teacher: DecoderConfig
    teacher_params: Params
    prompts: PromptSet
    student_decoding: Decoding
    teacher_decoding: Decoding
    num_samples: int  # answers of each model to a prompt
    mesh: Mesh
    slots: int | None = None

    def __call__(self, params: Params) -> dict[str, Any]:
        """Measures of these parameters on the `student`'s and on the `teacher`'s answers.

        Each is a mean over tokens at the temperature of the answers, in nats, with NAME_interval,
        half of its 95 % interval over prompts: `reverse_kl` (KL(student || teacher)), `forward_kl`
        (KL(teacher || student)), `jsd` (Jensen-Shannon, both weighing 1/2), `agreement` (share of
        tokens with the same most likely id), `student_entropy`, `teacher_entropy`; `length` is in
        tokens. `per_prompt` holds the sum of `reverse_kl` over a prompt's tokens and their number,
        for paired comparisons of runs.
        """
        own = self._draw(params, self._batch, self.student, self.student_decoding)
        result = {
            "student": self._measure(params, own),
            "teacher": self._measure(params, self._given),
        }
        size, temperature = len(self.prompts), self.student_decoding.temperature
        return {"temperature": temperature, "num_prompts": size, "n": self.num_samples} | result

    @functools.cached_property
    def _batch(self) -> PromptBatch:
        return collate(self.prompts, np.arange(len(self.prompts)))

    @functools.cached_property
    def _given(self) -> Rollouts:
        """The teacher's answers after the student's prompts. They are the same at every step."""
        written = self._draw(
            self.teacher_params, for_teacher(self._batch), self.teacher, self.teacher_decoding
        )
        answers = [row[keep].tolist() for row, keep in zip(written.tokens, written.mask)]
        return answer_rows(self._batch, answers, self.teacher_decoding.max_completion_length, 0)

    def _draw(
        self, params: Params, prompts: PromptBatch, config: DecoderConfig, decoding: Decoding
    ) -> Rollouts:
        shards = num_row_shards(self.mesh)
        return to_host(
            sample(
                params,
                prompts,
                _SEED,
                0,
                config=config,
                decoding=decoding,
                num_generations=self.num_samples,
                stream=EVAL_STREAM,
                mesh=self.mesh,
                slots=-(-(self.slots or DIVERGENCE_SLOTS) // shards) * shards,
            )
        )

    def _measure(self, params: Params, rollouts: Rollouts) -> dict[str, Any]:
        batch = to_host(to_train_batch(rollouts, self._batch))
        parts = [self._sums(params, part) for part in _parts(batch, num_row_shards(self.mesh))]
        by_row = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        rows = len(rollouts.tokens)
        by_prompt = {
            name: x[:rows].reshape(-1, self.num_samples).sum(1) for name, x in by_row.items()
        }
        tokens, result = by_prompt.pop("tokens"), {}
        for name, sums in by_prompt.items():
            result[name], result[f"{name}_interval"] = clustered_ratio(sums, tokens)
        answers = np.full(len(tokens), self.num_samples)
        result["length"], result["length_interval"] = clustered_ratio(tokens, answers)
        pairs = zip(by_prompt["reverse_kl"].tolist(), tokens.tolist())
        return result | {"per_prompt": [[round(total, 5), int(count)] for total, count in pairs]}

    def _sums(self, params: Params, batch: TrainBatch) -> dict[str, np.ndarray]:
        """Sum of each measure over the tokens of each row, `[B]`."""
        batch, own = shard_rows(batch, self.mesh), self.student_decoding
        head, teacher_head = (
            head_of(weights, valid_vocab=own.valid_vocab, temperature=own.temperature)
            for weights in (params, self.teacher_params)
        )
        read = partial(score, needs="vocabulary", tile=TILE, mesh=self.mesh)
        plain = dataclasses.replace(batch, teacher_view=None)
        hidden = read(params, head, plain, config=self.student).hidden
        theirs = read(self.teacher_params, teacher_head, batch, config=self.teacher).hidden
        return to_host(_summed(hidden, head, theirs, teacher_head, batch, mesh=self.mesh))


def make_divergence_evaluator(
    config: Config,
    models: tuple[DecoderConfig, DecoderConfig, Params],
    tokenizers: tuple[Any, Any],
    decodings: tuple[Decoding, Decoding],
    mesh: Mesh,
) -> DivergenceEvaluator:
    """The evaluator of a config with its prompts. `models`: the student's and the teacher's
    decoder, and the teacher's parameters; tokenizers and decodings are of student and teacher.
    """
    evaluation = config.evaluation
    names = config.data.column_names | evaluation.column_names
    columns = ColumnMap(**{name: names[name] for name in ("prompt", "benchmark") if name in names})
    data = dataclasses.replace(config.data, source=evaluation.source, columns=(), references=None)
    rows = read_prompts(data.source, columns, skips_bad_rows=data.skip_bad_rows)
    prompts = encode_prompts(first_of_each(rows, evaluation.num_prompts), data, *tokenizers)
    names = ("max_completion_length", "top_k", "top_p", "temperature")
    own = {name: getattr(evaluation, name) for name in names}
    how = [dataclasses.replace(decoding, **own) for decoding in decodings]
    samples, slots = evaluation.num_samples, config.sampling.slots
    return DivergenceEvaluator(*models, prompts, *how, samples, mesh, slots)


def measure(
    evaluator: DivergenceEvaluator | None,
    workdir: pathlib.Path,
    step: int,
    weights: Callable[[], Params],
) -> dict[str, float]:
    """Append this step's measures to divergence.jsonl unless they are there; return the means by
    WRITER/NAME, or nothing without an evaluator. `weights` is called only if they are missing.
    """
    if evaluator is None:
        return {}
    file = workdir / LOG
    found = {row["step"]: row for row in read_lines(file)}
    if agreed(step not in found):
        found[step] = {"step": step, **evaluator(weights())}
        on_process_zero(partial(append_lines, file, [found[step]]))
        if is_process_zero():
            own, given = found[step]["student"], found[step]["teacher"]
            print(
                f"divergence at step {step}: KL(student || teacher) {own['reverse_kl']:.3f} on the "
                f"student's answers, KL(teacher || student) {given['forward_kl']:.3f} on the "
                f"teacher's, same most likely token {own['agreement']:.1%}"
            )
    types, writers = dict.fromkeys(DIVERGENCES, float), ("student", "teacher")
    row_of = lambda writer: require(
        found[step][writer], f"{file}, {writer} of step {step},", **types
    )
    # A row of an earlier call is in the file of process zero alone.
    own = lambda: flatten_dict({writer: row_of(writer) for writer in writers}, sep="/")
    names = [f"{writer}/{name}" for writer in writers for name in DIVERGENCES]
    return numbers_from_process_zero(names, own)


@partial(jax.jit, static_argnames="mesh")
def _summed(
    hidden: jax.Array,
    head: Head,
    theirs: jax.Array,
    teacher_head: Head,
    batch: TrainBatch,
    mesh: Mesh,
) -> dict[str, jax.Array]:
    measured = tiled_stats(
        _measures,
        hidden,
        head,
        batch.mask,
        TokenInputs(batch.tokens),
        (theirs, teacher_head),
        tile=TILE,
        mesh=mesh,
    )
    return {name: jnp.sum(x, axis=1) for name, x in measured.items()}


def _measures(student: VocabTile, teacher: VocabTile, row: TokenInputs) -> dict[str, jax.Array]:
    is_same = student.top_k(1)[:, 0] == teacher.top_k(1)[:, 0]
    return {
        "tokens": jnp.ones(row.tokens.shape, student.logits.dtype),
        "reverse_kl": reverse_kl(student, teacher),
        "forward_kl": forward_kl(student, teacher),
        "jsd": jsd(student, teacher, 0.5),
        "agreement": is_same.astype(student.logits.dtype),
        "student_entropy": entropy(student),
        "teacher_entropy": entropy(teacher),
    }


def _parts(batch: TrainBatch, shards: int) -> list[TrainBatch]:
    """The rows in parts of equal size, the last one filled up with empty rows."""
    rows = len(batch.tokens)
    size = min(-(-ROWS_AT_A_TIME // shards), -(-rows // shards)) * shards
    fill = lambda x: np.concatenate([x, np.zeros((-len(x) % size, *x.shape[1:]), x.dtype)])
    batch = jax.tree.map(fill, batch)
    return [
        jax.tree.map(lambda x, start=start: x[start : start + size], batch)
        for start in range(0, rows, size)
    ]
