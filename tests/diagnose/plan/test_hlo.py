"""Reading a compiled module, on a piece of one for TPU (layouts and configs cut short)."""

import pathlib

from opdjax.diagnose.plan.hlo import collectives, most_rows

MODULE = (pathlib.Path(__file__).parent / "module.hlo").read_text()


def test_collectives_are_counted_once_with_their_bytes_and_loops():
    found = {
        (each.kind, each.num_bytes, each.loop, each.times, each.is_open)
        for each in collectives(MODULE)
    }
    assert found == {
        # Spread over two fusions of the inner loop: 28 layers in each of 4 micro-batches.
        (
            "all-gather",
            1024 * 1024 * 2,
            "jit(update)/while > jit(update)/while/body/layers",
            112,
            False,
        ),
        (
            "reduce-scatter",
            32000 * 1024 * 4,
            "jit(update)/while",
            4,
            False,
        ),  # what goes in is the larger side
        (
            "all-reduce",
            512 * 4,
            "jit(update)/tiles",
            1,
            True,
        ),  # as many rounds as there are tiles of live tokens
        (
            "all-gather",
            512 * 4,
            None,
            1,
            False,
        ),  # a start beside its done; its operand is no part of the result
        ("all-reduce", 4 + 64 * 4, None, 1, False),
    }
    assert len(collectives(MODULE)) == len(found) + 1  # two of one shape may share a channel
    assert {each.operation for each in collectives(MODULE)} >= {
        "jit(update)/head",
        "jit(update)/while/body/psum_scatter",
    }


def test_logits_are_told_from_heads():
    assert most_rows(MODULE, {32000}, {1024}) == 512
    assert (
        most_rows(MODULE.replace("f32[512,32000]", "f32[4,2,1024,32000]"), {32000}, {1024}) == 8192
    )
    assert (
        most_rows(MODULE.replace("f32[512,32000]", "f32[1024,32000]"), {32000}, {1024}) == 0
    )  # a transposed unembedding
