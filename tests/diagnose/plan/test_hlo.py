"""Reading a part of a module compiled for TPU (layouts and configs are shortened)."""

import pathlib

from opdjax.diagnose.plan.hlo import collectives, most_rows

MODULE = (pathlib.Path(__file__).parent / "module.hlo").read_text()


def test_collectives_are_counted_once_with_their_bytes_and_loops():
    loop = "jit(update)/while"
    found = {
        (each.kind, each.num_bytes, each.loop, each.times, each.is_open)
        for each in collectives(MODULE)
    }
    assert found == {
        # In two fusions of the inner loop: 28 layers in each of 4 micro-batches.
        ("all-gather", 1024 * 1024 * 2, f"{loop} > {loop}/body/layers", 112, False),
        # The operand is larger than the result.
        ("reduce-scatter", 32000 * 1024 * 4, loop, 4, False),
        # One round for each tile of live tokens.
        ("all-reduce", 512 * 4, "jit(update)/tiles", 1, True),
        # A start and a done; the start returns its operand, which does not count.
        ("all-gather", 512 * 4, None, 1, False),
        ("all-reduce", 4 + 64 * 4, None, 1, False),
    }
    assert len(collectives(MODULE)) == len(found) + 1  # two of one shape may share a channel


def test_heads_are_not_counted_as_logits():
    assert most_rows(MODULE, {32000}, {1024}) == 512
    for shape, expected in (
        ("f32[4,2,1024,32000]", 8192),
        ("f32[1024,32000]", 0),  # a transposed head
    ):
        assert most_rows(MODULE.replace("f32[512,32000]", shape), {32000}, {1024}) == expected
