"""Sampling: inverse CDF, filters and log-probs against dense numpy; rollouts against the decoder;
layouts against each other.
"""

import dataclasses
import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdjax.config import MINI_STUDENT, DataConfig
from opdjax.data.prompt_rows import read_prompts
from opdjax.data.prompts import collate, encode_prompts
from opdjax.data.stop_strings import find_stop_strings
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine import sampler, scheduling
from opdjax.engine.decoding import (
    EVAL_STREAM,
    TRAIN_STREAM,
    Decoding,
    draw_tokens,
    filter_mask,
    row_keys,
)
from opdjax.engine.sampler import extra_uniforms, sample
from opdjax.models import decoder, kv_cache
from opdjax.models.attention import NO_WINDOW
from opdjax.models.hf import load_params, open_checkpoint
from opdjax.ops.inverse_cdf import invert_cdf
from opdjax.ops.sharding import by_row as by_row_of
from opdjax.ops.sharding import make_mesh
from opdjax.ops.tile import VocabTile, head_logits
from opdjax.types import PromptBatch, Rollouts

ROWS, VOCAB, VALID = 32, 214, 200  # of the filter tests; ids from VALID on are padding
WIDTH, LENGTH = 16, 24  # prompt and completion columns of the rollout tests
FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.05},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
]
over_filters = pytest.mark.parametrize(
    "filters", FILTERS, ids=lambda f: "-".join(f"{name}={value}" for name, value in f.items())
)
inverted = jax.jit(invert_cdf)
kept = jax.jit(
    lambda logits, options: filter_mask(VocabTile(jnp.asarray(logits)), options), static_argnums=1
)
drawn_tokens = jax.jit(
    lambda logits, *rest: draw_tokens(VocabTile(jnp.asarray(logits)), *rest), static_argnums=3
)


def decoding(length=LENGTH, stop=(2,), **options):
    return Decoding(length, stop, **options)


# ---- Inverting the cumulative distribution


def cdf_of(weights):
    """Float64, normalised, along the last axis."""
    sums = np.cumsum(np.asarray(weights, np.float64), axis=-1)
    return sums / sums[..., -1:]


def distance_outside(cdf, token, uniform):
    """Distance of each draw `[n]` from its token's share of the float64 CDF `[n, V]`; 0 inside."""
    row = np.arange(len(token))
    low = np.where(token > 0, cdf[row, np.maximum(token - 1, 0)], 0)
    return np.maximum(np.maximum(low - uniform, uniform - cdf[row, token]), 0)


def as_uniform(x):
    """The nearest possible uniform draw: a multiple of 2^-24 in [0, 1)."""
    return (np.clip(np.round(np.asarray(x) * 2**24), 0, 2**24 - 1) * 2.0**-24).astype(np.float32)


@pytest.mark.parametrize("vocab", [7, 214, 1000, 5003])
def test_invert_cdf_equals_searchsorted(rng, vocab):
    weights = rng.exponential(size=(1200, vocab)).astype(np.float32) ** 3 * (
        rng.random((1200, vocab)) < 0.8
    )
    uniform = as_uniform(rng.random(1200))
    cdf = cdf_of(weights)
    near = np.arange(900, 1200)  # these are at a boundary
    uniform[near] = as_uniform(cdf[near, rng.integers(0, vocab, near.size)])
    expected = np.array([np.searchsorted(c, u, side="right") for c, u in zip(cdf, uniform)])
    token = np.asarray(inverted(weights, uniform))
    margin = np.min(np.abs(cdf - uniform[:, None]), axis=1)
    print(
        f"V = {vocab}: {np.sum(token != expected)} differ of {np.sum(margin < 1e-6)} near a "
        f"boundary and {np.sum(margin >= 1e-6)} others"
    )
    assert np.sum(margin[:900] >= 1e-6) > 800
    np.testing.assert_array_equal(token[margin >= 1e-6], expected[margin >= 1e-6])
    assert distance_outside(cdf, token, uniform).max() < 1e-6


EDGES = np.array([0, 2.0**-24, 0.5, 1 - 2.0**-23, 1 - 2.0**-24], np.float32)


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 214, 1000, 5003])
def test_edges_of_the_unit_interval_draw_live_tokens(rng, vocab):
    """Zero weights at the front, at the end and in whole blocks; the ends of the interval give the
    first and the last live token.
    """
    rows = []
    for first, last in [
        (0, vocab),
        (vocab // 3, vocab),
        (0, vocab - vocab // 3),
        (vocab // 2, vocab // 2 + 1),
    ]:
        row = rng.exponential(size=vocab) * (rng.random(vocab) < 0.5)
        row[:first] = row[last:] = 0
        # A last token with less than 2^-24 of the mass would not be reached.
        row[first], row[last - 1] = 1, 2
        rows.append(row.astype(np.float32))
    weights, uniform = np.repeat(rows, len(EDGES), axis=0), np.tile(EDGES, len(rows))
    token = np.asarray(inverted(weights, uniform)).reshape(len(rows), len(EDGES))
    for row, drawn in zip(np.asarray(rows), token):
        live = np.flatnonzero(row)
        assert np.isin(drawn, live).all()
        assert (drawn[0], drawn[-1]) == (live[0], live[-1])
        assert (np.diff(drawn) >= 0).all()


@pytest.mark.parametrize("vocab", [9, 1000])
def test_a_single_live_token_is_always_drawn(vocab):
    weights = np.repeat(np.eye(vocab, dtype=np.float32) * 1e-30, len(EDGES), axis=0)
    token = np.asarray(inverted(weights, np.tile(EDGES, vocab)))
    np.testing.assert_array_equal(token, np.repeat(np.arange(vocab), len(EDGES)))


@pytest.mark.parametrize("vocab", [64, 214, 1000])
def test_draws_aimed_at_boundaries_miss_zero_weights(rng, vocab):
    weights = (rng.exponential(size=(6, vocab)) * (rng.random((6, vocab)) < 0.5)).astype(np.float32)
    aims = as_uniform(cdf_of(weights)[:, :, None] + np.arange(-3, 4) * 2.0**-24)[
        :, :: max(vocab // 100, 1)
    ]
    rows = np.repeat(weights, aims[0].size, axis=0)
    token = np.asarray(inverted(rows, aims.reshape(-1)))
    assert (rows[np.arange(len(token)), token] > 0).all()


def test_a_running_sum_that_rises_at_zero_weights_draws_none_of_them(rng):
    """With a real vocabulary, the running sum over blocks is computed as a tree, whose rounding
    raises it where 0 is added.
    """
    vocab, block, blocks = 151_936, 512, 297
    totals = (rng.exponential(size=(3000, blocks)) * (rng.random((3000, blocks)) < 0.5)).astype(
        np.float32
    )
    sums = np.asarray(jax.jit(partial(jnp.cumsum, axis=-1))(totals))
    rises = np.where(totals[:, 1:] == 0, np.diff(sums), 0)
    row, column = np.unravel_index(np.argsort(-rises, axis=None)[:8], rises.shape)
    print(f"{np.sum(rises > 0)} rises; largest {rises.max():.2e}")
    weights = np.zeros((8, vocab), np.float32)
    weights[:, ::block] = totals[row]
    aims = as_uniform(
        (sums[row, column].astype(np.float64) / sums[row, -1])[:, None]
        + np.arange(-2, 3) * 2.0**-24
    )
    for uniform in aims.T:
        token = np.asarray(inverted(weights, uniform))
        assert (weights[np.arange(8), token] > 0).all()


def chi_square(counts, probs):
    """Excess over its mean, in standard deviations; cells with fewer than 5 expected are joined."""
    expected = probs * counts.sum()
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    live = expected > 0
    statistic, freedom = np.sum((counts - expected)[live] ** 2 / expected[live]), live.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("filters", [{}, {"top_k": 12, "top_p": 0.9}], ids=["plain", "filtered"])
def test_frequencies_match_the_softmax(rng, filters):
    """100 prompts x 20 samples x 20 positions; also each half of the keys, and early and late
    positions, separately.
    """
    logits = (2 * rng.normal(size=40)).astype(np.float32)
    prompt, number = np.repeat(np.arange(100), 20), np.tile(np.arange(20), 100)
    keys = row_keys(5, TRAIN_STREAM, prompt, number, 3)
    options = decoding(temperature=1.3, **filters)
    draw = jax.jit(
        jax.vmap(
            lambda position: draw_tokens(
                VocabTile(jnp.tile(logits, (len(prompt), 1))), keys, position, options
            )[0]
        )
    )
    token = np.asarray(draw(jnp.arange(20)))
    probs = np.exp(logits.astype(np.float64) / 1.3)
    probs *= reference_keep(logits[None] / 1.3, **filters)[0]
    probs /= probs.sum()
    count = lambda part: np.bincount(part.ravel(), minlength=40)
    assert count(token)[probs == 0].sum() == 0
    for part in (token, token[:, :1000], token[:, 1000:], token[:10], token[10:]):
        assert abs(chi_square(count(part), probs)) < 5
    assert (
        chi_square(count(token), probs**0.9 / np.sum(probs**0.9)) > 5
    )  # a slightly higher temperature is detected


# ---- Filters


def reference_keep(logits, top_k=0, top_p=1.0, min_p=0.0, slack=0.0):
    """The tokens that a sort keeps, in float64; a positive slack keeps more, a negative fewer."""
    logits = np.asarray(logits, np.float64)
    keep = np.isfinite(logits)
    if top_k:
        threshold = -np.sort(-logits, axis=-1)[:, [min(top_k, logits.shape[-1]) - 1]]
        keep &= logits >= threshold
    weights = np.where(keep, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    probs = weights / weights.sum(-1, keepdims=True)
    if top_p + slack < 1:
        order = np.argsort(-np.where(keep, logits, -np.inf), axis=-1)
        mass = np.cumsum(np.take_along_axis(probs, order, -1), axis=-1)
        smallest = np.minimum(
            np.sum(mass < top_p + slack, axis=-1, keepdims=True), logits.shape[-1] - 1
        )
        keep &= logits >= np.take_along_axis(logits, np.take_along_axis(order, smallest, -1), -1)
    if min_p:
        keep &= probs >= (min_p - slack) * probs.max(-1, keepdims=True)
    return keep


def some_logits(seed=0, step=0.0, scale=2.0):
    """Logits `[ROWS, VOCAB]`, padded from VALID on; a positive step rounds them to a grid, so that
    many are equal.
    """
    logits = np.random.default_rng(seed).normal(size=(ROWS, VOCAB)) * scale
    logits = (
        np.round(logits / step) * step + 0.25 if step else logits
    )  # + 0.25: no zeros of two signs
    logits[:, VALID:] = -np.inf
    return logits.astype(np.float32)


@over_filters
def test_filter_equals_a_sort(filters):
    for logits in (some_logits(), some_logits(1, scale=0.2), some_logits(2, step=0.5)):
        mask = np.asarray(kept(logits, decoding(**filters)))
        np.testing.assert_array_equal(mask, reference_keep(logits, **filters))
        assert not mask[:, VALID:].any()
        assert mask[np.arange(ROWS), logits.argmax(-1)].all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    filters=st.sampled_from(FILTERS),
    seed=st.integers(0, 2**32 - 1),
    step=st.sampled_from([0.0, 0.125, 1.0]),
    scale=st.floats(0.01, 20),
    valid=st.integers(1, VALID),
)
def test_filter_keeps_the_smallest_set_that_is_enough(filters, seed, step, scale, valid):
    logits = some_logits(seed, step, scale)
    logits[:, valid:] = -np.inf
    mask = np.asarray(kept(logits, decoding(**filters)))
    fewest, most = (reference_keep(logits, **filters, slack=slack) for slack in (-1e-5, 1e-5))
    assert (fewest <= mask).all()
    assert (mask <= most).all()
    assert not mask[:, valid:].any()
    live = np.where(mask, logits, np.inf).min(-1, keepdims=True)
    np.testing.assert_array_equal(
        mask, logits >= live
    )  # ties are kept, and nothing below a kept token


def test_filters_by_hand():
    logits = np.log(
        np.array([[0.4, 0.2, 0.2, 0.15, 0.05], [0.05, 0.1, 0.5, 0.1, 0.25]], np.float32)
    )
    expected = {
        (("top_k", 1),): ["#....", "..#.."],
        (("top_k", 2),): ["###..", "..#.#"],  # tied at the threshold: both stay
        (("top_p", 0.4),): ["#....", "..#.."],  # 0.4 is enough
        (("top_p", 0.41),): ["###..", "..#.."],
        (("top_p", 0.76),): ["###..", ".####"],
        (("min_p", 0.3),): ["####.", "..#.#"],
        (("top_k", 3), ("top_p", 0.7)): [
            "###..",
            "..#.#",
        ],  # of 0.8: 0.5, 0.75, 1; of 0.95: 0.53, 0.79
        (("top_k", 4), ("top_p", 0.99), ("min_p", 0.4)): ["###..", "..#.#"],
    }
    for filters, rows in expected.items():
        mask = np.asarray(kept(logits, decoding(**dict(filters))))
        assert ["".join(".#"[int(live)] for live in row) for row in mask] == rows, filters


def test_top_k_of_the_vocabulary_or_more_is_no_filter():
    logits = some_logits(3)
    for top_k in (VALID, VOCAB, VOCAB + 1, 10**6):
        np.testing.assert_array_equal(kept(logits, decoding(top_k=top_k)), np.isfinite(logits))


def test_filters_equal_transformers():
    import torch
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    for seed, filters in enumerate(FILTERS):
        logits = some_logits(10 + seed)
        scores = torch.from_numpy(logits)
        for name, value in filters.items():
            scores = warpers[name](value)(None, scores)
        theirs = np.isfinite(scores.numpy())
        np.testing.assert_array_equal(
            kept(logits, decoding(**filters)), theirs, err_msg=str(filters)
        )


def primitives(jaxpr):
    """Names of all primitives of a jaxpr and of its inner jaxprs."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    inner = [
        leaf
        for equation in jaxpr.eqns
        for leaf in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)),
        )
    ]
    jaxprs = [getattr(leaf, "jaxpr", leaf) for leaf in inner]
    return names.union(*(primitives(leaf) for leaf in jaxprs if hasattr(leaf, "eqns")))


def sorts(function, *args):
    """Sort primitives in the jaxpr, and sort instructions in the compiled program."""
    traced = jax.jit(function).trace(*args)
    named = {"sort", "top_k", "approx_top_k"} & primitives(traced.jaxpr.jaxpr)
    return named | set(
        re.findall(r"\b(?:sort|topk|top-k|TopK|ApproxTopK)\b", traced.lower().compile().as_text())
    )


@pytest.mark.parametrize("filters", [{}, FILTERS[-1]], ids=["plain", "filtered"])
def test_nothing_is_sorted(filters):
    logits, keys = jnp.zeros((4, 1000)), row_keys(0, 0, jnp.arange(4), jnp.zeros(4, int), 0)
    assert sorts(lambda x: jnp.sort(x, -1), logits) == {"sort"}
    assert "top_k" in sorts(lambda x: jax.lax.top_k(x, 5), logits)
    drawn = lambda logits, keys: draw_tokens(VocabTile(logits), keys, 3, decoding(**filters))
    assert sorts(drawn, logits, keys) == set()


# ---- Log-probs of a draw


@pytest.fixture
def keys():
    return row_keys(1, TRAIN_STREAM, np.arange(ROWS), np.zeros(ROWS, int), 0)


def dense_logprobs(logits, keep=None):
    """Log-softmax in float64 over the kept tokens, -inf elsewhere."""
    logits = (
        np.asarray(logits, np.float64)
        if keep is None
        else np.where(keep, np.asarray(logits, np.float64), -np.inf)
    )
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.sum(np.exp(logits - top), axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("temperature", "filters"), [(1.0, {}), (0.7, {}), (0.7, FILTERS[-2]), (1.5, FILTERS[-1])]
)
def test_behavior_is_the_distribution_that_was_sampled(keys, temperature, filters):
    logits, row = some_logits(4), np.arange(ROWS)
    token, behavior, unfiltered = map(
        np.asarray, drawn_tokens(logits, keys, 2, decoding(temperature=temperature, **filters))
    )
    tempered = logits.astype(np.float64) / temperature
    keep = reference_keep(tempered, **filters)
    assert keep[row, token].all()
    np.testing.assert_allclose(unfiltered, dense_logprobs(tempered)[row, token], atol=1e-5)
    np.testing.assert_allclose(behavior, dense_logprobs(tempered, keep)[row, token], atol=1e-5)
    if filters:
        assert (behavior > unfiltered + 1e-3).all()
    else:
        np.testing.assert_array_equal(behavior, unfiltered)


def test_greedy_takes_the_first_maximum_and_draws_nothing(keys):
    logits = some_logits(5, step=1.0)
    token, behavior, unfiltered = map(
        np.asarray, drawn_tokens(logits, keys, 0, decoding(temperature=0.0))
    )
    np.testing.assert_array_equal(token, logits.argmax(-1))
    np.testing.assert_array_equal(behavior, 0)
    np.testing.assert_allclose(unfiltered, dense_logprobs(logits).max(-1), atol=1e-5)


def test_a_draw_depends_only_on_its_key_and_position(keys):
    """Other rows, the row's place and the batch size do not matter."""
    logits, options = some_logits(6), decoding()
    token = np.asarray(drawn_tokens(logits, keys, 4, options)[0])
    order = np.random.default_rng(0).permutation(ROWS)
    np.testing.assert_array_equal(
        drawn_tokens(logits[order], keys[order], 4, options)[0], token[order]
    )
    np.testing.assert_array_equal(drawn_tokens(logits[5:6], keys[5:6], 4, options)[0], token[5:6])
    assert np.mean(np.asarray(drawn_tokens(logits, keys, 5, options)[0]) != token) > 0.5
    assert np.mean(np.asarray(drawn_tokens(logits, keys[order], 4, options)[0]) != token) > 0.5


# ---- Rollouts of the mini pair's student


@pytest.fixture(scope="module")
def student():
    """Parameters, config, stop ids, 64 encoded prompts of 14 tokens, and `dense`, the float64
    decoder on whole rows.
    """
    checkpoint = open_checkpoint(MINI_STUDENT)
    params = load_params(checkpoint, "float32")
    tokenizer = load_tokenizer(checkpoint.path)
    rows = read_prompts("arithmetic:test")[:64]
    prompts, bare = (
        encode_prompts(rows, DataConfig(format=form), tokenizer, tokenizer)
        for form in ("chat", "raw")
    )
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)

    @jax.jit
    def logits_of(params, tokens, segments):
        return head_logits(
            decoder.head_of(params), decoder.forward(params, checkpoint.config, tokens, segments)
        )

    def dense(rollouts):
        """Float64 logits `[B, LENGTH, V]` of each completion column, from a full forward."""
        tokens, segments = (
            np.asarray(x)[:, -WIDTH - LENGTH :] for x in (rollouts.tokens, rollouts.segment_ids)
        )
        padding = ((0, 64 - len(tokens)), (0, 0))
        with jax.enable_x64(True):
            logits = np.asarray(
                logits_of(exact, np.pad(tokens, padding), np.pad(segments, padding))
            )
        return logits[: len(tokens), WIDTH - 1 : -1]

    return types.SimpleNamespace(
        params=params,
        config=checkpoint.config,
        stop=checkpoint.stop_token_ids,
        prompts=prompts,
        bare=bare,
        dense=dense,
    )


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Drop the sampler's programs after this file: no other file has these shapes."""
    yield
    for function in (sampler.prefill, sampler.advance, sampler._collect, sampler.start):
        function.clear_cache()


@pytest.fixture(scope="module")
def generate(student):
    """generate(prompts, seed, policy_version, **options of sample and Decoding) -> Rollouts in
    numpy.
    """

    def generate(
        prompts, seed=0, policy_version=0, num_generations=1, mesh=None, slots=None, **options
    ):
        names = {name: options.pop(name) for name in ("stream", "first_sample") if name in options}
        rollouts = sample(
            student.params,
            prompts,
            seed,
            policy_version,
            config=student.config,
            decoding=decoding(**{"stop": student.stop, **options}),
            num_generations=num_generations,
            mesh=mesh,
            slots=slots,
            **names,
        )
        return jax.tree.map(np.asarray, rollouts)

    return generate


@pytest.fixture(scope="module")
def mixed(student):
    """Eight prompts of 14, 6 and 1 tokens; prompts 3 and 7 are filler."""
    rows = [
        student.prompts.student_ids[0],
        student.bare.student_ids[1],
        student.bare.student_ids[2][:1],
        (),
        student.prompts.student_ids[4],
        student.bare.student_ids[2][:1],
        student.bare.student_ids[6],
        (),
    ]
    tokens, mask = np.zeros((8, WIDTH), np.int32), np.zeros((8, WIDTH), bool)
    for i, row in enumerate(rows):
        tokens[i, WIDTH - len(row) :], mask[i, WIDTH - len(row) :] = row, True
    return PromptBatch(tokens, mask, np.array([10, 11, 12, 0, 14, 15, 16, 0], np.int32))


@pytest.fixture(scope="module")
def rollouts(generate, mixed):
    """The 64 rows that most tests use."""
    return generate(mixed, num_generations=8, temperature=1.5)


ROUNDING = 3e-5  # of float32 log-probs, at most; a tenth of it on average
FILLER = np.repeat(np.arange(8) % 4 == 3, 8)
WARM = {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "valid_vocab": 70}


def assert_logprobs(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=ROUNDING, rtol=0)
    assert np.mean(np.abs(actual - expected)) < ROUNDING / 10


def completion(rollouts):
    """Completion columns of (tokens, mask)."""
    return rollouts.tokens[:, -LENGTH:], rollouts.mask[:, -LENGTH:]


def test_rows_of_a_prompt_are_adjacent(rollouts, mixed):
    np.testing.assert_array_equal(rollouts.prompt_id, np.repeat(mixed.prompt_id, 8))
    np.testing.assert_array_equal(rollouts.sample_id, np.tile(np.arange(8), 8))
    np.testing.assert_array_equal(rollouts.policy_version, 0)
    np.testing.assert_array_equal(rollouts.tokens[:, :WIDTH], np.repeat(mixed.tokens, 8, axis=0))
    np.testing.assert_array_equal(rollouts.segment_ids[:, :WIDTH], np.repeat(mixed.mask, 8, axis=0))
    assert not rollouts.mask[:, :WIDTH].any()


def test_a_stop_token_ends_its_row(rollouts):
    tokens, mask = completion(rollouts)
    lengths = mask.sum(1)
    np.testing.assert_array_equal(
        mask, np.arange(LENGTH) < lengths[:, None]
    )  # one run from the first column
    np.testing.assert_array_equal(rollouts.segment_ids[:, WIDTH:], mask)
    is_stop = mask & (tokens == 2)
    is_last = np.arange(LENGTH) == lengths[:, None] - 1
    assert not (is_stop & ~is_last).any()
    ends = (is_stop & is_last).any(1)
    np.testing.assert_array_equal(rollouts.is_truncated, ~ends & ~FILLER)
    assert (lengths[rollouts.is_truncated] == LENGTH).all()
    for column in (
        rollouts.tokens[:, WIDTH:],
        rollouts.behavior_logprobs[:, WIDTH:],
        rollouts.unfiltered_logprobs[:, WIDTH:],
    ):
        assert not column[~mask].any()
    assert len(np.unique(lengths[ends])) > 3
    assert ends.sum() > 10
    assert rollouts.is_truncated.sum() > 2


def test_a_stop_token_in_the_last_column_is_no_truncation(generate, mixed):
    seeds = (59, *range(100))  # of 0 to 59, 59 alone has such a row here
    tries = (generate(mixed, seed=seed, num_generations=8, temperature=1.5) for seed in seeds)
    drawn = next(drawn for drawn in tries if (drawn.tokens[:, -1] == 2).any())
    stopped = drawn.tokens[:, -1] == 2
    assert drawn.mask[stopped].sum(1).tolist() == [LENGTH] * stopped.sum()
    assert not drawn.is_truncated[stopped].any()
    np.testing.assert_array_equal(drawn.is_truncated[~stopped], drawn.mask[~stopped, -1])


@pytest.mark.parametrize("slots", [pytest.param(None, marks=pytest.mark.long), 8])
def test_a_stop_string_ends_its_row_and_changes_no_draw_before(generate, mixed, rollouts, slots):
    tokenizer = load_tokenizer(open_checkpoint(MINI_STUDENT).path)
    texts = ("=1", ";2", "3+", "-1", "5", "<think>")
    strings = find_stop_strings(texts, tokenizer, len(tokenizer.get_vocab()))
    found = generate(mixed, num_generations=8, temperature=1.5, slots=slots, stop_strings=strings)
    tokens, mask = completion(rollouts)
    is_met = strings.is_met(tokens) & mask
    is_kept = mask & (np.cumsum(is_met, axis=1) - is_met == 0)
    np.testing.assert_array_equal(completion(found)[1], is_kept)
    np.testing.assert_array_equal(completion(found)[0], np.where(is_kept, tokens, 0))
    np.testing.assert_array_equal(found.is_truncated, rollouts.is_truncated & ~is_met.any(axis=1))
    for row, keep in zip(*completion(found)):
        text = tokenizer.decode(row[keep][:-1])
        assert not any(each in text for each in texts)
    assert 15 < is_met.any(axis=1).sum() < 48
    size = int(is_met[is_met.any(axis=1)].argmax(axis=1)[0]) + 1  # where a row ends
    cut = generate(mixed, num_generations=8, temperature=1.5, stop_strings=strings, length=size)
    ended = cut.mask[:, -1] & strings.is_met(cut.tokens[:, -size:])[:, -1]
    assert ended.any()
    assert not cut.is_truncated[ended].any()


def test_filler_rows_are_empty(rollouts):
    assert not rollouts.mask[FILLER].any()
    assert not rollouts.segment_ids[FILLER].any()
    assert not rollouts.is_truncated[FILLER].any()
    assert rollouts.mask[~FILLER, WIDTH].all()


def test_logprobs_equal_a_full_forward(rollouts, student):
    tokens, mask = completion(rollouts)
    expected = np.take_along_axis(
        dense_logprobs(student.dense(rollouts) / 1.5), tokens[:, :, None], -1
    )[:, :, 0]
    assert_logprobs(rollouts.unfiltered_logprobs[:, WIDTH:][mask], expected[mask])
    np.testing.assert_array_equal(rollouts.behavior_logprobs, rollouts.unfiltered_logprobs)
    assert expected[mask].mean() < -0.2


def test_filtered_logprobs_equal_a_full_forward(generate, mixed, student):
    rollouts = generate(mixed, num_generations=8, **WARM)
    tokens, mask = completion(rollouts)
    logits = student.dense(rollouts) / 1.5
    assert (
        np.exp(dense_logprobs(logits))[mask][:, 70:].sum(-1).mean() > 0.01
    )  # the padding ids would have been sampled
    logits[:, :, 70:] = -np.inf
    keep = reference_keep(logits.reshape(-1, VOCAB), top_k=30, top_p=0.9, min_p=0.02).reshape(
        logits.shape
    )
    at = lambda table: np.take_along_axis(table, tokens[:, :, None], -1)[:, :, 0][mask]
    assert at(keep).all()
    behavior = rollouts.behavior_logprobs[:, WIDTH:][mask]
    unfiltered = rollouts.unfiltered_logprobs[:, WIDTH:][mask]
    assert_logprobs(unfiltered, at(dense_logprobs(logits)))
    assert_logprobs(behavior, at(dense_logprobs(logits, keep)))
    assert np.mean(behavior > unfiltered + 1e-3) > 0.5


@pytest.fixture
def steps(monkeypatch):
    """Decoding steps of each call of `advance`, from the returned clock."""
    clocks, run = [0], sampler.advance

    def counted(*args, **options):
        state, status = run(*args, **options)
        clocks.append(int(state.clock))
        return state, status

    monkeypatch.setattr(sampler, "advance", counted)
    return lambda: np.diff(clocks).tolist()


def test_the_loop_ends_with_its_last_row(steps, generate, mixed, rollouts):
    """More stop tokens shorten the same rows; a longer limit changes nothing and costs no step."""
    tokens, mask = completion(rollouts)
    frequency = np.bincount(tokens[mask], minlength=VOCAB)
    rarest = [
        min(row[: LENGTH - 4].tolist(), key=lambda token: frequency[token])
        for row in tokens[rollouts.is_truncated]
    ]
    stops = tuple({2, *rarest})
    lengths = np.where(FILLER, 0, np.argmax(np.isin(tokens, stops), axis=1) + 1)
    assert len(np.unique(lengths)) > 6

    longer = generate(mixed, num_generations=8, temperature=1.5, length=LENGTH + 8, stop=stops)
    early = jax.tree.map(lambda x: x[..., : WIDTH + LENGTH], longer)
    assert sum(steps()) == lengths.max() < LENGTH
    kept_columns = np.arange(LENGTH) < lengths[:, None]
    np.testing.assert_array_equal(early.mask[:, WIDTH:], kept_columns)
    np.testing.assert_array_equal(early.tokens[:, WIDTH:], np.where(kept_columns, tokens, 0))
    assert_logprobs(
        early.behavior_logprobs[:, WIDTH:],
        np.where(kept_columns, rollouts.behavior_logprobs[:, WIDTH:], 0),
    )
    assert not early.is_truncated.any()


def test_greedy_is_the_argmax_of_full_forwards(generate, student, mixed):
    """By induction: each token is the argmax of a full forward over the tokens before it, which
    hides from a column all that follows it.
    """
    greedy = generate(mixed, num_generations=2, temperature=0.0)
    np.testing.assert_array_equal(greedy.tokens[:, :WIDTH], np.repeat(mixed.tokens, 2, 0))
    np.testing.assert_array_equal(greedy.segment_ids[:, :WIDTH], np.repeat(mixed.mask, 2, 0))
    logits, (tokens, mask) = student.dense(greedy), completion(greedy)
    is_stop = mask & (tokens == 2)
    # A row goes on until its first stop token; filler has none.
    expected = (np.cumsum(is_stop, axis=1) - is_stop == 0) & greedy.segment_ids[:, :WIDTH].any(
        1, keepdims=True
    )
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(greedy.segment_ids[:, WIDTH:], mask)
    np.testing.assert_array_equal(tokens, np.where(mask, logits.argmax(-1), 0))
    logprobs = np.where(mask, dense_logprobs(logits).max(-1), 0)
    assert_logprobs(greedy.unfiltered_logprobs[:, WIDTH:], logprobs)
    assert not greedy.unfiltered_logprobs[:, :WIDTH].any()
    assert not greedy.behavior_logprobs.any()
    np.testing.assert_array_equal(greedy.tokens[::2], greedy.tokens[1::2])


def test_later_samples_can_be_drawn_separately(generate, mixed, rollouts):
    later = generate(
        mixed, num_generations=8, first_sample=4, temperature=1.5
    )  # samples 4 to 11 of each prompt
    np.testing.assert_array_equal(later.sample_id, np.tile(np.arange(4, 12), 8))
    shared, of_all = later.sample_id < 8, rollouts.sample_id >= 4
    for field in ("tokens", "mask", "segment_ids", "prompt_id", "sample_id", "is_truncated"):
        np.testing.assert_array_equal(
            getattr(later, field)[shared], getattr(rollouts, field)[of_all]
        )
    assert_logprobs(later.behavior_logprobs[shared], rollouts.behavior_logprobs[of_all])
    assert (later.tokens[~shared] != rollouts.tokens[~of_all]).any(1)[~FILLER[::2]].mean() > 0.7


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"policy_version": 1}, {"stream": EVAL_STREAM}],
    ids=lambda c: next(iter(c)),
)
def test_every_id_of_a_draw_changes_it(generate, mixed, rollouts, change):
    other = generate(mixed, num_generations=8, temperature=1.5, **change)
    np.testing.assert_array_equal(other.policy_version, change.get("policy_version", 0))
    assert (other.tokens != rollouts.tokens).any(1)[~FILLER].mean() > 0.7
    again = generate(mixed, num_generations=8, temperature=1.5)
    jax.tree.map(np.testing.assert_array_equal, again, rollouts)


def test_sample_and_prompt_ids_change_draws(rollouts):
    """Prompts 12 and 15 have the same tokens."""
    tokens = rollouts.tokens.reshape(8, 8, -1)
    np.testing.assert_array_equal(tokens[2, :, :WIDTH], tokens[5, :, :WIDTH])
    assert len(np.unique(np.concatenate([tokens[2], tokens[5]]), axis=0)) >= 14


# ---- Layouts: batch size, padding and mesh


@jax.jit
def named_uniforms(prompt_id):
    """The uniforms `[B, LENGTH]` that draw_tokens draws for sample 0 of these prompts, seed 7,
    version 3.
    """
    keys = row_keys(7, TRAIN_STREAM, prompt_id, jnp.zeros_like(prompt_id), 3)
    return jax.vmap(
        lambda key: jax.vmap(lambda at: jax.random.uniform(jax.random.fold_in(key, at)))(
            jnp.arange(LENGTH)
        )
    )(keys)


def mesh_of(count):
    return make_mesh(count)


@pytest.fixture(scope="module")
def uniforms():
    return np.asarray(named_uniforms(np.arange(64)))


def test_uniforms_are_bit_equal_in_every_layout(uniforms):
    ids = np.arange(64)
    assert len(np.unique(uniforms)) > 0.999 * uniforms.size
    for size in (1, 7):
        parts = [named_uniforms(ids[start : start + size]) for start in range(0, 63, size)]
        np.testing.assert_array_equal(np.concatenate(parts), uniforms[:63])
    np.testing.assert_array_equal(named_uniforms(ids[::-1].copy()), uniforms[::-1])
    for count in (2, 8):
        by_row = by_row_of(mesh_of(count))
        sharded = named_uniforms(jax.device_put(ids, by_row))
        assert len(sharded.sharding.device_set) == count
        np.testing.assert_array_equal(sharded, uniforms)


def rows_of(prompt_id, sample_id, starts, lengths, width=12, version=3):
    """Rollouts with the places of their completions only; the prompt takes two columns."""
    column = np.arange(width)
    start = np.asarray(starts)[:, None]
    length = np.asarray(lengths)[:, None]
    mask = (column >= start + 2) & (column < start + 2 + length)
    segments = ((column >= start) & (column < start + 2 + length)).astype(np.int32)
    prompt_id, sample_id = np.asarray(prompt_id, np.int32), np.asarray(sample_id, np.int32)
    blank = np.zeros(mask.shape, np.float32)
    return Rollouts(
        np.zeros(mask.shape, np.int32),
        mask,
        segments,
        blank,
        blank,
        prompt_id,
        sample_id,
        np.full(len(mask), version, np.int32),
        np.zeros(len(mask), bool),
    )


def test_extra_uniforms_are_bit_equal_in_every_layout():
    """Order of rows, padding on the left, width and other rows change nothing."""
    prompt, sample, lengths = np.arange(6) // 2, np.arange(6) % 2, np.array([3, 5, 1, 6, 4, 2])
    plain = rows_of(prompt, sample, np.zeros(6, int), lengths)
    expected = np.asarray(extra_uniforms(plain, 7, 4))
    tokens = [x[m] for x, m in zip(expected, plain.mask)]
    assert expected.shape == (6, 12, 4)
    order = np.array([4, 0, 5, 3, 1, 2])
    for rows, starts, width in (
        (order, np.zeros(6, int), 12),
        (order, np.array([4, 0, 1, 3, 2, 0]), 12),
        (order[:2], np.array([5, 9]), 20),
    ):
        moved = rows_of(prompt[rows], sample[rows], starts, lengths[rows], width)
        found = np.asarray(extra_uniforms(moved, 7, 4))
        for row, x, m in zip(rows, found, moved.mask):
            np.testing.assert_array_equal(x[m], tokens[row])
    by_row = by_row_of(mesh_of(2))
    np.testing.assert_array_equal(extra_uniforms(jax.device_put(plain, by_row), 7, 4), expected)
    # Fewer draws are another function of the same ids; every token and draw has its own number.
    drawn = np.concatenate(tokens)
    assert len(np.unique(drawn)) > 0.99 * drawn.size


def test_every_id_of_an_extra_draw_changes_it():
    def drawn(prompt=0, sample=0, version=3, seed=7):
        rollouts = rows_of([prompt], [sample], [0], [10], version=version)
        return np.asarray(extra_uniforms(rollouts, seed, 3))[rollouts.mask]

    found = [drawn(), drawn(prompt=1), drawn(sample=1), drawn(version=4), drawn(seed=8)]
    assert len(np.unique(np.stack(found), axis=None)) > 0.99 * 5 * 30
    assert all(x.min() >= 0 and x.max() < 1 for x in found)


def test_extra_draws_do_not_repeat_the_draws_of_the_rollout(uniforms):
    """Their ids differ only by the stream: with a shared stream, the first extra token would often
    be the sampled token.
    """
    rollouts = rows_of(
        np.arange(64), np.zeros(64), np.zeros(64, int), np.full(64, LENGTH), LENGTH + 2
    )
    for count in (1, 3):
        found = np.asarray(extra_uniforms(rollouts, 7, count))[:, 2:]
        assert found.shape == (64, LENGTH, count)
        assert len(np.intersect1d(found, uniforms)) < 0.001 * found.size
        assert abs(np.corrcoef(found[..., 0].ravel(), uniforms.ravel())[0, 1]) < 4 / np.sqrt(
            uniforms.size
        )
        assert abs(found.mean() - 0.5) < 4 / np.sqrt(12 * found.size)


@pytest.fixture(scope="module")
def draw_in_layout(generate, student):
    """draw_in_layout(rows at once, prompt columns, devices) -> tokens, mask and log-probs `[n,
    LENGTH]` of the first n prompts.
    """

    def draw(at_once=64, width=WIDTH, devices=0, num_rows=64, slots=None):
        parts = []
        for start in range(0, num_rows, at_once):
            batch = collate(
                student.prompts, np.arange(start, min(start + at_once, num_rows)), num_rows=at_once
            )
            pad = partial(np.pad, pad_width=((0, 0), (width - batch.tokens.shape[1], 0)))
            batch = dataclasses.replace(batch, tokens=pad(batch.tokens), mask=pad(batch.mask))
            part = generate(
                batch,
                seed=7,
                policy_version=3,
                mesh=mesh_of(devices) if devices else None,
                slots=slots,
            )
            assert part.tokens.shape == (at_once, width + LENGTH)
            parts.append(part)
        return jax.tree.map(lambda *x: np.concatenate(x)[:num_rows], *parts)

    return draw


@pytest.fixture(scope="module")
def at_once(draw_in_layout, student):
    """All 64 rows in one batch, and the float64 CDF `[64, LENGTH, V]` of each token."""
    drawn = draw_in_layout()
    return drawn, cdf_of(np.exp(dense_logprobs(student.dense(drawn))))


def test_every_tokens_share_contains_its_uniform(at_once, uniforms):
    """The whole path against float64: row keys, positions, prefill, cache and inverse CDF."""
    drawn, cdf = at_once
    tokens, mask = completion(drawn)
    outside = distance_outside(cdf[mask], tokens[mask], uniforms[mask])
    print(
        f"{mask.sum()} tokens, {np.sum(outside > 0)} drawn across a boundary, by at most "
        f"{outside.max():.1e}"
    )
    assert outside.max() < 1e-5
    assert np.mean(tokens[mask] != np.diff(cdf[mask], prepend=0).argmax(-1)) > 0.03
    shifted = distance_outside(cdf[mask], tokens[mask], np.roll(uniforms, 1, axis=1)[mask])
    assert np.mean(shifted > 1e-3) > 0.02


LAYOUTS = {
    "batches of 1": {"at_once": 1, "num_rows": 8},
    "batches of 7": {"at_once": 7},
    "width 32": {"width": 32},
    "width 48": {"width": 48},
    "1 device": {"devices": 1},
    "2 devices": {"devices": 2},
    "8 devices": {"devices": 8},
    "1 slot": {"slots": 1, "at_once": 8, "num_rows": 8},
    "3 slots": {"slots": 3},
    "16 slots on 8 devices": {"slots": 16, "devices": 8},
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(n, marks=[] if n in ("3 slots", "16 slots on 8 devices") else pytest.mark.long)
        for n in LAYOUTS
    ],
)
def test_tokens_do_not_depend_on_the_layout(draw_in_layout, at_once, uniforms, layout):
    (expected, cdf), other = at_once, draw_in_layout(**LAYOUTS[layout])
    (ours, our_mask), (theirs, _) = completion(other), completion(expected)
    num_rows, num_differing = len(ours), 0
    for row in range(num_rows):
        length = our_mask[row].sum()
        same = np.flatnonzero(ours[row] != theirs[row])
        if (
            same.size
        ):  # from here on the texts differ; the first different draw must lie on a boundary
            num_differing, length = num_differing + 1, same[0]
            pair = np.array([ours[row, length], theirs[row, length]])
            assert (
                distance_outside(cdf[row, [length] * 2], pair, uniforms[row, length]).max() < 1e-4
            )
        behavior = (x.behavior_logprobs[row, -LENGTH:][:length] for x in (other, expected))
        np.testing.assert_allclose(*behavior, atol=2 * ROUNDING)
    print(f"{layout}: {num_differing} of {num_rows} rows differ, {our_mask.sum()} tokens")
    assert num_differing <= 2


# ---- Slots, blocks of prompts and rings


SAME = ("mask", "segment_ids", "prompt_id", "sample_id", "is_truncated", "tokens")


def assert_same_rollouts(ours, theirs):
    for field in SAME:
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)
    for field in ("behavior_logprobs", "unfiltered_logprobs"):
        assert_logprobs(getattr(ours, field), getattr(theirs, field))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"temperature": 1.5}, marks=pytest.mark.long),
        pytest.param({"temperature": 0.0}, marks=pytest.mark.long),
        WARM,
    ],
    ids=["plain", "greedy", "filtered"],
)
def test_refilled_slots_sample_what_all_rows_at_once_sample(generate, mixed, steps, options):
    """Prompts of 14, 6 and 1 tokens with four generations each, and filler."""
    expected = generate(mixed, num_generations=4, **options)
    at_once = sum(steps())
    for slots in (3, 8):
        assert_same_rollouts(generate(mixed, num_generations=4, slots=slots, **options), expected)
    assert at_once == expected.mask.sum(1).max()


@pytest.mark.long
@pytest.mark.parametrize(
    ("stop", "length"),
    [
        (tuple(range(VOCAB)), 1),
        pytest.param((VOCAB,), LENGTH, marks=pytest.mark.long),
    ],
    ids=["at once", "never"],
)
def test_rows_that_all_end_at_the_same_step(generate, mixed, stop, length):
    drawn = generate(mixed, num_generations=2, slots=4, stop=stop, temperature=1.5)
    filler = np.repeat(np.arange(8) % 4 == 3, 2)
    assert (drawn.mask.sum(1) == np.where(filler, 0, length)).all()
    assert (drawn.is_truncated == (~filler & (length == LENGTH))).all()
    assert_same_rollouts(drawn, generate(mixed, num_generations=2, stop=stop, temperature=1.5))


def test_filler_only_samples_nothing(generate, mixed, steps):
    empty = dataclasses.replace(mixed, mask=np.zeros_like(mixed.mask))
    drawn = generate(empty, num_generations=2, slots=4)
    assert not drawn.mask.any()
    assert not steps()


@pytest.fixture
def short_rings(monkeypatch):
    """Rings of 4, 8, 16 and 24 columns."""
    monkeypatch.setattr(scheduling, "_SHORTEST_RING", 4)
    assert scheduling.ring_sizes(LENGTH) == [4, 8, LENGTH]


@pytest.mark.long
@pytest.mark.parametrize("slots", [pytest.param(None, marks=pytest.mark.long), 5])
@pytest.mark.usefixtures("short_rings")
def test_a_ring_that_grows_changes_nothing(generate, mixed, rollouts, slots):
    assert_same_rollouts(generate(mixed, num_generations=8, temperature=1.5, slots=slots), rollouts)


@pytest.mark.long
@pytest.mark.usefixtures("short_rings")
def test_windows_hold_in_refilled_slots_and_growing_rings(student, mixed):
    """Log-probs equal those of a full forward, whose windows equal those of transformers."""
    windows = (3, *[NO_WINDOW] * (student.config.num_layers - 2), 5)
    config = dataclasses.replace(student.config, layer_windows=windows)
    options = {"decoding": decoding(stop=student.stop, temperature=1.5), "num_generations": 4}
    found = sample(student.params, mixed, 0, 0, config=config, slots=5, **options)
    hidden = decoder.forward(student.params, config, found.tokens, found.segment_ids)
    head = decoder.head_of(student.params, temperature=1.5)
    logits = head_logits(head, hidden)[:, WIDTH - 1 : -1]
    (tokens, mask), logprobs = completion(found), dense_logprobs(np.asarray(logits))
    expected = np.take_along_axis(logprobs, np.asarray(tokens)[..., None], -1)[..., 0]
    assert mask.sum() > 5 * LENGTH
    theirs = np.asarray(found.unfiltered_logprobs)[:, WIDTH:]
    np.testing.assert_allclose(theirs[mask], expected[mask], atol=1e-4)


def test_ring_sizes():
    assert [scheduling.ring_sizes(n) for n in (1, 24, 128, 200, 256)] == [
        [1],
        [24],
        [128],
        [200],
        [128, 256],
    ]
    assert scheduling.ring_sizes(1000) == [128, 256, 1000]
    assert scheduling.ring_sizes(1024) == [128, 256, 512, 1024]


@pytest.mark.usefixtures("short_rings")
def test_a_ring_is_no_longer_than_the_longest_unfinished_row_needs(
    generate, mixed, rollouts, monkeypatch
):
    grown, lengthen = [], sampler._lengthen
    monkeypatch.setattr(
        sampler,
        "_lengthen",
        lambda x, cursor, columns, ring: grown.append(ring) or lengthen(x, cursor, columns, ring),
    )
    tokens, mask = completion(rollouts)
    common = np.bincount(tokens[mask], minlength=VOCAB).argsort()[-40:]
    drawn = generate(mixed, num_generations=8, temperature=1.5, slots=3, stop=(2, *common.tolist()))
    longest = drawn.mask.sum(1).max()
    assert drawn.mask.sum() > 10 * longest  # the clock wrapped around many times
    assert max(grown, default=4) < 2 * max(longest, 4)


def test_few_programs_serve_every_mix_of_prompts(student, mixed):
    """One per prompt width and ring length; another order, other prompts and other draws need no
    other program.
    """

    def batch(lengths, seed):
        tokens = np.random.default_rng(seed).integers(3, 70, (len(lengths), 48)).astype(np.int32)
        mask = np.arange(48) >= 48 - np.array(lengths)[:, None]
        return PromptBatch(np.where(mask, tokens, 0), mask, np.arange(len(lengths), dtype=np.int32))

    options = decoding(
        stop=(*student.stop, 5), temperature=1.1
    )  # used by no other test, so that every program is counted
    programs = lambda: np.array(
        [
            f._cache_size()
            for f in (sampler.prefill, sampler.advance, sampler._collect, sampler.start)
        ]
    )
    counts = [programs()]
    for lengths, seed in (
        ([5, 40, 3, 30, 20, 7], 0),
        ([45, 1, 1, 17, 33, 48], 1),
        ([20, 19, 18, 17, 40, 2], 2),
    ):
        sample(
            student.params,
            batch(lengths, seed),
            seed,
            seed,
            config=student.config,
            decoding=options,
            num_generations=2,
            slots=4,
        )
        counts.append(programs())
    assert np.diff(counts, axis=0).tolist() == [[3, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_prompt_is_read_once_for_all_its_generations(generate, mixed, monkeypatch):
    read, prefill = [], sampler.prefill
    monkeypatch.setattr(
        sampler,
        "prefill",
        lambda params, layer_params, tokens, mask, **rest: (
            read.append(mask) or prefill(params, layer_params, tokens, mask, **rest)
        ),
    )
    generate(mixed, num_generations=8, slots=16, temperature=1.5)
    assert sum(int(mask.any(1).sum()) for mask in read) == 6
    assert sum(mask.sum() for mask in read) == mixed.mask.sum()


def test_slots_must_be_divisible(generate, mixed):
    with pytest.raises(
        ValueError, match=r"slots is 12; expected a multiple of 8, .*mesh.data x mesh.fsdp"
    ):
        generate(mixed, slots=12, mesh=make_mesh(4, 2))


def test_heads_are_sharded_over_tensor(generate, mixed, rollouts):
    """Different tokens are counted: sums over parts of a head round differently."""
    ours = generate(mixed, num_generations=8, temperature=1.5, mesh=make_mesh(2, 2, 2), slots=8)
    assert (ours.tokens == rollouts.tokens).all(1).mean() > 0.95


@pytest.mark.long
def test_experts_are_sharded_over_tensor(student, mixed):
    config = dataclasses.replace(student.config, num_experts=4, experts_per_token=2)
    params = decoder.init_params(config, jax.random.key(0))
    options = {"decoding": decoding(stop=student.stop), "num_generations": 4, "slots": 8}
    run = lambda mesh: sample(params, mixed, 0, 0, config=config, mesh=mesh, **options).tokens
    one, eight = map(np.asarray, map(run, (None, make_mesh(2, 2, 2))))
    assert len(np.unique(one)) > 30
    assert (one == eight).all(1).mean() > 0.9


# ---- Types of stored keys and values


@pytest.mark.parametrize(
    ("kv_dtype", "most", "mean"), [("bfloat16", 0.2, 0.01), ("int8", 0.2, 0.01)]
)
def test_a_cache_of_fewer_bits_changes_the_behavior_a_little(
    generate, mixed, student, kv_dtype, most, mean
):
    """Nats between the sampled distribution and the model without a cache, at the same contexts."""
    drawn = generate(mixed, num_generations=8, kv_dtype=kv_dtype)
    tokens, mask = completion(drawn)
    exact = np.take_along_axis(dense_logprobs(student.dense(drawn)), tokens[:, :, None], -1)[
        :, :, 0
    ]
    off = np.abs(drawn.behavior_logprobs[:, WIDTH:] - exact)[mask]
    kl = np.mean(off**2) / 2  # to second order, and never negative
    print(
        f"{kv_dtype}: |d logprob| at most {off.max():.2g}, on average {off.mean():.2g}; "
        f"KL(behaviour || model) {kl:.2g} nats"
    )
    assert 0 < off.mean() < mean
    assert off.max() < most
    assert kl < 1e-4


@pytest.mark.long
def test_int8_keeps_each_number_to_half_a_step(student, rng):
    tokens, mask = rng.integers(3, 70, (2, 8)), np.ones((2, 8), bool)
    layer_params = kv_cache.split_layers(student.params["layers"], student.config)
    prefill = jax.jit(kv_cache.prefill, static_argnums=(2, 5))
    caches = [
        prefill(student.params, layer_params, student.config, tokens, mask, dtype)[1]
        for dtype in (jnp.float32, jnp.int8)
    ]
    for exact, stored in zip(
        caches[0].keys[:1] + caches[0].values[:1], caches[1].keys[:1] + caches[1].values[:1]
    ):
        assert stored.data.dtype == jnp.int8
        assert np.abs(stored.data * stored.scale - exact.data).max(-1) == pytest.approx(
            0, abs=0.51 * float(stored.scale.max())
        )
        assert (np.abs(stored.data).max(-1) == 127).all()
