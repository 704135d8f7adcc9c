"""The tiled pass with the vocabulary sharded over `tensor` and the head over `fsdp`: every recipe,
against one device.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opdjax.engine.decoding import Decoding, draw_next, row_keys
from opdjax.engine.step_metrics import observed
from opdjax.estimators import bind
from opdjax.ops.sharding import ROW_AXES, make_mesh
from opdjax.ops.tile import Head, VocabTile
from opdjax.ops.vocab import TokenInputs, tiled_loss, tiled_stats

B, T, V, D, U = 8, 5, 16, 8, 6
RECIPES = {
    "opd": ("opd", {}),
    "opd, more draws": ("opd", {"extra_draws": 3, "reward_floor": -1.0}),
    "opd, power": ("opd", {"power_alpha": 0.5, "extra_draws": 1}),
    "vopd": ("vopd", {}),
    "vopd, student's top k": ("vopd", {"baseline": "student_topk", "support_top_k": 5}),
    "vopd, optimal": ("vopd", {"baseline": "optimal"}),
    "reverse": ("full_kl", {}),
    "jsd": ("full_kl", {"divergence": "jsd", "beta": 0.3}),
    "skew": ("full_kl", {"divergence": "skew_forward"}),
    "top k": ("topk_kl", {"support_top_k": 3}),
    "top k, wider than a slice": (
        "topk_kl",
        {
            "support_top_k": 11,
            "support": "teacher",
            "divergence": "forward",
            "renormalize": "teacher",
        },
    ),
    "top k, tail": (
        "topk_kl",
        {"support_top_k": 3, "renormalize": "none", "outside": "tail", "support": "union"},
    ),
    "top k, floor": ("topk_kl", {"support_top_k": 3, "renormalize": "none", "outside": "floor"}),
    "top k, weighted": (
        "topk_kl",
        {
            "support_top_k": 3,
            "weight": "p_student",
            "renormalize": "none",
            "support": "symmetric_difference",
        },
    ),
    "npd": ("npd", {"support_top_k": 5, "kd_weight": 0.7}),
    "npd, reverse": ("npd", {"support_top_k": 3, "renormalize": "both", "divergence": "reverse"}),
    "npd, stored": ("npd", {"support_top_k": 5, "kd_weight": 0.7}),
    "sft": ("sft", {}),
}
ALONE = {"npd, stored", "sft"}  # without a teacher model
# Together they use everything that a tile offers; the others run with the long tests.
SOME = {"opd, more draws", "top k, wider than a slice"}
MESHES = {"2x2x2": (2, 2, 2), "1x2x4": (1, 2, 4), "2x4x1": (2, 4, 1)}


def problem(teacher_rows=V, bias=True):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    head = Head(normal(V, D), normal(V) if bias else None, softcap=4.0, valid_vocab=V - 3)
    teacher_head = Head(normal(teacher_rows, U), temperature=1.3, valid_vocab=V - 3)
    weights = jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) < 0.7)).at[:, 0].set(0)
    columns = TokenInputs(
        jnp.asarray(rng.integers(0, V - 3, (B, T))),
        uniforms=jnp.asarray(rng.random((B, T, 3))),
        teacher_top_ids=jnp.asarray(
            rng.permuted(np.tile(np.arange(V - 3), (B, T, 1)), axis=2)[:, :, :6]
        ),
        teacher_top_logprobs=jnp.asarray(np.log(rng.dirichlet(np.ones(7), (B, T))[:, :, :6])),
        is_observed=jnp.ones((B, T), bool),
    )
    return normal(B, T, D), head, weights, columns, (normal(B, T, U), teacher_head)


def run(token_loss, args, mesh=None):
    loss = partial(tiled_loss, token_loss, tile=3, mesh=mesh)
    (value, outputs), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*args)
    return jax.device_get((value, outputs, grads))


@pytest.mark.parametrize(
    "mesh", [pytest.param(key, marks=[] if key == "2x2x2" else pytest.mark.long) for key in MESHES]
)
@pytest.mark.parametrize(
    "name", [pytest.param(key, marks=[] if key in SOME else pytest.mark.long) for key in RECIPES]
)
def test_every_recipe_equals_one_device(x64, name, mesh):
    recipe, options = RECIPES[name]
    token_loss = observed(bind(recipe, options).token_loss)
    args = problem()
    if name in ALONE:
        args = (*args[:4], None)
    expected, actual = run(token_loss, args), run(token_loss, args, make_mesh(*MESHES[mesh]))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), actual, expected)


@pytest.mark.parametrize("teacher_rows", [V - 3, V + 6])
def test_a_teacher_whose_embedding_is_padded_otherwise(x64, teacher_rows):
    token_loss = bind("full_kl").token_loss
    args = problem(teacher_rows, bias=False)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-10),
        run(token_loss, args, make_mesh(2, 2, 2)),
        run(token_loss, args),
    )


def test_statistics(x64):
    hidden, head, weights, columns, teacher = problem()

    def stat(student, teacher, row):
        drawn = student.draw(row.uniforms)
        return {
            "top": student.top_k(7),
            "drawn": drawn,
            "kl": student.expect(student.logprobs - teacher.logprobs),
            "at": teacher.logprob(drawn),
        }

    of = lambda mesh: jax.jit(partial(tiled_stats, stat, tile=3, mesh=mesh))(
        hidden, head, weights != 0, columns, teacher
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), of(make_mesh(2, 2, 2)), of(None))


def test_no_id_of_probability_zero_is_drawn_at_the_edge_of_a_slice(x64):
    logits = np.where(np.arange(V) % 4 == 1, 0.0, -np.inf)[None].repeat(8, 0)
    uniform = np.linspace(0, 1 - 1e-12, 8)[:, None]
    mesh = make_mesh(1, 1, 4)
    draw = lambda x, u: VocabTile(x, "tensor").draw(u)
    draw = jax.shard_map(draw, mesh=mesh, in_specs=(P(None, "tensor"), P()), out_specs=P())
    drawn = np.asarray(jax.jit(draw)(logits, uniform))
    assert drawn[:, 0].tolist() == [1, 1, 5, 5, 9, 9, 13, 13]


def test_a_recipe_that_sums_over_its_own_slice_only_is_refused():
    def forgets(student, teacher, row):
        return jnp.sum(jnp.exp(student.logprobs), axis=-1), None

    with pytest.raises(ValueError, match="varying|replicated|out_specs|VJP"):
        run(forgets, problem(), make_mesh(2, 2, 2))


def test_a_head_that_the_mesh_does_not_divide_is_refused():
    hidden, _, weights, columns, _ = problem()
    with pytest.raises(ValueError, match="10 rows, which mesh.tensor 4 does not divide"):
        tiled_loss(
            lambda s, t, row: (s.logprob(row.tokens), None),
            hidden,
            Head(jnp.ones((10, D))),
            weights,
            columns,
            tile=4,
            mesh=make_mesh(1, 2, 4),
        )


COLLECTIVE = re.compile(
    r"= (\S+) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)


def test_collectives_inside_the_loop_are_of_a_tiles_tokens_not_of_its_logits():
    """`vopd` with k = 5 on 2x2x2: the head is gathered and its gradient reduced outside of the
    loop; inside, collectives are a few numbers per token.
    """
    mesh, length, vocab, width, tile = make_mesh(2, 2, 2), 64, 1000, 48, 16
    recipe, options = "vopd", {"baseline": "student_topk", "support_top_k": 5}
    token_loss = bind(recipe, options).token_loss
    shape = lambda spec, *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(
        dims, dtype, sharding=NamedSharding(mesh, spec)
    )
    rows = P(ROW_AXES)
    hidden = shape(rows, 8, length, width)
    weights = shape(rows, 8, length)
    tokens = shape(rows, 8, length, dtype=jnp.int32)
    head = Head(shape(P("tensor", "fsdp"), vocab, width))
    loss = lambda h, k, w, c, t, tk: tiled_loss(
        token_loss, h, k, w, TokenInputs(c), (t, tk), tile=tile, mesh=mesh
    )[0]
    text = (
        jax.jit(jax.grad(loss, (0, 1)))
        .lower(hidden, head, weights, tokens, hidden, head)
        .compile()
        .as_text()
    )
    assert not re.search(
        rf"\[(\d+,)*({8 * length}|{2 * length}),({vocab}|{vocab // 2})\]", text
    )  # no [N, V]
    assert not re.search(rf"\[{tile},{vocab}\]", text)  # nor a whole tile's logits
    bodies = [
        part
        for part in re.split(r"\n(?=%?\S+ \(.*\) -> .* \{\n)", text)
        if "while_body" in part or "region" in part.split("(")[0]
    ]
    sent = [
        found for body in bodies for found in COLLECTIVE.finditer(body) if f"[{tile}" in found[1]
    ]
    assert sent
    for found in sent:
        sizes = [
            int(np.prod([int(d) for d in dims.split(",") if d]))
            for dims in re.findall(r"\[([\d,]*)\]", found[1])
        ]
        assert max(sizes) <= tile * 2 * 5
    assert re.search(
        rf"= f32\[{vocab // 2},{width // 2}\]\S* (reduce-scatter|all-reduce|dynamic-slice|fusion)",
        text,
    )


@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 0.0}, {"top_k": 6, "top_p": 0.8, "min_p": 0.02}], ids=str
)
def test_a_token_is_drawn_from_slices_as_from_the_whole(filters):
    decoding = Decoding(8, (0,), **filters)
    hidden, head = problem()[:2]
    hidden = hidden[:, 0].astype(jnp.float32)
    head = jax.tree.map(lambda x: x.astype(jnp.float32), head)
    keys, position = row_keys(3, 0, jnp.arange(B), jnp.zeros(B, int), 0), jnp.arange(B)
    of = lambda mesh: jax.jit(draw_next, static_argnums=(4, 5))(
        head, hidden, keys, position, decoding, mesh
    )
    expected, actual = of(None), of(make_mesh(2, 2, 2))
    np.testing.assert_array_equal(actual[0], expected[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), actual[1:], expected[1:])
