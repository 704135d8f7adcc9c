"""Functions of vocabulary tiles as compiled functions of logits."""

import jax

from opdjax.ops.tile import VocabTile


def on_logits(function, static_argnums=()):
    """`function(student tile, teacher tile, ...)`, compiled, of logits [V] or [n, V] of both sides.

    Of logits [V] it returns the result of that one token.
    """

    def call(student, teacher, *rest):
        result = function(
            *(VocabTile(x.reshape(-1, x.shape[-1])) for x in (student, teacher)), *rest
        )
        return result if student.ndim > 1 else jax.tree.map(lambda x: x[0], result)

    compiled = jax.jit(call, static_argnums=static_argnums)
    return lambda student, teacher, *rest: compiled(
        *map(jax.numpy.asarray, (student, teacher)), *rest
    )
