"""Credit beyond one token: later rewards, the batch mean, rewards of answers and of stages."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from opdjax.ops.masked import reverse_discounted_sum, sequence_total, zero_where_masked

SCALES = ("mean", "mean_std")
STAGE_CREDITS = ("paper", "identity", "last", "decay")
_ROUNDING = 16  # units in the last place by which sums of equal scores may differ


def future_reward(
    reward: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    discount: float,
) -> Float[Array, "B T"]:
    """`sum_{s > t} discount^(s - t) R_s` over the later sampled tokens of the same sequence, nats.

    Added to the immediate reward it is the return-to-go. discount 0 is vOPD's token-level credit:
    the gradient of sum_t KL_t with the distribution of contexts held fixed. discount 1 is the
    gradient of the sequence KL. `reward` may be the expectation at each context (-KL) instead of
    the sampled token's reward: the same expectation with less variance.
    """
    return reverse_discounted_sum(reward, mask, segment_ids, discount) - zero_where_masked(
        reward, mask
    )


def mean_of_other_sequences(
    reward: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    totals: tuple[Float[Array, ""], Float[Array, ""]] | None = None,
) -> Float[Array, "B T"]:
    """At each column, the mean reward of all other sequences' sampled tokens; 0 without others.

    The whole sequence is left out, not the token alone: later tokens depend on it, and a baseline
    must not depend on its token. `totals`: (sum of rewards, tokens) of the whole batch where these
    rows are a part of it.
    """
    reward = zero_where_masked(reward, mask)
    live = mask.astype(reward.dtype)
    total, count = batch_totals(reward, mask) if totals is None else totals
    others = count - sequence_total(live, segment_ids)
    return jnp.where(
        others > 0, (total - sequence_total(reward, segment_ids)) / jnp.maximum(others, 1), 0
    )


def batch_totals(
    reward: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of rewards, number of sampled tokens)."""
    return jnp.sum(zero_where_masked(reward, mask)), jnp.sum(mask).astype(reward.dtype)


def prefix_weight(
    reward: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    gain: float,
) -> Float[Array, "B T"]:
    """`1 + gain * (1 - F_t)`, F_t the share of the sequence's `sum |r|` before token t.

    IW-OPD (arXiv 2606.22600), its released form: 1 + gain at the first token, falling towards 1. A
    token's weight depends on later tokens, so the expected gradient is no longer that of the KL.
    """
    gaps = zero_where_masked(jnp.abs(reward), mask)
    total = sequence_total(gaps, segment_ids)
    # Summing from t on avoids the cancellation in 1 minus the sum before t.
    remaining = reverse_discounted_sum(gaps, mask, segment_ids, 1.0)
    return jnp.where(
        mask & (total > 0), 1 + gain * remaining / jnp.where(total > 0, total, 1), 1 + gain * mask
    )


def group_advantage(
    reward: Float[Array, " B"],
    is_scored: Bool[Array, " B"],
    group_size: int,
    scale: str,
    epsilon: float = 1e-6,
) -> Float[Array, " B"]:
    """`reward - mean` over the scored completions of the same prompt, in the unit of the reward.

    Completions of a prompt are adjacent. `scale` mean_std divides by their population std +
    `epsilon`, outside the root (GRPO, arXiv 2402.03300; ROPD, arXiv 2605.07396, equation 6): it has
    no unit, and near-tied groups then weigh as much as others. 0 for a completion without a score,
    whatever its reward holds, and in groups with fewer than two scores. ValueError on another
    scale.
    """
    if scale not in SCALES:
        raise ValueError(f"there is no scale {scale!r} of advantages; expected one of {SCALES}")
    groups = jnp.reshape(jnp.where(is_scored, reward, 0), (-1, group_size))
    live = jnp.reshape(is_scored, (-1, group_size))
    return _normalised(groups, live, scale, epsilon).reshape(-1)


def _normalised(
    x: Float[Array, "P G ..."], live: Bool[Array, "P G ..."], scale: str, epsilon: float
) -> Float[Array, "P G ..."]:
    """Centred over the live entries of each group; divided by their population std for mean_std.

    0 for other entries, and exactly 0 in a group whose entries are all equal.
    """
    count = jnp.sum(live, axis=1, keepdims=True)
    mean_of = lambda y: (
        jnp.sum(jnp.where(live, y, 0), axis=1, keepdims=True) / jnp.maximum(count, 1)
    )
    size = jnp.max(jnp.where(live, jnp.abs(x), 0), axis=1, keepdims=True)
    # Relative to one of them, so that equal entries differ by exactly 0: the rounded mean of equal
    # numbers may be another number.
    x = x - jnp.max(jnp.where(live, x, -jnp.inf), axis=1, keepdims=True)
    centred = jnp.where(live & (count > 1), x - mean_of(x), 0)
    if scale == "mean":
        return centred
    std = jnp.sqrt(mean_of(jnp.square(centred)))
    # The rounding residue of a tie is no spread: divided by itself it would be an advantage of 1.
    is_tied = std <= _ROUNDING * jnp.finfo(centred.dtype).eps * size
    return jnp.where(is_tied, 0, centred / (std + epsilon))


def credit_matrix(credit: str | Sequence[float] | None, num_stages: int) -> np.ndarray:
    """Lambda `[K, K]`: row k holds the share of each stage's score that stage k is credited with.

    It is 0 for earlier stages. `paper`: RubricEM's for four stages (arXiv 2605.10899, section 3.3).
    `identity`: its own score. `last`: the last stage's score for all, plain group-relative credit.
    `decay`: 1 for itself, 0.8 for the last, 0.5 between; ours. None: paper for four stages, else
    decay. Numbers: K * K, row by row, upper triangular with ones on the diagonal.
    ValueError otherwise.
    """
    if not isinstance(credit, str | None):
        matrix = np.asarray(credit, float)
        if matrix.size != num_stages**2:
            raise ValueError(
                f"stage_credit has {matrix.size} numbers; expected {num_stages**2}, row by "
                f"row for {num_stages} stages"
            )
        matrix = matrix.reshape(num_stages, num_stages)
        if (
            not np.all(np.isfinite(matrix))
            or np.any(np.tril(matrix, -1))
            or np.any(np.diag(matrix) != 1)
        ):
            raise ValueError(
                f"stage_credit is {matrix.tolist()}; expected finite numbers, 1 on the "
                "diagonal (a stage's own score) and 0 below it (earlier stages)"
            )
        return matrix
    name = credit or ("paper" if num_stages == 4 else "decay")
    if name == "paper" and num_stages != 4:
        raise ValueError(
            f"stage_credit paper is defined for 4 stages, there are {num_stages}; expected "
            "identity, last or decay"
        )
    if name == "paper":
        return np.array([[1, 0.4, 0.6, 0.8], [0, 1, 0.4, 0.8], [0, 0, 1, 0.8], [0, 0, 0, 1]])
    if name == "last":
        return np.tile(np.eye(num_stages)[-1], (num_stages, 1))
    if name == "identity":
        return np.eye(num_stages)
    if name != "decay":
        raise ValueError(f"there is no stage_credit {name!r}; expected one of {STAGE_CREDITS}")
    matrix = np.triu(np.full((num_stages, num_stages), 0.5))
    matrix[:, -1] = 0.8
    np.fill_diagonal(matrix, 1)
    return matrix


def stage_advantage(
    scores: Float[Array, "B K"],
    has_stage: Bool[Array, "B K"],
    is_scored: Bool[Array, " B"],
    credit: Float[Array, "K K"],
    group_size: int,
    scale: str,
    epsilon: float = 1e-8,
) -> Float[Array, "B K"]:
    """The advantage of each stage: `G = R @ credit.T`, normalised per stage over the group.

    Only scored rollouts that have the stage count. RubricEM's SS-GRPO (arXiv 2605.10899, section
    3.3; mean_std as there, population std). A missing stage has score 0, with which earlier stages
    are credited, and no advantage of its own. `scale` as in `group_advantage`.
    """
    if scale not in SCALES:
        raise ValueError(f"there is no scale {scale!r} of advantages; expected one of {SCALES}")
    live = has_stage & is_scored[:, None]
    returns = jnp.where(live, scores, 0) @ jnp.asarray(credit, scores.dtype).T
    shape = (-1, group_size, scores.shape[1])
    return _normalised(returns.reshape(shape), live.reshape(shape), scale, epsilon).reshape(
        scores.shape
    )


def spread_stages(
    advantages: Float[Array, "B K"], stage_ids: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Each token's stage's advantage; 0 where `stage_ids` is -1, outside all stages."""
    return jnp.where(
        stage_ids >= 0, jnp.take_along_axis(advantages, jnp.maximum(stage_ids, 0), axis=1), 0
    )


def stage_balance(
    stage_ids: Int[Array, "B T"], mask: Bool[Array, "B T"], num_stages: int
) -> Float[Array, "B T"]:
    """`N / (S N_k)` at the tokens of stage k; 0 elsewhere.

    N counts all unmasked tokens, N_k those of stage k, and S the stages that have any. As a factor
    it turns a mean over all N tokens into the mean over stages of their token means: long stages no
    longer outweigh short ones, and tokens outside all stages weigh nothing.
    """
    live = mask & (stage_ids >= 0)
    counts = jnp.sum(
        (stage_ids[..., None] == jnp.arange(num_stages)) & live[..., None], axis=(0, 1)
    )
    present = jnp.maximum(jnp.sum(counts > 0), 1)
    factor = jnp.sum(mask) / (present * jnp.maximum(counts, 1))
    return jnp.where(live, factor[jnp.maximum(stage_ids, 0)], 0)
