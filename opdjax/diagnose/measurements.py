"""What `opdjax doctor` measures of a run: a few prompts through its own sampler, scorers and loss.

checks.py and rollouts/checks.py judge the measurements.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.config import Config
from opdjax.data.chat import valid_vocab
from opdjax.data.grading import GRADERS
from opdjax.data.packing import for_teacher, pack, to_train_batch, unpack
from opdjax.data.prompts import collate, indices_at
from opdjax.engine.decoding import Decoding
from opdjax.engine.evaluate import completions
from opdjax.engine.sampler import sample
from opdjax.engine.scorer import score
from opdjax.engine.update import UpdateSpec, loss_and_grad
from opdjax.estimators import estimator_of
from opdjax.judge.replies import ApiError
from opdjax.models.decoder import DecoderConfig, Params, head_of
from opdjax.models.hf import Checkpoint, load_params
from opdjax.ops.sharding import to_host
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TokenInputs, tiled_stats
from opdjax.rollouts.checks import with_student_as_teacher
from opdjax.rollouts.on_policy import draw
from opdjax.rollouts.rows import with_option_columns
from opdjax.rollouts.setup import (
    Setup,
    initial_weights,
    load_student,
    reads_scores,
    update_spec,
    with_current_teacher,
)
from opdjax.types import PromptBatch, Rollouts, TrainBatch

_PADDING = 16  # columns added when scores are repeated
_NUM_GROUPS = 4  # that judges see


@dataclasses.dataclass(frozen=True)
class FirstUpdate:
    """What a first update would do: means over the sampled tokens, and the gradient's norm."""

    log_ratio: float  # mean |teacher log-prob - student log-prob|
    kl: float
    loss: float
    gradient_norm: float

    def __str__(self) -> str:
        return (
            f"mean |log-ratio| {self.log_ratio:.2g}, KL {self.kl:.2g}, loss {self.loss:.2g}, "
            f"gradient norm {self.gradient_norm:.2g}"
        )


class Measurements:
    """Measurements of a run's untrained models on its first prompts, each made at its first use.

    Log-probs and NLLs are in nats, `[P]` is an axis of prompts.
    """

    def __init__(self, run: Setup, num_prompts: int):
        self._run, self._num_prompts = run, num_prompts
        self.config: Config = run.config
        self.backend = jax.default_backend()

    @cached_property
    def setup(self) -> Setup:
        """The run; the student is the teacher where the recipe compares no scores."""
        run = self._run
        if reads_scores(self.config) and not self.config.teacher_is_student:
            return run
        params = self._load(run.student, run.dtype)
        if reads_scores(self.config):
            return with_current_teacher(run, params)
        head = head_of(params, valid_vocab=run.decoding.valid_vocab)
        return with_student_as_teacher(run, params, head)

    @cached_property
    def indices(self) -> np.ndarray:
        """The prompts that are measured."""
        return _first_indices(self._run, self._num_prompts)

    @cached_property
    def prompts(self) -> PromptBatch:
        """Ids of the prompts."""
        return collate(self.setup.prompts, self.indices)

    @cached_property
    def _student(self) -> tuple[Params, Head, DecoderConfig]:
        """The student in the type of the forward pass, with the run's mask and temperature."""
        decoding = self.setup.decoding
        params = self._load(self.setup.student, self.setup.dtype)
        masks = {"valid_vocab": decoding.valid_vocab, "temperature": decoding.temperature}
        return params, head_of(params, **masks), self.setup.student.config

    @property
    def _teacher(self) -> tuple[Params, Head, DecoderConfig]:
        teacher = self.setup.teacher
        return teacher.params, teacher.head, teacher.checkpoint.config

    @property
    def dtypes(self) -> tuple[str, str]:
        """The types of the forward passes of student and teacher."""
        return self.setup.dtype, str(self.setup.teacher.params["embedding"].dtype)

    @cached_property
    def rollouts(self) -> Rollouts:
        """One rollout of each prompt."""
        inputs = (self._student[0], self.prompts, self.config.seed, 0)
        return sample(*inputs, config=self._student[2], decoding=self.setup.decoding)

    @cached_property
    def batch(self) -> TrainBatch:
        """The rollouts as the update reads them, without scores."""
        batch = to_train_batch(self.rollouts, self.prompts)
        if reads_scores(self.config):  # otherwise rewards need whole groups; no check reads them
            data = (self.config, self.setup.prompts, self.setup.tokenizer)
            batch, _ = with_option_columns(batch, self.rollouts, *data)
        return batch

    @cached_property
    def _own_batch(self) -> TrainBatch:
        return dataclasses.replace(self.batch, teacher_view=None)

    @cached_property
    def teacher_answers(self) -> Rollouts:
        """Greedy answers of the teacher."""
        return self._greedy(*self._teacher, for_teacher(self.prompts))

    @cached_property
    def padding(self) -> dict[str, tuple[int, float]]:
        """By role: (rows of the embedding, largest probability of all ids beyond the tokenizer)."""
        inputs = {
            "student": (*self._student, self._own_batch),
            "teacher": (*self._teacher, self.batch),
        }
        found, width = {}, valid_vocab(self.setup.tokenizer)
        for role, (params, head, model, batch) in inputs.items():
            rows, sizes = params["embedding"].shape[0], (width, self.config.estimator.tile)
            mass = _mass_beyond(params, head, batch, model, *sizes) if rows > width else 0
            found[role] = rows, float(mass)
        return found

    def score_at(self, temperature: float) -> np.ndarray:
        """Return the scorer's log-probs `[B, T]` of the rollouts at a temperature of the student.

        They are there one column left and right of the mask too: the tokens are there if it is
        shifted. Nothing predicts column 0.
        """
        params, head, model = self._student
        mask = jnp.asarray(self.batch.mask)
        near = (mask | jnp.roll(mask, 1, axis=1) | jnp.roll(mask, -1, axis=1)).at[:, 0].set(False)
        batch = dataclasses.replace(self._own_batch, mask=near)
        return self._logprobs(
            params, dataclasses.replace(head, temperature=temperature), model, batch
        )

    @cached_property
    def first_updates(self) -> tuple[FirstUpdate, FirstUpdate]:
        """Two updates: with the student's own weights as the teacher, and with the teacher."""
        # The student's view on both sides: another template would put it into another context.
        params = self._load(self.setup.student, self.dtypes[1])
        head = _with_kernel_of(self._teacher[1], params)
        weights = load_student(self.setup)
        itself = self._first_update(weights, params, head, self._student[2], self._own_batch)
        return itself, self._first_update(weights, *self._teacher, self.batch)

    def _first_update(
        self,
        weights: tuple[Params, Params | None],
        params: Params,
        head: Head,
        model: DecoderConfig,
        batch: TrainBatch,
    ) -> FirstUpdate:
        config, own, estimator = self.config, self._own_batch, estimator_of(self.config.estimator)
        # A recipe that reads no scores may still filter rollouts by token log-probs.
        needs = "token" if estimator.teacher == "none" else estimator.teacher
        options = {"needs": needs, "top_k": estimator.top_k, "tile": config.estimator.tile}
        scores = score(params, head, batch, config=model, **options)
        # Micro-batches no larger than the run's.
        rows = own.tokens.shape[0]
        most = max(config.rows_per_step // config.train.gradient_accumulation_steps, 1)
        parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)
        spec = update_spec(self.setup)
        spec = dataclasses.replace(spec, gradient_accumulation_steps=parts, mesh=None)
        loss, norm, outputs = _first_loss(
            *weights,
            dataclasses.replace(own, teacher=scores),
            head if needs == "vocabulary" else None,
            spec,
        )
        mask = np.asarray(own.mask)
        reward = np.asarray(outputs["rewards"])[mask]
        kl = np.asarray(outputs["kl"])[mask] if "kl" in outputs else -reward
        values = (np.abs(reward).mean(), kl.mean(), loss, norm)
        return FirstUpdate(*map(float, values))

    @cached_property
    def _teacher_scores(self) -> np.ndarray:
        return self._logprobs(*self._teacher, self.batch)

    @cached_property
    def teacher_rounding(self) -> np.ndarray:
        """|log-prob - log-prob in float32| of the sampled tokens by the teacher."""
        if self.dtypes[1] == "float32":
            return np.zeros(1)
        params = self._load(self.setup.teacher.checkpoint, "float32")
        head = _with_kernel_of(self._teacher[1], params)
        exact = self._logprobs(params, head, self._teacher[2], self.batch)
        return np.abs(self._teacher_scores - exact)[np.asarray(self.batch.mask)]

    @cached_property
    def repeated_scores(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """The teacher's log-probs of the sampled tokens: scored twice, and with other micro-batches
        and another layout; then that layout.
        """
        batch, length = self.batch, self.config.train.pack_length
        again, parts = self._logprobs(*self._teacher, batch), 1 if batch.tokens.shape[0] % 2 else 2
        if length is None:
            layout, padded = "more padding", _with_padding(batch, _PADDING)
            regrouped = self._logprobs(*self._teacher, padded, parts)[:, _PADDING:]
        else:
            layout, (packed, source) = "packed rows", pack(batch, length, parts=parts)
            scores = self._logprobs(*self._teacher, packed, parts)
            regrouped = unpack(scores, source, batch.tokens.shape)
        mask = np.asarray(batch.mask)
        return *(each[mask] for each in (self._teacher_scores, again, regrouped)), layout

    @cached_property
    def nll(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """NLL a token by student and teacher `[P]`; whether of references, otherwise of prompts."""
        data, encode = self.setup.prompts, self.setup.tokenizer.encode
        rows = [data.prompts[i] for i in self.indices]
        has_references = all(row.references and row.references[0] for row in rows)
        texts: list[list[int]] = [[] for _ in rows]
        if has_references:
            texts = [encode(row.references[0], add_special_tokens=False) for row in rows]
        student = self._nll(*self._student, data.student_ids, texts)
        teacher = self._nll(*self._teacher, data.teacher_ids or data.student_ids, texts)
        return student, teacher, has_references

    @cached_property
    def correct(self) -> tuple[int, int] | None:
        """Correct greedy answers of student and teacher; None if they cannot be graded."""
        evaluation, tokenizer = self.config.evaluation, self.setup.tokenizer
        answers = [self.setup.prompts.prompts[i].answer for i in self.indices]
        if evaluation.source is None or None in answers:
            return None
        own, grade = self._greedy(*self._student, self.prompts), GRADERS[evaluation.grader]
        texts = (completions(each, tokenizer) for each in (own, self.teacher_answers))
        return tuple(sum(map(bool, map(grade, each, answers))) for each in texts)

    @cached_property
    def judged(self) -> tuple[list, dict[str, float], str | None]:
        """(Judgements of the first groups, usage of a whole run, why the judges failed or None)."""
        from opdjax.rollouts.judged import JudgedSource, background_judge  # needs an extra

        run, config, indices = self._run, self.config, _first_indices(self._run, _NUM_GROUPS)
        rollouts = to_host(draw(run, initial_weights(run), collate(run.prompts, indices), 0))
        with tempfile.TemporaryDirectory() as name:
            scratch = pathlib.Path(name)
            with background_judge(config, scratch) as background:
                try:
                    judged = list(JudgedSource(run, scratch, background).judge(rollouts))
                except ApiError as error:
                    return [], {}, str(error)
                scale = config.train.prompts_per_step * config.train.num_steps / len(indices)
                usage = {key: scale * x for key, x in background.record_usage(0).items()}
                return [each for judgements in judged for each in judgements], usage, None

    # Passes through the models

    def _load(self, checkpoint: Checkpoint, dtype: str) -> Params:
        # Placed as the teacher's: models of one shape then share a program.
        return load_params(checkpoint, dtype, self._run.mesh)

    def _logprobs(
        self, params: Params, head: Head, model: DecoderConfig, batch: TrainBatch, parts: int = 1
    ) -> np.ndarray:
        """Return log-probs `[B, T]` of the batch's tokens, from the scorer of the run's teacher."""
        tile = self.config.estimator.tile
        scores = score(params, head, batch, config=model, needs="token", tile=tile, parts=parts)
        return np.asarray(scores.teacher_logprobs)

    def _nll(
        self,
        params: Params,
        _: Head,
        model: DecoderConfig,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
    ) -> np.ndarray:
        """Return the mean NLL a token of each text `[P]` after its prompt, at temperature 1.

        For an empty text, that of the prompt's tokens except the first.
        """
        prompts = [prompts[i] for i in self.indices]
        width = -(-max(len(p) + len(t) for p, t in zip(prompts, texts)) // 16) * 16
        tokens, segments, mask = np.zeros((3, len(prompts), width), np.int32)
        for row, (prompt, text) in enumerate(zip(prompts, texts)):
            end = len(prompt) + len(text)
            tokens[row, :end], segments[row, :end] = [*prompt, *text], 1
            mask[row, len(prompt) if text else 1 : end] = 1
        batch = TrainBatch(tokens, mask.astype(bool), segments, np.zeros(mask.shape, np.float32))
        head = head_of(params, valid_vocab=self.setup.decoding.valid_vocab)
        logprobs = self._logprobs(params, head, model, batch)
        return -logprobs.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)

    def _greedy(
        self, params: Params, _: Head, model: DecoderConfig, prompts: PromptBatch
    ) -> Rollouts:
        """Sample greedy answers that stop at any id with which one of the two models may stop."""
        setup, decoding = self.setup, self.setup.decoding
        stops = {*setup.teacher.checkpoint.stop_token_ids, *setup.student.stop_token_ids}
        stops |= {setup.tokenizer.eos_token_id, setup.teacher.tokenizer.eos_token_id}
        stop_token_ids = tuple(sorted((stops | {*decoding.stop_token_ids}) - {None}))
        length, valid = decoding.max_completion_length, decoding.valid_vocab
        decoding = Decoding(length, stop_token_ids, temperature=0.0, valid_vocab=valid)
        prompts = dataclasses.replace(prompts, teacher_tokens=None, teacher_mask=None)
        return sample(params, prompts, 0, 0, config=model, decoding=decoding)


def _first_indices(run: Setup, count: int) -> np.ndarray:
    return indices_at(0, min(count, len(run.prompts)), len(run.prompts), run.config.seed)


def _with_kernel_of(head: Head, params: Params) -> Head:
    """Return the head's masking and temperature with the weights of `params`."""
    return dataclasses.replace(head, kernel=head_of(params).kernel)


def _with_padding(batch: TrainBatch, columns: int) -> TrainBatch:
    """Return the batch with empty columns on the left, also in the teacher's view."""
    widen = lambda x: jnp.pad(x, [(0, 0), (columns, 0), *[(0, 0)] * (x.ndim - 2)])
    view = batch.teacher_view
    if view is not None:
        view = dataclasses.replace(jax.tree.map(widen, view), columns=widen(view.columns + columns))
    own = dataclasses.replace(batch, teacher_view=None)
    return dataclasses.replace(jax.tree.map(widen, own), teacher_view=view)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _mass_beyond(
    params: Params, head: Head, batch: TrainBatch, model: DecoderConfig, width: int, tile: int
) -> jax.Array:
    """Return the largest probability of all ids >= `width` together at any scored position."""
    hidden = score(params, head, batch, config=model, needs="vocabulary", tile=tile).hidden
    beyond = lambda tile, _, row: jnp.sum(jnp.exp(tile.logprobs[:, width:]), axis=-1)
    columns = TokenInputs(batch.tokens)
    return jnp.max(tiled_stats(beyond, hidden, head, batch.mask, columns, tile=tile))


@partial(jax.jit, static_argnames="spec")
def _first_loss(
    params: Params, frozen: Params | None, batch: TrainBatch, head: Head | None, spec: UpdateSpec
):
    """Return (loss, norm of the gradient, outputs) of the run's own update."""
    loss, gradient, outputs, _ = loss_and_grad(params, batch, head, spec, frozen=frozen)
    return loss, jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient))), outputs
