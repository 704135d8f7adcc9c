"""Rows to train on: the teacher's own view holds the same completion, and packing loses, doubles
and moves nothing within a rollout.
"""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdjax.data.packing import (
    first_fit_decreasing,
    pack,
    packed_lengths,
    packing_metrics,
    to_train_batch,
    unpack,
)
from opdjax.data.prompt_rows import Prompt
from opdjax.data.prompts import PromptSet, collate
from opdjax.ops.sharding import split_rows
from opdjax.types import Rollouts


def ids_of(lengths, first):
    return tuple(tuple(range(first + 100 * i, first + 100 * i + n)) for i, n in enumerate(lengths))


def batch_of(lengths, teacher_lengths):
    teacher = None if teacher_lengths is None else ids_of(teacher_lengths, 50_000)
    prompts = PromptSet(
        tuple(Prompt(f"p{i}") for i in range(len(lengths))), ids_of(lengths, 10_000), teacher, 0, ""
    )
    return collate(prompts, np.arange(len(lengths)))


def roll_out(prompts, completions, width):
    """Rollouts with these completions, a list of token lists, as many a prompt as divide evenly."""
    repeats = len(completions) // len(prompts.tokens)
    before = np.repeat(prompts.tokens, repeats, axis=0)
    is_prompt = np.repeat(prompts.mask, repeats, axis=0)
    tokens = np.zeros((len(completions), width), np.int32)
    mask = np.zeros((len(completions), width), bool)
    for i, completion in enumerate(completions):
        tokens[i, : len(completion)], mask[i, : len(completion)] = completion, True
    logprobs = -np.arange(tokens.size + before.size, dtype=np.float32).reshape(len(completions), -1)
    rows = np.arange(len(completions))
    return Rollouts(
        tokens=np.concatenate([before, tokens], axis=1),
        mask=np.concatenate([np.zeros_like(is_prompt), mask], axis=1),
        segment_ids=np.concatenate([is_prompt, mask], axis=1).astype(np.int32),
        behavior_logprobs=logprobs,
        unfiltered_logprobs=logprobs,
        prompt_id=rows // repeats,
        sample_id=rows % repeats,
        policy_version=0 * rows,
        is_truncated=rows < 0,
    )


def test_without_a_view_of_its_own_the_rows_pass_unchanged():
    prompts = batch_of([3, 2], None)
    rollouts = roll_out(prompts, [[1, 2], [3], [4], [5, 6]], 2)
    batch = to_train_batch(rollouts, prompts)
    assert batch.teacher_view is None
    assert batch.teacher is None
    for name in ("tokens", "mask", "segment_ids", "behavior_logprobs"):
        assert getattr(batch, name) is getattr(rollouts, name)


@pytest.mark.parametrize(
    ("student", "teacher", "widths"),
    [([3], [20], (16, 32)), ([20], [3], (32, 16)), ([3], [5], (16, 16))],
)
def test_columns_by_hand(student, teacher, widths):
    prompts = batch_of(student, teacher)
    assert (prompts.tokens.shape[1], prompts.teacher_tokens.shape[1]) == widths
    view = to_train_batch(roll_out(prompts, [[7, 8, 9]], 4), prompts).teacher_view
    columns = np.asarray(view.columns)[0]
    # The last prompt column, which predicts the first sampled token, and the four columns of the
    # completion.
    np.testing.assert_array_equal(columns[widths[0] - 1 :], widths[1] - 1 + np.arange(5))
    np.testing.assert_array_equal(np.asarray(view.tokens)[0, widths[1] :], [7, 8, 9, 0])
    np.testing.assert_array_equal(np.asarray(view.segment_ids)[0, widths[1] :], [1, 1, 1, 0])
    assert columns.min() >= 0
    assert columns.max() < view.tokens.shape[1]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_every_sampled_token_is_where_its_column_points(data):
    # Few shapes, each of which is compiled: prompts of up to 16 tokens have one width.
    num_prompts, repeats, width = 3, data.draw(st.sampled_from([1, 3])), 5
    lengths = lambda most: st.lists(st.integers(1, most), min_size=3, max_size=3)
    prompts = batch_of(data.draw(lengths(16)), data.draw(lengths(40)))
    sizes = data.draw(
        st.lists(
            st.integers(1, width), min_size=num_prompts * repeats, max_size=num_prompts * repeats
        )
    )
    rollouts = roll_out(
        prompts, [list(range(10 * i + 1, 10 * i + 1 + n)) for i, n in enumerate(sizes)], width
    )
    batch = to_train_batch(rollouts, prompts)
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    seen, segments, columns = (
        np.asarray(getattr(batch.teacher_view, name))
        for name in ("tokens", "segment_ids", "columns")
    )

    rows, places = np.nonzero(mask)
    np.testing.assert_array_equal(seen[rows, columns[rows, places]], tokens[rows, places])
    assert (segments[rows, columns[rows, places]] == 1).all()
    # The state that predicts a token has read the column before it, in both views.
    np.testing.assert_array_equal(columns[rows, places - 1], columns[rows, places] - 1)
    for row in range(len(tokens)):
        expected = np.asarray(prompts.teacher_tokens[row // repeats])[
            prompts.teacher_mask[row // repeats]
        ].tolist()
        assert seen[row][segments[row] == 1].tolist() == expected + tokens[row][mask[row]].tolist()


def rows_of(lengths, **extra):
    """A batch of rollouts of these lengths, a prompt of one token included, in which every token
    has an id of its own.
    """
    prompts = batch_of([1] * len(lengths), None)
    completions = [list(range(100 * i + 1, 100 * i + n)) for i, n in enumerate(lengths)]
    return dataclasses.replace(
        to_train_batch(roll_out(prompts, completions, max(lengths)), prompts), **extra
    )


def test_first_fit_decreasing_by_hand():
    """Longest first: 5, then 4 in a row of its own, 3 beside it, 2 beside the 5."""
    packed, source = pack(rows_of([3, 5, 2, 4]), 7)
    row = lambda *spans: [token for first, n in spans for token in range(first, first + n)]
    expected = [
        row((10_100, 1), (101, 4), (10_200, 1), (201, 1)),
        row((10_300, 1), (301, 3), (10_000, 1), (1, 2)),
    ]
    np.testing.assert_array_equal(packed.tokens, [*expected, [0] * 7, [0] * 7])
    np.testing.assert_array_equal(
        packed.segment_ids, [[1] * 5 + [2] * 2, [1] * 4 + [2] * 3, [0] * 7, [0] * 7]
    )
    np.testing.assert_array_equal(
        packed.mask[:2].astype(int), [[0, 1, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1]]
    )
    assert packing_metrics(source) == {"perf/packed_rows": 2.0, "perf/packing_efficiency": 1.0}
    assert packing_metrics(pack(rows_of([3, 5, 2, 4]), 8)[1]) == {
        "perf/packed_rows": 2.0,
        "perf/packing_efficiency": 14 / 16,
    }


def test_live_rows_are_dealt_over_the_fewest_micro_batches_and_their_shards():
    """Sixteen rollouts in five rows, micro-batches of four: two hold three and two, on either half
    of a micro-batch's rows.
    """
    packed, _ = pack(rows_of([24] * 4 + [2] * 12), 24, parts=4, shards=2)
    is_live = split_rows(packed.mask, 4).any(axis=2)
    np.testing.assert_array_equal(is_live, [[1, 1, 1, 0], [1, 0, 1, 0], [0] * 4, [0] * 4])


def test_a_rollout_that_fits_no_row_is_refused():
    with pytest.raises(
        ValueError, match="a rollout with its prompt has 5 tokens; expected at most 4"
    ):
        pack(rows_of([3, 5]), 4)
    with pytest.raises(ValueError, match="3 rows do not divide into 2 micro-batches on 1 shards"):
        pack(rows_of([3, 5, 2]), 8, parts=2)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_packing_loses_nothing(data):
    """Every rollout stands once, whole and in order, with all its fields, in one row for both
    views, whose columns match.
    """
    width, (parts, shards) = 5, data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1)]))
    lengths = st.lists(st.integers(1, 20), min_size=4, max_size=4)
    prompts = batch_of(data.draw(lengths), data.draw(st.one_of(st.none(), lengths)))
    sizes = data.draw(st.lists(st.integers(1, width), min_size=8, max_size=8))
    rollouts = roll_out(
        prompts, [list(range(10 * i + 1, 10 * i + 1 + n)) for i, n in enumerate(sizes)], width
    )
    batch = to_train_batch(rollouts, prompts)
    batch = dataclasses.replace(
        batch, uniforms=np.random.default_rng(0).random((*batch.tokens.shape, 2), np.float32)
    )
    packed, source = pack(batch, data.draw(st.integers(25, 60)), parts=parts, shards=shards)

    is_live, segments = source >= 0, np.asarray(batch.segment_ids)
    np.testing.assert_array_equal(np.sort(source[is_live]), np.flatnonzero(segments))
    for name in ("tokens", "mask", "behavior_logprobs", "uniforms"):
        given_one, packed_one = np.asarray(getattr(batch, name)), getattr(packed, name)
        assert packed_one.dtype == given_one.dtype
        np.testing.assert_array_equal(
            packed_one[is_live], given_one.reshape(-1, *given_one.shape[2:])[source[is_live]]
        )
        assert not packed_one[~is_live].any()
    np.testing.assert_array_equal(packed.segment_ids > 0, is_live)
    for row in np.flatnonzero(is_live.any(axis=1)):
        held = packed.segment_ids[row]
        np.testing.assert_array_equal(np.unique(held[held > 0]), np.arange(1, held.max() + 1))
        for number in range(1, held.max() + 1):
            (places,) = np.nonzero(held == number)
            (rollout,) = np.unique(source[row, places] // segments.shape[1])
            np.testing.assert_array_equal(
                places, np.arange(places[0], places[0] + segments[rollout].sum())
            )
            if batch.teacher_view is None:
                continue
            view, seen = batch.teacher_view, packed.teacher_view
            own = np.asarray(view.tokens[rollout])[np.asarray(view.segment_ids[rollout]) > 0]
            np.testing.assert_array_equal(seen.tokens[row][seen.segment_ids[row] == number], own)
    if batch.teacher_view is not None:
        rows, columns = np.nonzero(packed.mask)
        at, seen = packed.teacher_view.columns, packed.teacher_view
        np.testing.assert_array_equal(
            seen.tokens[rows, at[rows, columns]], packed.tokens[rows, columns]
        )
        np.testing.assert_array_equal(
            seen.segment_ids[rows, at[rows, columns]], packed.segment_ids[rows, columns]
        )
        np.testing.assert_array_equal(at[rows, columns - 1], at[rows, columns] - 1)
    again, _ = pack(
        jax.tree.map(jax.numpy.asarray, batch), packed.tokens.shape[1], parts=parts, shards=shards
    )
    jax.tree.map(np.testing.assert_array_equal, again, packed)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.data())
def test_first_fit_decreasing_is_near_the_best_there_is(length, data):
    """Full rows are cut to pieces, so that the best is known: all of them full again. Any two rows
    are more than one row's tokens.
    """
    cuts = [
        data.draw(st.lists(st.integers(1, length), max_size=6, unique=True))
        for _ in range(data.draw(st.integers(1, 12)))
    ]
    pieces = [piece for cut in cuts for piece in np.diff([0, *sorted({*cut, length})])]
    lengths = np.array(data.draw(st.permutations(pieces)))
    rows = first_fit_decreasing(lengths, length)
    used = np.bincount(rows, lengths)
    assert used.max() <= length
    assert used.min() > 0
    assert 9 * len(used) <= 11 * len(cuts) + 6  # Dosa 2007
    least = np.sort(used)[:2]
    assert len(used) == 1 or least.sum() > length  # more than half of all columns are filled
    np.testing.assert_array_equal(rows, first_fit_decreasing(lengths, length))


def next_fit(lengths, length):
    """Rollouts in the order they are given, a new row where the next one does not fit."""
    rows, row, room = [], 0, length
    for each in lengths:
        row, room = (row, room - each) if each <= room else (row + 1, length - each)
        rows.append(row)
    return np.array(rows)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=24),
    st.integers(0, 30),
    st.sampled_from([(1, 1), (3, 1), (2, 2)]),
    st.booleans(),
)
def test_every_token_stands_once_and_in_order(sizes, room, cut, is_given):
    """Rollouts of any lengths, in rows that are chosen here or elsewhere, more rows than there are
    rollouts; and back again.
    """
    batch, (parts, shards), length = rows_of(sizes), cut, max(sizes) + room
    np.testing.assert_array_equal(packed_lengths(batch), sizes)
    num_rows = -(-len(sizes) // (parts * shards)) * parts * shards
    packed, source = pack(
        batch,
        length,
        parts=parts,
        shards=shards,
        rows=next_fit(sizes, length) if is_given else None,
        num_rows=num_rows,
    )
    assert packed.tokens.shape == source.shape == (num_rows, length)
    width, found = batch.tokens.shape[1], []
    for row, segments in zip(source, packed.segment_ids):
        starts = np.flatnonzero(
            np.diff(segments, prepend=0)
        )  # where a segment begins, or the padding after the last
        pieces = [piece for piece in np.split(row, starts) if piece.size and piece[0] >= 0]
        assert len(pieces) == segments.max()  # a segment in two places would count twice
        for piece in pieces:
            np.testing.assert_array_equal(piece // width, piece[0] // width)
            assert (np.diff(piece) > 0).all()
        found += [piece[0] // width for piece in pieces]
    assert sorted(found) == list(range(len(sizes)))
    np.testing.assert_array_equal(np.sort(source[source >= 0]), np.flatnonzero(batch.segment_ids))
    again = unpack(packed.tokens, source, batch.tokens.shape)
    np.testing.assert_array_equal(again, np.where(batch.segment_ids, batch.tokens, 0))
