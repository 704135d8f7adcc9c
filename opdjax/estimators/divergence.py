"""Divergences at one context, over the full vocabulary or on a few ids, each by its own name; nats.

The recipes let no gradient reach the teacher.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opdjax.config.recipes import TOP_K_CONVENTIONS
from opdjax.estimators.opd import needed, sampled_reward
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs


def reverse_kl(student: VocabTile, teacher: VocabTile) -> Float[Array, " n"]:
    """`KL(student || teacher)`, mode-seeking; infinite where the student can draw what the teacher
    cannot.
    """
    return student.expect(student.logprobs - teacher.logprobs)


def forward_kl(student: VocabTile, teacher: VocabTile) -> Float[Array, " n"]:
    """`KL(teacher || student)`, mass-covering."""
    return teacher.expect(teacher.logprobs - student.logprobs)


def jsd(student: VocabTile, teacher: VocabTile, beta: float) -> Float[Array, " n"]:
    """Generalised Jensen-Shannon divergence `beta KL(T || M) + (1 - beta) KL(S || M)`, M = beta T +
    (1 - beta) S.

    GKD (arXiv 2306.13649), equation 1. Its limits, where the formula itself is 0, are named by
    convention: beta 0 is `forward_kl` and beta 1 is `reverse_kl`.
    """
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    t, s, mixture = _mix(teacher, student, beta)
    return beta * teacher.expect(t - mixture) + (1 - beta) * student.expect(s - mixture)


def skew_forward_kl(student: VocabTile, teacher: VocabTile, alpha: float) -> Float[Array, " n"]:
    """`KL(T || alpha T + (1 - alpha) S)`, at most log(1 / alpha) even where the student is 0;
    DistiLLM (arXiv 2402.03898).

    alpha 0 is `forward_kl`, alpha 1 is 0.
    """
    t, _, mixture = _mix(teacher, student, alpha)
    return teacher.expect(t - mixture)


def skew_reverse_kl(student: VocabTile, teacher: VocabTile, alpha: float) -> Float[Array, " n"]:
    """`KL(S || alpha S + (1 - alpha) T)`, at most log(1 / alpha) even where the teacher is 0;
    DistiLLM (arXiv 2402.03898).

    alpha 0 is `reverse_kl`, alpha 1 is 0.
    """
    s, _, mixture = _mix(student, teacher, alpha)
    return student.expect(s - mixture)


def _mix(
    one: VocabTile, other: VocabTile, alpha: float
) -> tuple[Float[Array, "n V"], Float[Array, "n V"], Float[Array, "n V"]]:
    """Log-probabilities of `one`, of `other` and of `alpha one + (1 - alpha) other`; finite
    stand-ins where both are -inf.
    """
    # Both are -inf on padded ids; a finite stand-in keeps the gradient of logaddexp from being NaN
    # there.
    is_live = (one.logits > -jnp.inf) | (other.logits > -jnp.inf)
    x, y = (jnp.where(is_live, tile.logprobs, 0) for tile in (one, other))
    return x, y, jnp.logaddexp(x + jnp.log(alpha), y + jnp.log1p(-alpha))


def full_kl(
    student: VocabTile,
    teacher: VocabTile,
    row: TokenInputs,
    *,
    divergence: str = "reverse",
    beta: float = 0.5,
    skew_alpha: float = 0.1,
):
    """The exact divergence between student S and teacher T at each sampled context, over the whole
    vocabulary.

    Equation:  loss = sum_v first(v) (log first(v) - log second(v)), nats, with (first, second) by
               `divergence`:
                 reverse       KL(S || T)                         mode-seeking; infinite where S > 0 = T
                 forward       KL(T || S)                         mass-covering; infinite where T > 0 = S
                 jsd           beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S     (arXiv 2306.13649)
                 skew_forward  KL(T || alpha T + (1 - alpha) S)   at most log(1 / alpha)              (arXiv 2402.03898)
                 skew_reverse  KL(S || alpha S + (1 - alpha) T)   at most log(1 / alpha)              (arXiv 2402.03898)
               Padded ids (-inf on both sides) contribute 0 to value and gradient. All are 0,
               without gradient, at S = T.

    Detached:  the teacher, and the contexts: it is the gradient of the loss at the contexts that
               were sampled, not of how the student comes to sample them. All of the student's
               distribution carries gradient, in `first`, `second` and M alike. The sampled token
               enters no loss, only the outputs.

    Cost:      the teacher's hidden states and its unembedding: four products with a [V, D] matrix a
               token (logits of each side, gradients of states and head) where `sft` has three.
               Memory is a few [tile, V] arrays for either side. The mixtures add one pass over
               [tile, V] and the monitored KL(S || T) another.

    Use it when the teacher's weights are at hand and the vocabularies agree: no noise of the
    sampled action is left (on
               the mini pair it learns more a step than `opd` and `vopd`), and it is exact whoever
               wrote the contexts.

    Options:
      divergence  reverse (default), forward, jsd, skew_forward or skew_reverse; ValueError on any
      other
      beta        of jsd, 0.5: the teacher's share of M; 0 is read as forward and 1 as reverse, where the formula is 0
      skew_alpha  of the skew divergences, 0.1: share of `first` in `second`; towards 0 the plain
      KL, towards 1 nothing
      importance  none (default) or prefix_truncate: the ratio of the tokens before, where another
      policy drew them
      importance_cap  its largest value, 2
    """
    teacher = jax.lax.stop_gradient(teacher)
    exact = {
        "reverse": reverse_kl,
        "forward": forward_kl,
        "jsd": partial(jsd, beta=beta),
        "skew_forward": partial(skew_forward_kl, alpha=skew_alpha),
        "skew_reverse": partial(skew_reverse_kl, alpha=skew_alpha),
    }
    loss = _choose(divergence, exact, "divergence", "full_kl")(student, teacher)
    student_logprob = student.logprob(row.token)
    reward = sampled_reward(teacher.logprob(row.token), student_logprob)
    kl = loss if divergence == "reverse" else reverse_kl(student, teacher)
    return loss, {
        "reward": reward,
        "student_logprob": student_logprob,
        "kl": jax.lax.stop_gradient(kl),
    }


SUPPORTS_OF_BOTH = ("union", "intersection", "symmetric_difference")
FLOOR = (
    -100.0
)  # nats: the teacher's log-prob of every id outside the support, where `outside` is `floor`


def topk_kl(
    student: VocabTile,
    teacher: VocabTile,
    row: TokenInputs,
    *,
    support: str = "student",
    support_top_k: int = 100,
    renormalize: str = "both",
    outside: str = "drop",
    divergence: str = "reverse",
    clamp_at_zero: bool = False,
    weight: str | None = None,
    convention: str | None = None,
):
    """A divergence between student S and teacher T on few ids of each context: the support K, of
    the likeliest ids.

    Equation:  loss = sum_{v in K} a_v (log a_v - log b_v) + rest, nats; (a, b) is (p, q) for
               `reverse`, (q, p) for `forward`. p and q are the probabilities of S and T, or those
               divided by their mass on K, p(K) or q(K):
                 renormalize both     both: KL of the distributions conditioned on K (OPD_top-k of arXiv 2605.07865)
                 renormalize teacher  only q; `forward` is then a cross-entropy on K less a constant
                 renormalize none     neither
               rest, of the ids outside K:
                 outside drop   0
                 outside tail   one bucket, a(out) log(a(out) / b(out)): a KL of coarser distributions, at most the full
                 outside floor  log q = -100 there: `reverse` sum_{out} p_v (log p_v + 100);
                 `forward` 0 (e^-100 of it)
               With `weight` w, in place of all that, a policy gradient over K, p and q not divided:
                 -sum_{v in K} sg[w_v (log q_v - log p_v)] log p_v
               A context with an empty K has loss 0 and no gradient, whatever the options.

    Detached:  the teacher, the contexts, and the choice of K, which is held fixed where the loss is
               differentiated. By the logits z of S, where d log p_v / dz = e_v - p, e_v the unit
               vector of v, `none` with `drop` has the gradient
                 reverse  sum_{v in K} p_v (log(p_v / q_v) + 1) (e_v - p)
                 forward  -sum_{v in K} q_v (e_v - p)
               At S = T, `both`, `tail` and `weight` have no gradient. `drop` keeps the mass term
               (the + 1 above), for it is no divergence and can be negative:
                 none, reverse     grad p(K), whose descent pushes mass off the support
                 none, forward     -grad p(K), which pulls mass onto it
                 teacher, reverse  (1 + log p(K)) grad p(K): off it where p(K) > 1/e, onto it below
                 teacher, forward  -grad log p(K), onto it
               and with `floor`
                 none, reverse     sum_{out} p_v (log p_v + 100) (e_v - p), off every id outside; forward as `drop`
               Under `clamp_at_zero` a token whose value is below 0 has no gradient, and one at 0
               half of it.

    Cost:      as `full_kl`: the teacher's hidden states and unembedding, four products with a [V,
               D] matrix a token. Of the [tile, V] logits it takes the top k of one side (of both
               where K is made of two sets), two log-sum-exps and the monitored KL(S || T); two sets
               are compared by sorting k ids. `tail` and `floor` hold a few [tile, V] arrays more.
               The loss itself is of size [tile, k], or [tile, 2 k] for two sets.

    Use it when a published top-k distillation is to be reproduced, or the teacher's tail is not to
    be imitated. To save
               work it is no use: `full_kl` costs the same here. `both` and `tail` rest at S = T; of
               these two only `tail` sees how much mass the student has outside.

    Options:
      divergence     reverse (default) or forward
      support        student (default) or teacher: the k most likely ids of that side; union: ids in either set;
                     intersection: in both; symmetric_difference: in exactly one (empty at S = T).
                     None counts twice
      support_top_k  k, 100; at k >= V every support is the whole vocabulary, but
      symmetric_difference, which is empty
      renormalize    both (default), teacher or none
      outside        drop (default); tail, with renormalize none; floor, with renormalize none or teacher
      clamp_at_zero  False; True takes max(loss, 0) of each token
      weight         None; p_student or p_teacher, normalised on K, or none, which is 1
      convention     None; a row of TOP_K_CONVENTIONS, which stands in place of the options it names
      importance     none (default) or prefix_truncate: the ratio of the tokens before, where another policy drew them
      importance_cap  its largest value, 2

    ValueError on a name that is not known, and on an `outside` that `renormalize` does not have.
    """
    if convention is not None:
        named = {"support_top_k": support_top_k, "divergence": divergence} | TOP_K_CONVENTIONS[
            convention
        ]
        return topk_kl(student, teacher, row, **named)
    ids, is_kept = _support(support, *jax.lax.stop_gradient((student, teacher)), support_top_k)
    # An id that is not kept is one that neither side can draw: it contributes exactly 0 to whatever
    # is summed.
    s, t = (
        jnp.where(is_kept, x, -jnp.inf)
        for x in (student.logprob(ids), jax.lax.stop_gradient(teacher.logprob(ids)))
    )
    if weight is not None:
        loss = _weighted_policy_gradient(s, t, weight)
    else:
        loss = _on_support(s, t, renormalize, divergence, "topk_kl")
        if renormalize != "none" and (
            outside == "tail" or (outside == "floor" and renormalize == "both")
        ):
            raise ValueError(
                f"topk_kl has outside {outside!r} with renormalize {renormalize!r}; expected renormalize 'none'"
            )
        rest = _choose(
            outside, {"drop": _nothing, "tail": _tail_bucket, "floor": _floored}, "outside"
        )
        loss += rest(
            student, teacher, jnp.where(is_kept, ids, student.vocab_size), divergence == "forward"
        )
    # With nothing kept there is nothing to compare, whatever stands for the rest.
    loss = jnp.where(jnp.any(is_kept, axis=-1), loss, 0)
    if clamp_at_zero:
        loss = jnp.maximum(loss, 0)
    student_logprob = student.logprob(row.token)
    reward = sampled_reward(teacher.logprob(row.token), student_logprob)
    return loss, {
        "reward": reward,
        "student_logprob": student_logprob,
        "kl": jax.lax.stop_gradient(reverse_kl(student, teacher)),
    }


def npd(
    student: VocabTile,
    teacher: VocabTile | None,
    row: TokenInputs,
    *,
    kd_weight: float = 0.9,
    support_top_k: int = 10,
    renormalize: str = "none",
    divergence: str = "forward",
):
    """Near-policy distillation: cross-entropy on the kept tokens, and a divergence from the
    teacher's stored top k.

    Equation:  loss = (1 - kd_weight) (-log S(y)) + kd_weight sum_{v in K} q_v (log q_v - log p_v),
               nats; y the token that was sampled, K the teacher's k most likely ids, p and q the
               probabilities of S and T (arXiv 2605.05940, the loss as it is written: neither p nor
               q is divided by its mass on K). Other sums over K in its place:
                 renormalize teacher  q divided by q(K): each context counts the same, and not by
                 how sure the teacher is
                 renormalize both     p divided by p(K) as well: KL of the distributions conditioned on K
                 divergence reverse   p_v (log p_v - log q_v): the reverse direction on a support that was stored

    Detached:  the teacher, its ids, and y, which is data. By the student's logits z, where d log
               p_v / dz = e_v - p, e_v the unit vector of v, the gradient of the two parts is
                 -log S(y)  p - e_y; in expectation p - b, b the policy that drew y: no direction
                 where b is the student,
                            towards what drew the answer where it was another, and towards what a
                            filter kept
                 forward    -sum_{v in K} q_v (e_v - p), divided by q(K) with `teacher`: at rest where p is q / q(K) on K
                            and 0 outside, which is not the teacher; `both` rests wherever p is
                            proportional to q on K
                 reverse    sum_{v in K} p_v (log(p_v / q_v) + 1) (e_v - p), `both` without the + 1 and p, q conditioned
               At S = T the divergence, which without `both` is none and may be negative, has the
               gradient
                 none, forward     -grad p(K), whose descent pulls mass onto K
                 teacher, forward  -grad log p(K), onto it
                 none, reverse     grad p(K), off it
                 teacher, reverse  (1 + log p(K)) grad p(K): off it where p(K) > 1/e, onto it below
                 both              none

    Cost:      k ids and k log-probs of the teacher a token (60 bytes at k = 10 with float16),
               stored by one pass of the teacher over the answers and read as often as they are
               trained on. Of the vocabulary three products with a [V, D] matrix a token, as `sft`:
               the teacher's unembedding is not there. A tile of the teacher, where one is given, is
               read in place of what was stored; that costs what `topk_kl` costs.

    Use it when rollouts are drawn ahead of their updates: the divergence asks nothing of who wrote
    the contexts, and the
               teacher's work is done once. On the student's own tokens of the moment the
               cross-entropy is noise alone: take kd_weight 1, or `full_kl` where the teacher is at
               hand.

    Options:
      kd_weight      lambda, 0.9; 0: cross-entropy on the answers that were kept, without a teacher; 1: the divergence alone
      support_top_k  k, 10; ValueError where fewer are stored. An id that the teacher cannot draw is
      in no K
      renormalize    none (default), teacher or both
      divergence     forward (default) or reverse
      importance     none (default) or prefix_truncate: the ratio of the tokens before, where another policy drew them
      importance_cap  its largest value, 2
    """
    student_logprob = student.logprob(row.token)
    loss = (kd_weight - 1) * student_logprob if kd_weight < 1 else jnp.zeros_like(student_logprob)
    if kd_weight:
        ids, t = _teachers_top_k(student, jax.lax.stop_gradient(teacher), row, support_top_k)
        s = jnp.where(t == -jnp.inf, -jnp.inf, student.logprob(ids))
        loss += kd_weight * _on_support(s, t, renormalize, divergence, "npd")
    outputs = {"student_logprob": student_logprob}
    teacher_logprob = row.teacher_logprob if teacher is None else teacher.logprob(row.token)
    if teacher_logprob is not None:
        outputs["reward"] = sampled_reward(teacher_logprob, student_logprob)
    if teacher is not None:
        outputs["kl"] = jax.lax.stop_gradient(reverse_kl(student, teacher))
    return loss, outputs


def _teachers_top_k(
    student: VocabTile, teacher: VocabTile | None, row: TokenInputs, k: int
) -> tuple[Int[Array, "n K"], Float[Array, "n K"]]:
    """The teacher's k most likely ids and their log-probs, from its tile or as they were stored; id
    0 where it can draw no more.
    """
    if teacher is not None:
        ids = teacher.top_k(k)
        logprobs = teacher.logprob(ids)
    else:
        ids, logprobs = (
            needed(row.teacher_ids, "teacher_ids", "npd"),
            needed(row.teacher_top_logprob, "teacher_top_logprob", "npd"),
        )
        stored, wanted = ids.shape[-1], min(k, student.vocab_size)
        if stored < wanted:
            raise ValueError(
                f"npd has support_top_k {k}, but {stored} ids of the teacher are stored; expected at least {wanted}"
            )
        # Stored in few bits; sums are taken in the type of the logits.
        ids, logprobs = ids[:, :wanted], logprobs[:, :wanted].astype(student.logits.dtype)
    # A vocabulary padded beyond the student's has ids that no column of the student's logits stands
    # for.
    return jnp.where(logprobs == -jnp.inf, 0, ids), logprobs


def _choose(value, table: dict, option: str, recipe: str = "topk_kl"):
    if value not in table:
        raise ValueError(f"{recipe} has no {option} {value!r}; expected one of {list(table)}")
    return table[value]


def _support(
    name: str, student: VocabTile, teacher: VocabTile, k: int
) -> tuple[Int[Array, "n K"], Bool[Array, "n K"]]:
    """Ids, and which of them are kept: no id twice, and none that is not in the set. K is k or, of
    two sides, up to 2 k.
    """
    sides = {"student": [student], "teacher": [teacher]} | {
        key: [student, teacher] for key in SUPPORTS_OF_BOTH
    }
    ids = [side.top_k(k) for side in _choose(name, sides, "support")]
    if name not in SUPPORTS_OF_BOTH:
        return ids[0], jnp.ones(ids[0].shape, bool)
    ours, theirs = ids
    is_ours_shared, is_theirs_shared = _is_among(ours, theirs), _is_among(theirs, ours)
    if name == "intersection":
        return ours, is_ours_shared
    is_ours_kept = jnp.ones_like(is_ours_shared) if name == "union" else ~is_ours_shared
    return jnp.concatenate(ids, axis=1), jnp.concatenate([is_ours_kept, ~is_theirs_shared], axis=1)


def _is_among(ids: Int[Array, "n K"], others: Int[Array, "n K"]) -> Bool[Array, "n K"]:
    """Which ids of a row are in the same row of `others`; by a sort of K ids, since K^2 comparisons
    would be held in memory.
    """
    others = jnp.sort(others, axis=-1)
    place = jax.vmap(jnp.searchsorted)(others, ids)  # one past the end for what is larger than all
    return jnp.take_along_axis(others, jnp.minimum(place, others.shape[-1] - 1), axis=-1) == ids


def _on_live(f, logprobs: Float[Array, "n K"], fill: float) -> Float[Array, "n K"]:
    """`f` of each row; `fill`, without gradient, in a row that is -inf throughout, of which a
    softmax would make NaN.
    """
    has_any = jnp.any(logprobs != -jnp.inf, axis=-1, keepdims=True)
    return jnp.where(has_any, f(jnp.where(has_any, logprobs, 0), axis=-1), fill)


def _on_support(
    s: Float[Array, "n K"], t: Float[Array, "n K"], renormalize: str, divergence: str, recipe: str
) -> Float[Array, " n"]:
    """The divergence on the kept ids from the log-probs of student and teacher there, -inf on an id
    that is not kept.
    """
    table = {"both": (True, True), "teacher": (False, True), "none": (False, False)}
    normalise = _choose(renormalize, table, "renormalize", recipe)
    s, t = (
        _on_live(jax.nn.log_softmax, x, -jnp.inf) if is_wanted else x
        for x, is_wanted in zip((s, t), normalise)
    )
    swap = _choose(divergence, {"reverse": False, "forward": True}, "divergence", recipe)
    return _sum_on(t, s) if swap else _sum_on(s, t)


def _sum_on(first: Float[Array, "n K"], second: Float[Array, "n K"]) -> Float[Array, " n"]:
    """`sum_v p_v (log p_v - log q_v)` over the kept ids."""
    return jnp.sum(_terms(first, second), axis=-1)


def _terms(first: Float[Array, "n K"], second: Float[Array, "n K"]) -> Float[Array, "n K"]:
    """`p_v (log p_v - log q_v)` of each id; one of probability 0 contributes exactly 0."""
    is_live = first != -jnp.inf  # a NaN is live: it has to be seen
    first = jnp.where(is_live, first, 0)
    return jnp.where(is_live, jnp.exp(first) * (first - jnp.where(is_live, second, 0)), 0)


def _weighted_policy_gradient(
    s: Float[Array, "n K"], t: Float[Array, "n K"], weight: str
) -> Float[Array, " n"]:
    """`-sum_v sg[w_v (log teacher(v) - log student(v))] log student(v)`; a weight of 0 is a summand
    of 0.
    """
    is_live = s != -jnp.inf
    among = lambda x: _on_live(jax.nn.softmax, jnp.where(is_live, x, -jnp.inf), 0)
    w = _choose(
        weight,
        {"p_student": among(s), "p_teacher": among(t), "none": is_live.astype(s.dtype)},
        "weight",
    )
    s, t = (jnp.where(w != 0, x, 0) for x in (s, t))
    return -jnp.sum(jax.lax.stop_gradient(w * (t - s)) * s, axis=-1)


def _nothing(student, teacher, ids, swap) -> Float[Array, " n"]:
    return jnp.zeros(student.logits.shape[0], student.logits.dtype)


def _tail_bucket(student, teacher, ids, swap) -> Float[Array, " n"]:
    """One summand for all other ids; their mass is summed, not subtracted from 1, which float32
    could not resolve.
    """
    s, t = (
        tile.log_total(tile.without(ids))[:, None]
        for tile in (student, jax.lax.stop_gradient(teacher))
    )
    return _sum_on(t, s) if swap else _sum_on(s, t)


def _floored(student, teacher, ids, swap) -> Float[Array, " n"]:
    """Forward: the teacher's e^-100 of every other id counts as 0. Reverse: the student pays for
    all it has there.
    """
    if swap:
        return _nothing(student, teacher, ids, swap)
    rest = student.without(ids)
    return student.total(_terms(rest, jnp.full_like(rest, FLOOR)))
