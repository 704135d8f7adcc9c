"""The index of a teacher's answers: what is read is what was written, whoever was killed in
between, and nothing damaged is believed.
"""

import hashlib
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opdjax.config import MINI_PAIR, DataConfig
from opdjax.config.validation import ConfigError
from opdjax.data.prompts import encode_prompts, load_rows
from opdjax.data.references import (
    ReferenceAnswer,
    ReferenceIndexError,
    ReferenceMissError,
    add_answers,
    key_of,
    open_index,
    read_index,
    references_of,
)
from opdjax.data.tokenizer import load_tokenizer

TEACHER = {"model": "big", "temperature": 0.7, "top_p": None, "seed": 0}
MESSAGES = ({"role": "system", "content": "be short"}, {"role": "user", "content": "né 你好"})


@pytest.fixture
def path(tmp_path):
    """An index of two prompts with two answers each."""
    path = tmp_path / "deep" / "answers.jsonl"
    open_index(path, TEACHER)
    add_answers(
        path,
        [
            ("1+1=", {0: ReferenceAnswer("2", False), 1: ReferenceAnswer("two", False)}),
            (MESSAGES, {0: ReferenceAnswer("ok", False)}),
        ],
    )
    add_answers(path, [(MESSAGES, {1: ReferenceAnswer("好", False)})])
    return path


# What is asked


def test_a_prompt_is_known_by_what_it_says():
    user = {"role": "user", "content": "1+1="}
    assert key_of("1+1=") == key_of((user,)) == key_of([dict(reversed(user.items()))])
    others = ["1+1", (user, user), ({**user, "role": "system"},), MESSAGES, "1+1=\ud83d", ""]
    assert len({key_of(prompt) for prompt in [*others, "1+1="]}) == len(others) + 1
    # Indexes that lie on disks are found by it.
    assert key_of("1+1=") == hashlib.sha256(b'[{"content": "1+1=", "role": "user"}]').hexdigest()


# Written and read


def test_answers_are_found_by_their_prompt(path):
    index = read_index(path)
    assert index.teacher == TEACHER
    assert index.usable("1+1=") == ("2", "two")
    assert index.usable(MESSAGES) == ("ok", "好")
    assert index.usable("1+2=") == ()
    assert [index.missing(prompt, 3) for prompt in ("1+1=", MESSAGES, "1+2=")] == [
        [2],
        [2],
        [0, 1, 2],
    ]


def test_what_is_empty_or_cut_off_is_kept_but_never_used(path):
    found = {
        4: ReferenceAnswer("", False),
        3: ReferenceAnswer(" \n", False),
        2: ReferenceAnswer("1+1=", True),
        6: ReferenceAnswer("2", False),
        5: ReferenceAnswer("zwei", False),
    }
    add_answers(path, [("1+1=", found)])
    index = read_index(path)
    # In the order of the draws; what is said twice stands twice.
    assert index.usable("1+1=") == ("2", "two", "zwei", "2")
    assert index.missing("1+1=", 8) == [7]


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.text(), st.lists(st.tuples(st.text(), st.booleans()), min_size=1, max_size=3), max_size=4
    )
)
def test_any_text_survives(tmp_path, texts):
    path = tmp_path / "answers.jsonl"
    path.unlink(missing_ok=True)
    answers = {
        prompt: {n: ReferenceAnswer(*answer) for n, answer in enumerate(found)}
        for prompt, found in texts.items()
    }
    open_index(path, TEACHER)
    add_answers(path, answers.items())
    assert read_index(path).answers == {key_of(prompt): found for prompt, found in answers.items()}


# Writers that are killed


def test_a_writer_may_be_killed_at_any_byte(path):
    whole = path.read_bytes()
    rows = whole.splitlines(keepends=True)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        open_index(path, TEACHER)
        kept = [json.loads(row) for row in rows[1 : max(whole[:size].count(b"\n"), 1)]]
        found = {(key, n) for key, answers in read_index(path).answers.items() for n in answers}
        assert found == {(row["key"], one["draw"]) for row in kept for one in row["answers"]}
        add_answers(path, [("3+3=", {0: ReferenceAnswer("6", False)})])
        assert read_index(path).usable("3+3=") == ("6",)


@pytest.mark.parametrize(
    "content",
    [
        b"notes",
        b'{"lr": 1}',
        b'{"lr": 1}\n',
        b"\n",
        b'{"schema": "opdjax.references/2", "teacher": {}}\n',
        b"\xff\xfe\n",
    ],
)
def test_a_file_of_another_kind_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ReferenceIndexError, match=re.escape(str(path))):
        open_index(path, TEACHER)
    assert path.read_bytes() == content


def test_no_file_and_a_directory_are_told_apart(tmp_path):
    with pytest.raises(
        ReferenceMissError,
        match="which does not exist; write the file with opdjax references EXPERIMENT",
    ):
        read_index(tmp_path / "none.jsonl")
    for read in (read_index, lambda path: open_index(path, TEACHER)):
        with pytest.raises(ReferenceIndexError, match="which is a directory"):
            read(tmp_path)


# What is not believed


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{not json}", "expected a JSON object"),
        ("[1, 2]", "expected a JSON object"),
        ("", "expected a JSON object"),
        ("1" * 5000, "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ("{}", "expected a key and a list of answers"),
        ('{"key": 3, "answers": []}', "expected a key and a list of answers"),
        ('{"key": "k", "answers": {}}', "expected a key and a list of answers"),
        ('{"key": "k", "answers": ["text"]}', "with draw, text and is_truncated"),
        ('{"key": "k", "answers": [{"draw": 0, "text": "a"}]}', "with draw, text and is_truncated"),
        (
            '{"key": "k", "answers": [{"draw": true, "text": "a", "is_truncated": false}]}',
            "with draw, text and is_truncated",
        ),
        (
            '{"key": "k", "answers": [{"draw": 0, "text": null, "is_truncated": false}]}',
            "with draw, text and is_truncated",
        ),
        (
            '{"key": "k", "answers": [{"draw": 0, "text": "a", "is_truncated": 0}]}',
            "with draw, text and is_truncated",
        ),
    ],
)
def test_a_damaged_row_is_named(path, row, what):
    with path.open("a") as file:
        file.write(row + "\n")
    expected = (
        rf"{re.escape(str(path))}, line 5 is damaged: .*{what}.* Delete the line, and run opdjax "
        rf"references again"
    )
    with pytest.raises(ReferenceIndexError, match=expected):
        read_index(path)


def test_a_draw_that_stands_there_twice_is_named(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1]]))
    with pytest.raises(
        ReferenceIndexError,
        match=r"line 5 is damaged: draw 0 of the prompt '1\+1=' is also on an earlier line",
    ):
        read_index(path)


def test_another_teacher_is_refused_by_what_differs(path):
    before = path.read_bytes()
    with pytest.raises(ReferenceIndexError) as error:
        open_index(path, TEACHER | {"temperature": 1.0, "reasoning_effort": "low"})
    assert "reasoning_effort: None -> 'low'\n  temperature: 0.7 -> 1.0" in str(error.value)
    assert "seed" not in str(error.value)
    assert path.read_bytes() == before
    assert open_index(path, dict(reversed(TEACHER.items()))).usable("1+1=") == ("2", "two")


# What a run takes


def test_a_miss_names_prompt_key_file_and_numbers(path):
    add_answers(path, [("2+2=", {0: ReferenceAnswer("2+", True), 1: ReferenceAnswer(" ", False)})])
    index = read_index(path)
    assert references_of(index, ["1+1=", MESSAGES], "rows.jsonl") == [("2", "two"), ("ok", "好")]
    with pytest.raises(ReferenceMissError) as error:
        references_of(index, ["1+1=", "2+2=", "3+3=", "4+4="], "rows.jsonl")
    told = str(error.value)
    assert (
        f"{path} has no answers to 3 of the 4 prompts of rows.jsonl, first prompt 1, '2+2=' (key "
        f"{key_of('2+2=')[:12]})." in told
    )
    assert (
        "2 have never been answered: opdjax references EXPERIMENT, with the same data, adds what "
        "is missing." in told
    )
    assert "1 have only empty or truncated answers: sample more (teach.num_answers)" in told
    with pytest.raises(ReferenceMissError) as error:
        references_of(index, ["3+3=" * 100], "rows.jsonl")
    assert "cut off" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_a_prompt_that_is_left_out_needs_no_answer(path):
    asked = []
    found = references_of(
        read_index(path), ["1+1=", "3+3="], "rows.jsonl", lambda number: not asked.append(number)
    )
    assert (found, asked) == ([("2", "two"), ()], [1])


@pytest.mark.parametrize("wrap", [None, "{prompt}{reference}"])
def test_rows_take_their_references_from_the_index(path, tmp_path, wrap):
    """Other references of the data give way to them; prompts that are too long are left out, as
    always.
    """
    rows = [
        {"prompt": "1+1=", "reference": "old"},
        {"prompt": "1+2+3+4+5+6+7="},
        {"prompt": "1+1="},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(MINI_PAIR / "student")
    data = DataConfig(
        str(source),
        format="raw",
        references=str(path),
        max_prompt_length=12,
        teacher_prompt_format=wrap,
    )
    encoded = encode_prompts(load_rows(data, tokenizer), data, tokenizer, tokenizer)
    assert [(row.prompt, row.references) for row in encoded.prompts] == [("1+1=", ("2", "two"))] * 2
    assert encoded.num_skipped == 1
    if wrap:
        assert tokenizer.decode(encoded.teacher_ids[0]) == "1+1=2"
    digests = {encoded.digest}
    add_answers(path, [("1+1=", {2: ReferenceAnswer("deux", False)})])
    digests.add(encode_prompts(load_rows(data, tokenizer), data, tokenizer, tokenizer).digest)
    assert len(digests) == 2
    with pytest.raises(
        ReferenceMissError,
        match=r"no answers to 1 of the 3 prompts .* first prompt 1, '1\+2\+3\+4\+5\+6\+7='",
    ):
        load_rows(DataConfig(str(source), format="raw", references=str(path)), tokenizer)


def test_references_come_from_one_place():
    with pytest.raises(
        ConfigError,
        match="data.references is 'a.jsonl'; expected none where data.columns has a reference",
    ):
        DataConfig(references="a.jsonl", columns=("reference=solution",))
    with pytest.raises(ConfigError, match="data.references is ''"):
        DataConfig(references="")
