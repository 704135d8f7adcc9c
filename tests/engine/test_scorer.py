"""Scores against dense float64 log-softmaxes: the student's rows, the teacher's own view, packed
rows, sharded rows.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.config import MINI_STUDENT, MINI_TEACHER, DataConfig
from opdjax.data.packing import to_train_batch
from opdjax.data.prompt_rows import read_prompts
from opdjax.data.prompts import encode_prompts
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.decoding import TRAIN_STREAM, Decoding
from opdjax.engine.sampler import sample
from opdjax.engine.scorer import score
from opdjax.models import decoder
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.sharding import make_mesh, replicated, shard_rows
from opdjax.ops.tile import Head, head_logits
from opdjax.ops.vocab import TokenInputs, tiled_stats
from opdjax.types import PromptBatch, TeacherScores, TeacherView, TrainBatch

WARM = {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "valid_vocab": 70}
WIDTH, LENGTH, TEACHER_WIDTH, TILE = (
    16,
    24,
    48,
    100,
)  # the tile divides neither the rows' tokens nor a shard's
ROUNDING = 3e-5  # of float32 log-probs, at most; a tenth of it on average


@pytest.fixture(scope="module")
def models():
    """Student and teacher: parameters (`exact`: in float64), config, and `dense`, the log-probs of
    each column's token in whole rows.
    """

    def load(path):
        checkpoint = open_checkpoint(path)
        params = load_params(checkpoint, "float32")
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)

        @jax.jit
        def logits_of(params, tokens, segments):
            return head_logits(
                decoder.head_of(params),
                decoder.forward(params, checkpoint.config, tokens, segments),
            )

        def dense(tokens, segments, temperature=1.0):
            with jax.enable_x64(True):
                logits = (
                    logits_of(exact, np.asarray(tokens), np.asarray(segments))[:, :-1] / temperature
                )
                logprobs = np.asarray(jax.nn.log_softmax(logits))
            picked = np.take_along_axis(logprobs, np.asarray(tokens)[:, 1:, None], -1)[:, :, 0]
            return np.pad(picked, ((0, 0), (1, 0)))

        return types.SimpleNamespace(
            checkpoint=checkpoint, params=params, exact=exact, config=checkpoint.config, dense=dense
        )

    return types.SimpleNamespace(student=load(MINI_STUDENT), teacher=load(MINI_TEACHER))


def pad_left(rows, width):
    """(tokens, mask) `[len(rows), width]`."""
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return tokens, mask


@pytest.fixture(scope="module")
def prompts(models):
    """64 prompts of 14, 6, 1 and 0 tokens; the teacher's also hold worked examples, cut to many
    lengths.
    """
    tokenizer = load_tokenizer(models.student.checkpoint.path)
    rows = read_prompts("arithmetic:test")[:64]
    chat, bare = (
        encode_prompts(rows, DataConfig(format=form), tokenizer, tokenizer).student_ids
        for form in ("chat", "raw")
    )
    example = tokenizer.encode("".join(row.prompt + row.references[0] for row in rows[:3]))
    forms = [lambda i: chat[i], lambda i: bare[i], lambda i: bare[i][:1], lambda i: ()]
    student_rows = [forms[i % 4](i) for i in range(64)]
    teacher_rows = [
        (*example[: 5 + i % 29], *chat[i]) if row else () for i, row in enumerate(student_rows)
    ]
    teacher_tokens, teacher_mask = pad_left(teacher_rows, TEACHER_WIDTH)
    return PromptBatch(
        *pad_left(student_rows, WIDTH), np.arange(64, dtype=np.int32), teacher_tokens, teacher_mask
    )


@pytest.fixture(scope="module")
def draw(models):
    """draw(prompts, generations, **options of Decoding) -> the student's rollouts."""

    def draw(prompts, num_generations, **options):
        decoding = Decoding(LENGTH, models.student.checkpoint.stop_token_ids, **options)
        bare = dataclasses.replace(prompts, teacher_tokens=None, teacher_mask=None)
        # With all arguments, as in test_sampler.py, so that both files share compiled programs.
        return sample(
            models.student.params,
            bare,
            0,
            0,
            config=models.student.config,
            decoding=decoding,
            num_generations=num_generations,
            stream=TRAIN_STREAM,
            first_sample=0,
            mesh=None,
        )

    return draw


@pytest.fixture(scope="module")
def rollouts(draw, prompts):
    """One rollout of each prompt, from the plain softmax."""
    return draw(prompts, 1)


@pytest.fixture(scope="module")
def batch(rollouts, prompts):
    """The batch of a teacher that reads the student's rows."""
    return dataclasses.replace(to_train_batch(rollouts, prompts), teacher_view=None)


@pytest.fixture(scope="module")
def warm(draw, prompts):
    """Eight rollouts of each of eight prompts, tempered and filtered, and their batch, whose
    teacher reads its own prompts.
    """
    few = jax.tree.map(lambda x: x[:8], prompts)
    rollouts = draw(few, 8, **WARM)
    return rollouts, to_train_batch(rollouts, few)


@pytest.fixture(scope="module")
def with_view(warm):
    return warm[1]


@pytest.fixture(scope="module")
def run(models):
    """run(batch, needs, mesh=None, head=None, **more) -> the teacher's scores in float64, in which
    all layouts agree to 1e-9.
    """

    def run(batch, needs, mesh=None, head=None, **more):
        teacher = models.teacher
        with jax.enable_x64(True):
            params, head = teacher.exact, head or decoder.head_of(teacher.exact)
            if mesh is not None:
                batch = shard_rows(batch, mesh)
                params, head = jax.device_put((params, head), replicated(mesh))
            return score(
                params,
                head,
                batch,
                config=teacher.config,
                needs=needs,
                tile=TILE,
                mesh=mesh,
                **more,
            )

    return run


def assert_scores(actual, expected, mask, atol=1e-9):
    """Scores are equal where the student sampled, and 0 elsewhere."""
    actual, expected, mask = map(np.asarray, (actual, expected, mask))
    assert actual.shape == mask.shape
    assert mask.sum() > 100
    np.testing.assert_allclose(actual[mask], expected[mask], atol=atol, rtol=0)
    assert np.abs(actual - expected)[mask].mean() < atol / 10
    np.testing.assert_array_equal(actual[~mask], 0)


@jax.jit
def taken(hidden, head, batch):
    """Log-probs of the sampled tokens from hidden states, by the tiled pass."""
    take = lambda model, _, row: model.logprob(row.tokens)
    return tiled_stats(take, hidden, head, batch.mask, TokenInputs(batch.tokens), tile=TILE)


def test_the_student_scores_its_rollouts_as_it_sampled_them(rollouts, batch, models):
    student = models.student
    scores = score(
        student.params,
        decoder.head_of(student.params),
        batch,
        config=student.config,
        needs="token",
        tile=TILE,
    )
    assert_scores(scores.teacher_logprobs, rollouts.unfiltered_logprobs, batch.mask, atol=ROUNDING)
    assert_scores(
        scores.teacher_logprobs,
        student.dense(batch.tokens, batch.segment_ids),
        batch.mask,
        atol=ROUNDING,
    )


def test_tempered_and_filtered_rollouts_are_scored_at_their_temperature(warm, models):
    """`unfiltered_logprobs` is the student under its head at the sampling temperature; the
    behaviour is not.
    """
    (rollouts, batch), student = warm, models.student
    batch = dataclasses.replace(batch, teacher_view=None)
    head = decoder.head_of(student.params, valid_vocab=70, temperature=1.5)
    ours = score(
        student.params, head, batch, config=student.config, needs="token", tile=TILE
    ).teacher_logprobs
    assert_scores(ours, rollouts.unfiltered_logprobs, batch.mask, atol=ROUNDING)
    np.testing.assert_array_equal(batch.behavior_logprobs, rollouts.behavior_logprobs)
    gap = np.asarray(rollouts.behavior_logprobs - ours)[np.asarray(batch.mask)]
    assert gap.min() > -ROUNDING
    assert gap.mean() > 0.01


def test_token_scores_equal_the_dense_log_softmax(batch, run, models):
    scores = run(batch, "token")
    expected = models.teacher.dense(batch.tokens, batch.segment_ids)
    assert_scores(scores.teacher_logprobs, expected, batch.mask)
    assert (
        np.abs(expected - models.student.dense(batch.tokens, batch.segment_ids))[
            np.asarray(batch.mask)
        ].mean()
        > 0.05
    )


def test_hidden_states_give_the_same_log_probs(batch, run, models):
    scores = run(batch, "vocabulary")
    assert scores.teacher_logprobs is None
    assert scores.hidden.shape == (*batch.tokens.shape, models.teacher.config.hidden_size)
    with jax.enable_x64(True):
        ours = taken(scores.hidden, decoder.head_of(models.teacher.exact), batch)
    assert_scores(ours, run(batch, "token").teacher_logprobs, batch.mask)


def test_the_most_likely_ids_are_those_of_the_whole_distribution(batch, run, models):
    """Most likely first, with log-probs under the full softmax, and the sampled token's log-prob;
    the same in parts and at once.
    """
    scores = run(batch, "top_k", top_k=7)
    assert scores.hidden is None
    assert_scores(scores.teacher_logprobs, run(batch, "token").teacher_logprobs, batch.mask)
    with jax.enable_x64(True):
        logits = head_logits(
            decoder.head_of(models.teacher.exact), run(batch, "vocabulary").hidden[:, :-1]
        )
        best, ids = jax.lax.top_k(jax.nn.log_softmax(logits), 7)
    mask = np.asarray(batch.mask)
    np.testing.assert_array_equal(
        np.asarray(scores.teacher_top_ids)[mask], np.asarray(ids)[mask[:, 1:]]
    )
    np.testing.assert_allclose(
        np.asarray(scores.teacher_top_logprobs)[mask], np.asarray(best)[mask[:, 1:]], atol=1e-9
    )
    assert not np.asarray(scores.teacher_top_ids)[~mask].any()
    again = run(batch, "top_k", top_k=7, parts=4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), again, scores)
    assert (
        run(batch, "top_k", top_k=10**6).teacher_top_ids.shape[2]
        == models.teacher.config.vocab_size
    )


@pytest.fixture(scope="module")
def expected_in_view(with_view, models):
    """Dense scores of the teacher's own rows, with completion columns at the student's places."""
    view = with_view.teacher_view
    dense = models.teacher.dense(view.tokens, view.segment_ids)
    return np.pad(dense[:, TEACHER_WIDTH:], ((0, 0), (WIDTH, 0)))


def test_the_teacher_scores_its_own_view_at_the_students_columns(with_view, run, expected_in_view):
    assert_scores(run(with_view, "token").teacher_logprobs, expected_in_view, with_view.mask)
    own = np.asarray(
        run(dataclasses.replace(with_view, teacher_view=None), "token").teacher_logprobs
    )
    assert (
        np.abs(expected_in_view - own)[np.asarray(with_view.mask)].mean() > 0.05
    )  # the longer prompt matters


def test_hidden_states_of_a_view_give_the_same_log_probs(with_view, run, models, expected_in_view):
    hidden = run(with_view, "vocabulary").hidden
    assert hidden.shape[:2] == with_view.tokens.shape
    with jax.enable_x64(True):
        ours = taken(hidden, decoder.head_of(models.teacher.exact), with_view)
    assert_scores(ours, expected_in_view, with_view.mask)


def test_a_view_may_have_other_columns_in_every_row(with_view, run, expected_in_view):
    """The same teacher rows padded on the right, so that columns differ by row."""
    view = jax.tree.map(np.asarray, with_view.teacher_view)
    shift = np.where(np.asarray(with_view.mask).any(1), np.argmax(view.segment_ids != 0, axis=1), 0)
    assert len(np.unique(shift)) == 7  # six prompts and the filler
    roll = lambda x: np.stack([np.roll(row, -by) for row, by in zip(x, shift)])
    moved = TeacherView(
        roll(view.tokens), roll(view.segment_ids), np.maximum(view.columns - shift[:, None], 0)
    )
    scores = run(dataclasses.replace(with_view, teacher_view=moved), "token")
    assert_scores(scores.teacher_logprobs, expected_in_view, with_view.mask)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"needs": "token"}, marks=pytest.mark.long),
        {"needs": "top_k", "top_k": 5},
        pytest.param({"needs": "vocabulary"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_eight_devices_score_as_one(with_view, run, how):
    mesh = make_mesh(8)
    alone, sharded = (run(with_view, mesh=m, **how) for m in (None, mesh))
    assert jax.tree.structure(alone) == jax.tree.structure(sharded)
    for expected, actual in zip(jax.tree.leaves(alone), jax.tree.leaves(sharded)):
        assert actual.addressable_shards[0].data.shape[0] == 8
        live = np.asarray(with_view.segment_ids) > 0
        np.testing.assert_allclose(
            np.asarray(actual)[live], np.asarray(expected)[live], atol=1e-9, rtol=0
        )


def pack_pairs(batch):
    """Rows 2i and 2i + 1 in one row of twice the width, without padding between them, and the
    origin of each column.
    """
    tokens, mask, segments = (np.asarray(x) for x in (batch.tokens, batch.mask, batch.segment_ids))
    count, width = tokens.shape
    packed = [np.zeros((count // 2, 2 * width), x.dtype) for x in (tokens, mask, segments)]
    origin = np.full((count // 2, 2 * width), -1)
    for row in range(count):
        columns = np.flatnonzero(segments[row])
        start = np.count_nonzero(packed[2][row // 2])
        at = row // 2, slice(start, start + columns.size)
        for target, source in zip(
            packed, (tokens[row, columns], mask[row, columns], np.full(columns.size, row % 2 + 1))
        ):
            target[at] = source
        origin[at] = row * width + columns
    return TrainBatch(*packed, behavior_logprobs=np.zeros(packed[0].shape, np.float32)), origin


def test_packed_rows_score_as_separate_rows(batch, run):
    packed, origin = pack_pairs(batch)
    assert [len(set(row) - {0}) for row in packed.segment_ids.tolist()] == [
        2,
        1,
    ] * 16  # every fourth prompt is filler
    apart = np.append(np.asarray(run(batch, "token").teacher_logprobs).ravel(), 0)
    assert_scores(run(packed, "token").teacher_logprobs, apart[origin], packed.mask)


def test_padding_may_hold_anything(batch, run):
    tokens = np.where(np.asarray(batch.segment_ids) > 0, batch.tokens, 10**6)
    dirty, clean = (
        run(b, "token").teacher_logprobs for b in (dataclasses.replace(batch, tokens=tokens), batch)
    )
    np.testing.assert_array_equal(dirty, clean)


def test_a_padded_vocabulary_is_left_out_of_the_softmax(batch, run, models):
    """Ids from `valid_vocab` on have no mass: the head's extra rows change no score."""
    kernel = np.asarray(models.teacher.exact["embedding"])
    padded = Head(np.concatenate([kernel, 5 * kernel[:10]]), valid_vocab=len(kernel))
    plain = np.asarray(run(batch, "token").teacher_logprobs)
    assert_scores(run(batch, "token", head=padded).teacher_logprobs, plain, batch.mask)
    states = np.asarray(run(batch, "vocabulary").hidden)[np.asarray(batch.segment_ids) > 0]
    assert (
        np.mean(np.max(states @ kernel.T, -1) < np.max(states @ (5 * kernel[:10]).T, -1)) > 0.1
    )  # they would have had much


def test_only_requested_scores_are_set(batch, run):
    for needs, field in (("token", "teacher_logprobs"), ("vocabulary", "hidden")):
        scores = run(batch, needs)
        assert isinstance(scores, TeacherScores)
        assert [
            f.name for f in dataclasses.fields(scores) if getattr(scores, f.name) is not None
        ] == [field]
    for needs, top_k in (("top_k", 0), ("token", 3), ("vocabulary", 3)):
        with pytest.raises(ValueError, match=f"top_k is {top_k} where needs is '{needs}'"):
            run(batch, needs, top_k=top_k)
