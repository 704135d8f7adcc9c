"""Prompts: what is read, what is refused and by which words, and that every prompt is used once an
epoch.
"""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdjax.config import MINI_PAIR, DataConfig
from opdjax.data.prompt_rows import Prompt, read_prompts, require_field
from opdjax.data.prompts import (
    PromptSet,
    _with_context,
    collate,
    encode_prompts,
    indices_at,
    load_rows,
    messages_of,
)
from opdjax.data.sources import DataError
from opdjax.data.tokenizer import load_tokenizer

RAW = DataConfig(format="raw")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINI_PAIR / "student")


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text(
            "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
            encoding="utf-8",
        )
        return str(path)

    return write


def encode(rows, data, tokenizer):
    return encode_prompts(
        [Prompt(row) if isinstance(row, str) else row for row in rows], data, tokenizer, tokenizer
    )


# Reading


def test_rows_of_every_form(write):
    source = write(
        {"prompt": "1+1=", "answer": "2", "reference": "1+1=2"},
        {
            "prompt": [
                {"role": "system", "content": "be short"},
                {"role": "user", "content": "né 你好", "name": "x"},
            ]
        },
        "",
        {"prompt": "n", "answer": 42, "references": ["a", "b"], "other": None},
        {"prompt": "f", "answer": 0.5, "references": []},
        "   ",
    )
    assert read_prompts(source) == [
        Prompt("1+1=", "2", ("1+1=2",)),
        Prompt(
            (
                {"role": "system", "content": "be short"},
                {"role": "user", "content": "né 你好", "name": "x"},
            )
        ),
        Prompt("n", "42", ("a", "b")),
        Prompt("f", "0.5"),
    ]


def test_files_that_people_have_need_no_prefix(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")

    write(
        "rows.json", '[{"prompt": "a, \\"b\\"", "answer": 1},\n{"prompt": "né\\n", "answer": "2"}]'
    )
    write("rows.csv", 'answer,prompt\r\n1,"a, ""b"""\r\n2,"né\n"\r\n\r\n')
    expected = [Prompt('a, "b"', "1"), Prompt("né\n", "2")]
    for name in ("rows.json", "rows.csv"):
        assert read_prompts(str(tmp_path / name)) == expected, name
    write("rows.csv", "answer,prompt\n1\n")
    with pytest.raises(
        DataError, match=r"rows\.csv, line 2: .* a cell for each column.*; .*--data\.skip-bad-rows"
    ):
        read_prompts(str(tmp_path / "rows.csv"))


def test_bad_rows_are_skipped_and_counted_by_option(write, tokenizer, capsys):
    source = write({"prompt": "1+1="}, *MALFORMED)
    assert read_prompts(source, skips_bad_rows=True) == [Prompt("1+1=")]
    assert f"skipped {len(MALFORMED)} bad rows (data.skip_bad_rows), first {source}, line 2" in (
        capsys.readouterr().out
    )
    rows = [Prompt("1+1="), Prompt("\ud800")]
    found = encode_prompts(rows, DataConfig(source="x", skip_bad_rows=True), tokenizer, tokenizer)
    assert [len(found), found.num_skipped] == [1, 1]
    assert "half a surrogate pair" in found.skipped[0]


def test_the_built_in_task_as_a_source():
    rows = read_prompts("arithmetic:validation")
    assert len(rows) == 1024
    for row in rows[:20]:
        assert row.references[0].endswith(f"#{row.answer}")
        assert eval(row.prompt.removesuffix("=")) == int(row.answer)
    assert read_prompts("arithmetic:validation[:3]") == rows[:3]
    assert read_prompts("arithmetic:validation[1020:]") == rows[1020:]


MALFORMED = {
    '{"prompt": "a"': "not valid JSON (Expecting ',' delimiter at column 15)",
    "prompt: a": "not valid JSON (Expecting value at column 1)",
    '["a"]': "expected an object with named values, found list",
    '"a"': "expected an object with named values, found str",
    '{"question": "a", "answer": 1}': "there is no column 'prompt'; found ['answer', 'question']. "
    "Name the right one in data.columns, such as prompt=COLUMN",
    '{"prompt": ""}': "'prompt' is ''; expected a non-empty string or a list of {role, content} "
    "messages",
    '{"prompt": 3}': "'prompt' is 3; expected a non-empty string",
    '{"prompt": null}': "'prompt' is None; expected a non-empty string",
    '{"prompt": []}': "'prompt' is []; expected a non-empty string",
    '{"prompt": ["a"]}': "'prompt' is ['a']; expected a non-empty string",
    '{"prompt": [{"content": "a"}]}': "'prompt' is [{'content': 'a'}]; expected a non-empty string",
    '{"prompt": [{"role": "user"}]}': "'prompt.0.content' is null; expected a text, or calls of "
    "tools beside it",
    '{"prompt": [{"role": "user", "content": 3}]}': "'prompt.0.content' is 3; expected a text",
    '{"prompt": "a", "answer": ["2"]}': "'answer' is ['2']; expected a string or a number",
    '{"prompt": "a", "answer": true}': "'answer' is True; expected a string or a number",
    '{"prompt": "a", "references": [1]}': "the reference answers 'references' are [1]; expected a "
    "string, a list of strings or messages",
    '{"prompt": "a", "reference": 1}': "the reference answers 'reference' are 1; expected a "
    "string, a list of strings or messages",
    '{"prompt": "a", "references": [{"role": "user", "content": "b"}]}': "or messages with an "
    "assistant's turn",
    '{"prompt": [{"role": "assistant", "content": "b"}]}': "'prompt' holds only an assistant's "
    "turn",
}


def test_a_last_turn_that_is_no_text_is_named_where_references_are_needed(write):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    source = write({"prompt": [{"role": "user", "content": "1+1="}, calls]})
    with pytest.raises(DataError, match=r"prompt 0 .* its last turn holds 'tool_calls'"):
        require_field(read_prompts(source), "references", {}, source, "they are trained on")
    source = write({"prompt": "1+1=", "references": [calls]})
    with pytest.raises(DataError, match="the last turn of 'references' holds 'tool_calls'"):
        read_prompts(source)


def test_a_reference_ends_at_its_first_stop_token(tokenizer, write):
    texts = ["1+1=2<|im_end|>\n3", "<|im_end|>", "1+1=2"]
    data = DataConfig(write({"prompt": "1+1=", "references": texts}))
    (row,) = load_rows(data, tokenizer, [tokenizer.eos_token_id])
    assert row.references == ("1+1=2", "1+1=2")
    # A stop token that is a word is cut as an id, since words may be parts of others.
    (row,) = load_rows(data, tokenizer, tokenizer.encode("2"))
    assert row.references == tuple(texts)


def test_a_model_behind_an_api_is_not_asked_without_the_tools():
    with pytest.raises(DataError, match="rows with 'tools', which a model behind an API"):
        messages_of(Prompt("1+1=", tools=({"name": "add"},)), DataConfig())


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_row_is_named_by_file_and_line(write, line):
    source = write({"prompt": "fine"}, "", line, {"prompt": "fine"})
    with pytest.raises(DataError) as error:
        read_prompts(source)
    assert str(error.value).startswith(f"{source}, line 3: ")
    assert MALFORMED[line] in str(error.value)


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + '{"prompt": "né"}'.encode("latin-1"))
    with pytest.raises(
        DataError, match=r"latin\.jsonl, line 2: not UTF-8 text \(invalid continuation byte\)"
    ):
        read_prompts(str(path))


def test_a_byte_order_mark_and_dos_line_ends_are_read(tmp_path):
    path = tmp_path / "dos.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [row.prompt for row in read_prompts(str(path))] == ["a", "b"]


@pytest.mark.parametrize("lines", [(), ("", "  ", "")])
def test_an_empty_file_is_refused(write, lines):
    source = write(*lines)
    with pytest.raises(DataError, match=r"data\.jsonl holds no prompts"):
        read_prompts(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/rows.jsonl", "data source /nowhere/rows.jsonl does not exist"),
        (
            "gsm8k",
            r"data source 'gsm8k' is not known; expected arithmetic:SPLIT, stories:SPLIT, "
            r"instructions:SPLIT, tasks:NAME#SPLIT, "
            r"a \.jsonl, \.json, \.csv or \.parquet file, parquet:PATH, hf:",
        ),
        (
            "huggingface:gsm8k",
            r"data source 'huggingface:gsm8k' is not known; expected arithmetic:SPLIT",
        ),
        ("rows.csv", r"data source rows\.csv does not exist"),
        ("rows.xlsx", r"data source 'rows\.xlsx' is not known"),
        ("arithmetic:test[:10%]", r"arithmetic has no split 'test\[:10%\]'"),
        (
            "arithmetic:tset",
            r"arithmetic has no split 'tset'; expected one of \['test', 'train', 'validation'\]",
        ),
    ],
)
def test_an_unknown_source_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(source)


# Encoding


def test_the_format_is_wrapped_around_strings_alone(tokenizer):
    rows = [Prompt("1+1="), Prompt(({"role": "user", "content": "1+1="},))]
    found = encode(rows, DataConfig(prompt_format="7;{prompt}"), tokenizer)
    texts = [tokenizer.decode(ids) for ids in found.student_ids]
    assert texts[0] == "<|im_start|>user\n7;1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1] == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert found.prompts == tuple(rows)


def test_other_braces_are_left_alone(tokenizer):
    found = encode(["1{2}3"], dataclasses.replace(RAW, prompt_format="{}4{prompt}{0}"), tokenizer)
    assert found.student_ids[0] == tuple(tokenizer.encode("{}41{2}3{0}"))


SHOWN = DataConfig(format="raw", teacher_prompt_format="{reference}#{answer};{prompt}{0}")


def test_the_teacher_is_shown_the_answer_and_a_reference_around_the_prompt(tokenizer):
    rows = [Prompt("1+1=", "2", ("1+1=2", "3")), Prompt("2+3=", "5", ("2+3=5",))]
    found = encode(rows, dataclasses.replace(SHOWN, prompt_format="7;{prompt}"), tokenizer)
    assert [tokenizer.decode(ids) for ids in found.student_ids] == ["7;1+1=", "7;2+3="]
    # In place of the student's format, not around it; what is no field of a row stays.
    expected = ["1+1=2#2;1+1={0}", "2+3=5#5;2+3={0}"]
    assert found.teacher_ids == tuple(tuple(tokenizer.encode(text)) for text in expected)
    assert (
        encode(
            rows, dataclasses.replace(SHOWN, teacher_prompt_format="{prompt}"), tokenizer
        ).teacher_ids
        is None
    )


def test_braces_in_what_is_shown_are_text(tokenizer):
    row = Prompt("{answer}", "{reference}", ("{prompt}",))
    view = _with_context(row, "{prompt}+{answer}+{reference}")
    assert view == "{answer}+{reference}+{prompt}"


def test_in_messages_the_last_turn_of_the_user_shows_it(tokenizer):
    turns = [
        ("system", "7"),
        ("user", "1+1="),
        ("assistant", "2"),
        ("user", "2+3="),
        ("assistant", "5"),
    ]
    row = Prompt(
        tuple({"role": role, "content": content} for role, content in turns[:4]), "5", ("2+3=5",)
    )
    data = DataConfig(prompt_format="8{prompt}", teacher_prompt_format="{prompt}{reference}")
    found = encode([row], data, tokenizer)
    student, teacher = (tokenizer.decode(ids[0]) for ids in (found.student_ids, found.teacher_ids))
    assert student.count("2+3=") == 1
    assert teacher == student.replace("2+3=", "2+3=2+3=5")
    assert row.prompt[3]["content"] == "2+3="
    # Text parts become one.
    parts = [{"type": "text", "text": text} for text in ("2+", "3=")]
    wrapped = _with_context(Prompt(({"role": "user", "content": parts},), "5"), "{answer}#{prompt}")
    assert wrapped[0]["content"] == [{"type": "text", "text": "5#2+3="}]
    with pytest.raises(
        DataError,
        match=r"prompt 0 of .* has no user's turn, which data\.teacher_prompt_format wraps",
    ):
        encode([dataclasses.replace(row, prompt=row.prompt[:1])], data, tokenizer)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            Prompt("1+1=", "2"),
            {},
            r"prompt 1 of x\.jsonl has no 'references' \(1 such rows\); .*"
            r"data\.columns \(reference=COLUMN\), or take",
        ),
        (Prompt("1+1=", "2", (" ",)), {"columns": ("reference=r",)}, "prompt 1 of .* has no 'r'"),
        (
            Prompt("1+1=", None, ("2",)),
            {},
            r"has no 'answer' .*name its column in data\.columns \(answer=COLUMN\), or take "
            r"\{answer\} out",
        ),
        (Prompt("1+1=", "", ("2",)), {"columns": ("answer=a.b",)}, r"has no 'a\.b'"),
    ],
)
def test_a_row_without_what_the_teacher_is_to_be_shown_is_named(tokenizer, row, columns, message):
    fine = Prompt("2+3=", "5", ("2+3=5",))
    with pytest.raises(DataError, match=message):
        encode([fine, row], dataclasses.replace(SHOWN, source="x.jsonl", **columns), tokenizer)
    # A format that does not show it does not need it.
    assert (
        len(
            encode(
                [fine, row],
                dataclasses.replace(SHOWN, teacher_prompt_format="7{prompt}"),
                tokenizer,
            )
        )
        == 2
    )


def test_the_limit_holds_for_what_the_teacher_is_shown(tokenizer):
    rows = [Prompt("1+1=", "2", ("2",)), Prompt("1+1=", "2", ("1+1=2+0",))]
    data = dataclasses.replace(
        SHOWN, teacher_prompt_format="{prompt}{reference}", max_prompt_length=10
    )
    found = encode(rows, data, tokenizer)
    assert [row.references for row in found.prompts] == [("2",)]
    assert found.skipped[0].endswith("with 11 tokens: '1+1='")


def test_what_the_teacher_is_shown_is_part_of_the_digest(tokenizer):
    rows = [Prompt("1+1=", "2", ("1+1=2",))]
    views = [
        SHOWN,
        RAW,
        *(
            dataclasses.replace(SHOWN, teacher_prompt_format=text)
            for text in ("{prompt}{answer}", "{prompt}{reference}")
        ),
    ]
    assert len({encode(rows, data, tokenizer).digest for data in views}) == len(views)


def test_overlong_prompts_are_skipped_and_counted(tokenizer):
    rows = ["1+1=", "1+1+1=", "12+13=", "1+2+3+4="]
    found = encode(rows, dataclasses.replace(RAW, max_prompt_length=6), tokenizer)
    # Lengths 4, 6, 4, 8: the limit itself is allowed.
    assert [row.prompt for row in found.prompts] == ["1+1=", "1+1+1=", "12+13="]
    assert [len(ids) for ids in found.student_ids] == [4, 6, 4]
    assert found.num_skipped == 1
    assert found.skipped[0].startswith("prompt ")
    assert len(found) == 3


def test_the_longer_view_counts(tokenizer):
    data = DataConfig(format="raw", teacher_format="chat", max_prompt_length=13)
    # As chat, 1+1= has 12 tokens and 1+1+1= has 14.
    found = encode(["1+1=", "1+1+1="], data, tokenizer)
    assert len(found) == found.num_skipped == 1


def test_nothing_left_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"has no prompt of at most 3 tokens \(2 rows read\)"):
        encode(["1+1=", "1+2="], dataclasses.replace(RAW, max_prompt_length=3), tokenizer)


def test_what_cannot_be_rendered_is_named_by_its_prompt(tokenizer):
    rows = [Prompt("1+1="), Prompt(({"role": "user", "content": "1"},))]
    data = dataclasses.replace(RAW, source="x.jsonl")
    with pytest.raises(
        DataError, match=r"prompt 1 of x\.jsonl: a prompt made of messages needs format 'chat'"
    ):
        encode(rows, data, tokenizer)
    with pytest.raises(DataError, match=r"prompt 1 of x\.jsonl has no tokens: ''"):
        encode(["1+1=", ""], data, tokenizer)


def test_the_teacher_sees_a_view_of_its_own_only_where_it_differs(tokenizer):
    rows = ["1+1=", "2+3="]
    assert (
        encode(rows, DataConfig(format="raw", teacher_format="raw"), tokenizer).teacher_ids is None
    )
    assert (
        encode(
            rows, DataConfig(format="no_thinking", teacher_format="no_thinking"), tokenizer
        ).teacher_ids
        is None
    )
    assert encode(rows, DataConfig(format="no_thinking"), tokenizer).teacher_ids is None

    raw = encode(rows, RAW, tokenizer).student_ids
    chat = encode(rows, DataConfig(), tokenizer).student_ids
    quiet = encode(rows, DataConfig(format="no_thinking"), tokenizer).student_ids
    assert len({raw, chat, quiet}) == 3
    mixed = encode(rows, DataConfig(format="raw", teacher_format="chat"), tokenizer)
    assert (mixed.student_ids, mixed.teacher_ids) == (raw, chat)
    mixed = encode(rows, DataConfig(format="no_thinking", teacher_format="thinking"), tokenizer)
    assert (mixed.student_ids, mixed.teacher_ids) == (quiet, chat)


def test_the_system_prompt_goes_to_the_chat_view_alone(tokenizer):
    found = encode(
        ["1+1="], DataConfig(format="raw", teacher_format="chat", system_prompt="12"), tokenizer
    )
    assert tokenizer.decode(found.student_ids[0]) == "1+1="
    assert tokenizer.decode(found.teacher_ids[0]).startswith(
        "<|im_start|>system\n12<|im_end|>\n<|im_start|>user\n1+1="
    )


def test_the_digest_tells_what_a_run_was_trained_on(tokenizer):
    rows = [Prompt("1+1=", "2", ("1+1=2",)), Prompt("2+3=", "5")]
    base = encode(rows, RAW, tokenizer).digest
    assert encode(rows, RAW, tokenizer).digest == base
    changed = [
        encode([rows[0], Prompt("2+4=", "5")], RAW, tokenizer).digest,
        encode([rows[0], Prompt("2+3=", "6")], RAW, tokenizer).digest,
        encode([Prompt("1+1=", "2", ("2=1+1",)), rows[1]], RAW, tokenizer).digest,
        encode(rows[::-1], RAW, tokenizer).digest,
        encode(rows[:1], RAW, tokenizer).digest,
        encode(rows, DataConfig(), tokenizer).digest,
        encode(rows, DataConfig(format="no_thinking"), tokenizer).digest,
        encode(rows, DataConfig(format="raw", teacher_format="chat"), tokenizer).digest,
        encode(rows, dataclasses.replace(RAW, prompt_format="{prompt} "), tokenizer).digest,
    ]
    assert len({base, *changed}) == 1 + len(changed)


# Order


def stream(length, num_prompts, seed):
    """The prompts of `length` steps of one prompt each."""
    return np.concatenate([indices_at(step, 1, num_prompts, seed) for step in range(length)])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**31 - 1))
def test_every_prompt_once_an_epoch_whatever_the_step_size(num_prompts, per_step, seed):
    num_steps = -(-3 * num_prompts // per_step)
    # A step is computed by itself, the last one first; steps that straddle one or more epochs are
    # among them.
    steps = [indices_at(step, per_step, num_prompts, seed) for step in reversed(range(num_steps))][
        ::-1
    ]
    assert {len(step) for step in steps} == {per_step}
    drawn = np.concatenate(steps)
    for epoch in range(3):
        assert sorted(drawn[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(
            range(num_prompts)
        )
    np.testing.assert_array_equal(drawn, stream(len(drawn), num_prompts, seed))


def test_a_step_that_straddles_epochs_by_hand():
    order = stream(10, 5, seed=3)
    np.testing.assert_array_equal(indices_at(1, 4, 5, 3), [order[4], order[5], order[6], order[7]])
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        tuple(stream(60, 20, seed)[20 * epoch : 20 * (epoch + 1)])
        for seed in range(4)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 12
    # Not a rotation or a reversal of one another either: a place holds a different prompt nearly
    # always.
    agreements = [np.mean(np.array(a) == np.array(b)) for a, b in itertools.combinations(orders, 2)]
    assert np.mean(agreements) == pytest.approx(1 / 20, abs=0.03)


# Batches


def prompt_set(lengths, teacher_lengths=None):
    """Prompts of given lengths; token n of prompt i is 100 i + n + 1 for the student and 1000 more
    for the teacher.
    """
    ids, teacher_ids = (
        None
        if wanted is None
        else tuple(
            tuple(range(first + 100 * i + 1, first + 100 * i + n + 1)) for i, n in enumerate(wanted)
        )
        for first, wanted in ((0, lengths), (1000, teacher_lengths))
    )
    return PromptSet(tuple(Prompt(f"p{i}") for i in range(len(lengths))), ids, teacher_ids, 0, "")


def test_prompts_end_in_the_last_column():
    batch = collate(prompt_set([2, 3, 1]), np.array([2, 0]))
    np.testing.assert_array_equal(batch.tokens[0], [0] * 15 + [201])
    np.testing.assert_array_equal(batch.tokens[1], [0] * 14 + [1, 2])
    np.testing.assert_array_equal(batch.mask, [[False] * 15 + [True], [False] * 14 + [True] * 2])
    np.testing.assert_array_equal(batch.prompt_id, [2, 0])
    assert batch.teacher_tokens is None
    assert batch.teacher_mask is None


@pytest.mark.parametrize(
    ("longest", "width"),
    [
        (1, 16),
        (16, 16),
        (17, 32),
        (112, 112),
        (113, 128),
        (128, 128),
        (129, 256),
        (256, 256),
        (257, 384),
        (1000, 1024),
    ],
)
def test_widths_come_in_few_sizes(longest, width):
    batch = collate(prompt_set([1, longest]), np.array([0, 1]))
    assert batch.tokens.shape[1] == width
    np.testing.assert_array_equal(batch.mask.sum(axis=1), [1, longest])


def test_the_width_is_that_of_the_batch_alone():
    prompts = prompt_set([5, 40])
    assert collate(prompts, np.array([0])).tokens.shape[1] == 16
    assert collate(prompts, np.array([0, 1])).tokens.shape[1] == 48


def test_filler_rows_are_empty():
    batch = collate(prompt_set([2, 3]), np.array([1]), num_rows=3)
    np.testing.assert_array_equal(batch.tokens, [[0] * 13 + [101, 102, 103], [0] * 16, [0] * 16])
    np.testing.assert_array_equal(batch.mask.sum(axis=1), [3, 0, 0])
    np.testing.assert_array_equal(batch.prompt_id, [1, 0, 0])


def test_the_teacher_view_is_padded_by_itself():
    batch = collate(prompt_set([2, 20], [18, 1]), np.array([1, 0]), num_rows=3)
    assert batch.tokens.shape == (3, 32)
    assert batch.teacher_tokens.shape == (3, 32)
    np.testing.assert_array_equal(batch.teacher_tokens[0], [0] * 31 + [1101])
    np.testing.assert_array_equal(batch.teacher_tokens[1], [0] * 14 + list(range(1001, 1019)))
    np.testing.assert_array_equal(batch.teacher_mask.sum(axis=1), [1, 18, 0])
