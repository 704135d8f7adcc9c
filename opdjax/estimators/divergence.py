"""Divergences at one context, over the full vocabulary or on a few ids; nats.

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
    """`KL(student || teacher)`, mode-seeking; infinite where the student has mass and the teacher
    none.
    """
    return student.expect(student.logprobs - teacher.logprobs)


def forward_kl(student: VocabTile, teacher: VocabTile) -> Float[Array, " n"]:
    """`KL(teacher || student)`, mass-covering."""
    return teacher.expect(teacher.logprobs - student.logprobs)


def jsd(student: VocabTile, teacher: VocabTile, beta: float) -> Float[Array, " n"]:
    """Generalised Jensen-Shannon divergence `beta KL(T || M) + (1 - beta) KL(S || M)`.

    M = beta T + (1 - beta) S; GKD (arXiv 2306.13649), equation 1. By convention beta 0 is
    `forward_kl` and beta 1 is `reverse_kl`, where the formula itself is 0.
    """
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    t, s, mixture = _mix(teacher, student, beta)
    return beta * teacher.expect(t - mixture) + (1 - beta) * student.expect(s - mixture)


def skew_forward_kl(student: VocabTile, teacher: VocabTile, alpha: float) -> Float[Array, " n"]:
    """`KL(T || alpha T + (1 - alpha) S)`, at most log(1 / alpha); DistiLLM (arXiv 2402.03898).

    It is finite where the student is 0. alpha 0 is `forward_kl`, alpha 1 is 0.
    """
    t, _, mixture = _mix(teacher, student, alpha)
    return teacher.expect(t - mixture)


def skew_reverse_kl(student: VocabTile, teacher: VocabTile, alpha: float) -> Float[Array, " n"]:
    """`KL(S || alpha S + (1 - alpha) T)`, at most log(1 / alpha); DistiLLM (arXiv 2402.03898).

    It is finite where the teacher is 0. alpha 0 is `reverse_kl`, alpha 1 is 0.
    """
    s, _, mixture = _mix(student, teacher, alpha)
    return student.expect(s - mixture)


def _mix(
    one: VocabTile, other: VocabTile, alpha: float
) -> tuple[Float[Array, "n V"], Float[Array, "n V"], Float[Array, "n V"]]:
    """Log-probabilities of `one`, of `other` and of `alpha one + (1 - alpha) other`; finite
    stand-ins where both are -inf.
    """
    # Padded ids are -inf on both sides; a finite value keeps the gradient of logaddexp from NaN.
    is_live = (one.logits > -jnp.inf) | (other.logits > -jnp.inf)
    x, y = (jnp.where(is_live, tile.logprobs, 0) for tile in (one, other))
    return x, y, jnp.logaddexp(x + jnp.log(alpha), y + jnp.log1p(-alpha))


def full_kl(
    student: VocabTile,
    teacher: VocabTile,
    row: TokenInputs,
    *,
    divergence: str = "reverse",
    beta: float | None = None,
):
    """The exact divergence of student S and teacher T at each sampled context, over the vocabulary.

    Equation:  loss = sum_v first(v) (log first(v) - log second(v)), nats; `divergence` names the
    pair:
      reverse       KL(S || T)                        mode-seeking; infinite where S > 0 = T
      forward       KL(T || S)                        mass-covering; infinite where T > 0 = S
      jsd           beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S (2306.13649)
      skew_forward  KL(T || alpha T + (1 - alpha) S)  at most log(1 / alpha) (arXiv 2402.03898)
      skew_reverse  KL(S || alpha S + (1 - alpha) T)  at most log(1 / alpha) (arXiv 2402.03898)
    Padded ids (-inf on both sides) contribute 0 to value and gradient. All are 0, without gradient,
    at S = T.

    Detached: the teacher and the contexts. The gradient is that of the loss at the sampled
    contexts; it leaves out how the student's weights change which contexts are sampled. The
    student's whole distribution carries gradient, in `first`, `second` and M. The sampled token
    enters the outputs only.

    Cost: the teacher's hidden states and its unembedding: four products with a [V, D] matrix a
    token (logits of each side, gradients of states and head) where `sft` has three. Memory is a few
    [tile, V] arrays for either side. The mixtures add one pass over [tile, V], and the monitored
    KL(S || T) another.

    Use it when the teacher's weights are available and the vocabularies agree. It has no sampling
    variance of the action (on the mini pair it learns more a step than `opd` and `vopd`), and it is
    exact for contexts of any policy.

    Options:
      divergence      reverse (default), forward, jsd, skew_forward or skew_reverse
      beta            of jsd, 0.5: the teacher's share of M; 0 is read as forward and 1 as reverse.
                      Of the skew divergences the alpha above, 0.1: towards 0 the plain KL, towards
                      1 nothing
      importance      none (default) or prefix_truncate: the ratio of the tokens before, for
                      contexts of another policy
      importance_cap  its largest value, 2

    ValueError on another divergence.
    """
    teacher = jax.lax.stop_gradient(teacher)
    exact = {
        "reverse": reverse_kl,
        "forward": forward_kl,
        "jsd": partial(jsd, beta=0.5 if beta is None else beta),
        "skew_forward": partial(skew_forward_kl, alpha=0.1 if beta is None else beta),
        "skew_reverse": partial(skew_reverse_kl, alpha=0.1 if beta is None else beta),
    }
    loss = _choose(divergence, exact, "divergence", "full_kl")(student, teacher)
    student_logprobs = student.logprob(row.tokens)
    reward = sampled_reward(teacher.logprob(row.tokens), student_logprobs)
    outputs = {"rewards": reward, "student_logprobs": student_logprobs}
    return loss, outputs | ({"kl": jax.lax.stop_gradient(loss)} if divergence == "reverse" else {})


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
    """A divergence of student S and teacher T on a support K of likely ids of each context.

    Equation:  loss = sum_{v in K} a_v (log a_v - log b_v) + rest, nats. (a, b) is (p, q) for
    `reverse` and (q, p) for `forward`. p and q are the probabilities of S and T, or those divided
    by their mass on K, p(K) or q(K):
      renormalize both     both: KL of the distributions conditioned on K (arXiv 2605.07865, top-k
                           OPD)
      renormalize teacher  only q; `forward` is then a cross-entropy on K minus a constant
      renormalize none     neither
    rest, for the ids outside K:
      outside drop         0
      outside tail         one bucket, a(out) log(a(out) / b(out)): a KL of coarser distributions,
                           at most the full KL
      outside floor        log q = -100 there: `reverse` adds sum_{out} p_v (log p_v + 100),
                           `forward` adds 0 (e^-100 of it)
    With `weight` w the loss is a policy gradient over K instead, p and q not divided:
      -sum_{v in K} sg[w_v (log q_v - log p_v)] log p_v
    A context with an empty K has loss 0 and no gradient under all options.

    Detached: the teacher, the contexts, and the choice of K, which is fixed where the loss is
    differentiated. By the logits z of S, with d log p_v / dz = e_v - p and e_v the unit vector of
    v, `none` with `drop` has the gradient
      reverse            sum_{v in K} p_v (log(p_v / q_v) + 1) (e_v - p)
      forward            -sum_{v in K} q_v (e_v - p)
    At S = T, `both`, `tail` and `weight` have no gradient. `drop` keeps the mass term (the + 1
    above):
    it is not a divergence and can be negative. Its gradient at S = T:
      none, reverse      grad p(K), whose descent moves mass off the support
      none, forward      -grad p(K), which moves mass onto it
      teacher, reverse   (1 + log p(K)) grad p(K): off it where p(K) > 1/e, onto it below
      teacher, forward   -grad log p(K), onto it
    and with `floor`
      none, reverse      sum_{out} p_v (log p_v + 100) (e_v - p), off every id outside; forward as
                         `drop`
    Under `clamp_at_zero` a token with a value below 0 has no gradient, and one at 0 half of it.

    Cost: as `full_kl`: the teacher's hidden states and unembedding, four products with a [V, D]
    matrix a token. From the [tile, V] logits it takes the top k of one side (of both for a support
    of two sets), two log-sum-exps and the monitored KL(S || T); two sets are compared by sorting k
    ids. `tail` and `floor` hold a few more [tile, V] arrays. The loss itself has size [tile, k], or
    [tile, 2 k] for two sets.

    Use it to reproduce a published top-k distillation, or to leave out the teacher's tail. It does
    not save work here: `full_kl` costs the same. `both` and `tail` are 0 at S = T; of these two
    only `tail` depends on the mass that the student has outside.

    Options:
      divergence      reverse (default) or forward
      support         student (default) or teacher: the k most likely ids of that side; union: ids
                      in either set; intersection: in both; symmetric_difference: in exactly one
                      (empty at S = T). No id counts twice
      support_top_k   k, 100; at k >= V every support is the whole vocabulary, except
                      symmetric_difference, which is empty
      renormalize     both (default), teacher or none
      outside         drop (default); tail, with renormalize none; floor, with renormalize none or
                      teacher
      weight          None; p_student or p_teacher, normalised on K, or none, which is 1
      convention      None; a row of TOP_K_CONVENTIONS, which sets the options it names; verl also
                      sets clamp_at_zero: max(loss, 0) of each token
      importance      none (default) or prefix_truncate: the ratio of the tokens before, for
                      contexts of another policy
      importance_cap  its largest value, 2

    ValueError on an unknown name, and on an `outside` that `renormalize` does not allow.
    """
    if convention is not None:
        named = {"support_top_k": support_top_k, "divergence": divergence} | TOP_K_CONVENTIONS[
            convention
        ]
        return topk_kl(student, teacher, row, **named)
    ids, is_kept = _support(support, *jax.lax.stop_gradient((student, teacher)), support_top_k)
    # At -inf on both sides an id contributes exactly 0 to every sum.
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
                f"topk_kl has outside {outside!r} with renormalize {renormalize!r}; expected "
                "renormalize 'none'"
            )
        rest = _choose(
            outside, {"drop": _nothing, "tail": _tail_bucket, "floor": _floored}, "outside"
        )
        loss += rest(
            student, teacher, jnp.where(is_kept, ids, student.vocab_size), divergence == "forward"
        )
    # An empty support gives 0, whatever `rest` is.
    loss = jnp.where(jnp.any(is_kept, axis=-1), loss, 0)
    if clamp_at_zero:
        loss = jnp.maximum(loss, 0)
    student_logprobs = student.logprob(row.tokens)
    reward = sampled_reward(teacher.logprob(row.tokens), student_logprobs)
    return loss, {"rewards": reward, "student_logprobs": student_logprobs}


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
    """Near-policy distillation: cross-entropy on kept tokens, divergence on a stored top k.

    Equation:  loss = (1 - kd_weight) (-log S(y)) + kd_weight sum_{v in K} q_v (log q_v - log p_v),
    nats. y is the sampled token, K the teacher's k most likely ids, p and q the probabilities of S
    and T (arXiv 2605.05940, the loss as written: neither p nor q is divided by its mass on K).
    Other sums:
      renormalize teacher  q divided by q(K): every context counts the same, however certain the
                           teacher
      renormalize both     p divided by p(K) as well: KL of the distributions conditioned on K
      divergence reverse   p_v (log p_v - log q_v): the reverse direction on a stored support

    Detached: the teacher, its ids, and y, which is data. By the student's logits z, with d log p_v
    / dz = e_v - p and e_v the unit vector of v, the gradients of the two parts are
      -log S(y)            p - e_y; its expectation is p - b, b the policy that sampled y: 0 where b
                           is the student, else towards b, and towards what a filter kept
      forward              -sum_{v in K} q_v (e_v - p), divided by q(K) with `teacher`: 0 where p is
                           q / q(K) on K and 0 outside, which is not the teacher; `both` is 0
                           wherever p is proportional to q on K
      reverse              sum_{v in K} p_v (log(p_v / q_v) + 1) (e_v - p); `both` without the + 1
                           and with p, q conditioned on K
    At S = T the sum (which is a divergence with `both` alone, and may be negative) has the gradient
      none, forward        -grad p(K), whose descent moves mass onto K
      teacher, forward     -grad log p(K), onto it
      none, reverse        grad p(K), off it
      teacher, reverse     (1 + log p(K)) grad p(K): off it where p(K) > 1/e, onto it below
      both                 none

    Cost: k ids and k log-probs of the teacher a token (60 bytes at k = 10 with float16), stored by
    one teacher pass over the answers and read in every epoch. In the vocabulary three products with
    a [V, D] matrix a token, as `sft`: no teacher unembedding. A teacher tile, if given, replaces
    what was stored and costs what `topk_kl` costs.

    Use it when rollouts are sampled ahead of their updates: the divergence is valid for contexts of
    any policy, and the teacher reads each answer once. On the student's current samples the
    cross-entropy is pure noise: set kd_weight 1 there, or use `full_kl` where the teacher is
    available.

    Options:
      kd_weight       lambda, 0.9; 0: cross-entropy on the kept answers, without a teacher; 1: the
                      divergence alone
      support_top_k   k, 10; ValueError where fewer are stored. Ids that the teacher cannot sample
                      are in no K
      renormalize     none (default), teacher or both
      divergence      forward (default) or reverse
      importance      none (default) or prefix_truncate: the ratio of the tokens before, for
                      contexts of another policy
      importance_cap  its largest value, 2
    """
    student_logprobs = student.logprob(row.tokens)
    loss = (kd_weight - 1) * student_logprobs if kd_weight < 1 else jnp.zeros_like(student_logprobs)
    if kd_weight:
        ids, t = _teachers_top_k(student, jax.lax.stop_gradient(teacher), row, support_top_k)
        s = jnp.where(t == -jnp.inf, -jnp.inf, student.logprob(ids))
        loss += kd_weight * _on_support(s, t, renormalize, divergence, "npd")
    outputs = {"student_logprobs": student_logprobs}
    teacher_logprobs = row.teacher_logprobs if teacher is None else teacher.logprob(row.tokens)
    if teacher_logprobs is not None:
        outputs["rewards"] = sampled_reward(teacher_logprobs, student_logprobs)
    return loss, outputs


def _teachers_top_k(
    student: VocabTile, teacher: VocabTile | None, row: TokenInputs, k: int
) -> tuple[Int[Array, "n K"], Float[Array, "n K"]]:
    """The teacher's k most likely ids and their log-probs, from its tile or as stored.

    Id 0 with -inf where the teacher cannot sample further ids. ValueError where fewer are stored.
    """
    if teacher is not None:
        ids = teacher.top_k(k)
        logprobs = teacher.logprob(ids)
    else:
        ids = needed(row.teacher_top_ids, "teacher_top_ids", "npd")
        logprobs = needed(row.teacher_top_logprobs, "teacher_top_logprobs", "npd")
        stored, wanted = ids.shape[-1], min(k, student.vocab_size)
        if stored < wanted:
            raise ValueError(
                f"npd has support_top_k {k}, but {stored} ids of the teacher are stored; expected "
                f"at least {wanted}"
            )
        # Stored as float16; sums are taken in the dtype of the logits.
        ids, logprobs = ids[:, :wanted], logprobs[:, :wanted].astype(student.logits.dtype)
    # A teacher vocabulary with more padding has ids outside the student's logits.
    return jnp.where(logprobs == -jnp.inf, 0, ids), logprobs


def _choose(value, table: dict, option: str, recipe: str = "topk_kl"):
    if value not in table:
        raise ValueError(f"{recipe} has no {option} {value!r}; expected one of {list(table)}")
    return table[value]


def _support(
    name: str, student: VocabTile, teacher: VocabTile, k: int
) -> tuple[Int[Array, "n K"], Bool[Array, "n K"]]:
    """(ids [n, K], which of them are kept [n, K]): no id twice, and only ids of the set.

    K is k, or up to 2 k for a set of two sides.
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
