"""Every parser of what comes from outside ends in a value or its named error, whatever it reads."""

import contextlib
import json
import math
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opdjax.config import MINI_PAIR
from opdjax.config.rubrics import RubricsConfig
from opdjax.data.chat import render
from opdjax.data.grading import grader_named
from opdjax.data.prompt_rows import _parse_row, read_prompts
from opdjax.data.rational import numbers_in, rational
from opdjax.data.references import read_index
from opdjax.data.sources import ColumnMap, DataError
from opdjax.data.templates import _is_plain, render_template, written
from opdjax.data.tokenizer import TokenizerError, load_tokenizer
from opdjax.judge.chat_completions import error_message, read_reply, retry_after
from opdjax.judge.prompts import fill, read_blocks, shown_answer
from opdjax.judge.replies import Reply
from opdjax.judge.reply_object import ReplyError, read_object
from opdjax.judge.schema import parse_rubric, parse_scores, parse_verdicts
from opdjax.models.families import FAMILIES, UnsupportedModelError, family_of
from opdjax.models.hf import CheckpointError, open_checkpoint
from opdjax.models.stored_tensors import open_weights
from opdjax.runs.bounds import JSON_DEPTH, REPLY_BYTES, BoundedError, parse_json

CONFIG = json.loads((MINI_PAIR / "student" / "config.json").read_text())
TOKENIZER = json.loads((MINI_PAIR / "student" / "tokenizer.json").read_text())
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
SCALARS |= st.sampled_from([10**400, 10**4000, 2**53 + 1, "\ud800", "</think>", "NaN", "c1", "1"])
KEYS = st.sampled_from(["answers", "criteria", "answer_index", "verdicts", "score", "id", "text"])
KEYS |= st.sampled_from(["role", "content", "type", "weight", "draw", "is_truncated", "key"])
KEYS |= st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda each: st.lists(each, max_size=4) | st.dictionaries(KEYS, each, max_size=4),
    max_leaves=12,
)
WORDS = st.sampled_from([*'{}[]",:\\`\n #$%^*/+-.|<>()=_ 0123456789eE', "\\boxed{", "\\frac"])
WORDS |= st.sampled_from(["answer is ", "(A)", "</think>", "```json\n", '{"answers": [', "1,234"])
WORDS |= st.text(max_size=4)
TEXTS = st.lists(WORDS, max_size=40).map("".join)
pytestmark = pytest.mark.long
FILES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def each(*strategies, count=100):
    """Give these to a test, `count` times and 20 times as often."""

    def decorate(test):
        @pytest.mark.parametrize("times", [1, 20])
        def given_often(times, tmp_path):
            options = {"deadline": None, "suppress_health_check": FILES, "database": None}

            @settings(max_examples=count * times, derandomize=times == 1, **options)
            @given(st.tuples(*strategies))
            def attempt(values):
                test(tmp_path, *values)

            attempt()

        return given_often

    return decorate


def dumped(value):
    return json.dumps(value)


@each(TEXTS | VALUES.map(dumped))
def test_json(tmp_path, text):
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match="."):
            parse_json(text)
    else:
        assert repr(parse_json(text)) == repr(expected)


@each(st.integers(0, 300), st.sampled_from(["[", '{"[":', '{"\\"{":']))
def test_json_has_a_greatest_depth(tmp_path, depth, opening):
    text = opening * depth + "1" + {"[": "]"}.get(opening, "}") * depth
    if depth <= JSON_DEPTH:
        parse_json(text)
    else:
        with pytest.raises(ValueError, match="nested in each other"):
            parse_json(text)


@each(st.text(max_size=6000))
def test_errors_are_short(tmp_path, text):
    assert len(str(BoundedError(text))) <= 2003


@each(TEXTS | VALUES.map(dumped), st.lists(VALUES, max_size=3), count=150)
def test_replies_of_judges(tmp_path, text, values):
    lists = [dumped({name: values}) for name in ("answers", "criteria", "reflection")]
    for reply in (text, *lists, f"so:\n{lists[0]}\n", f"```json\n{lists[1]}\n```"):
        for key in ("answers", "criteria", "reflection"):
            with contextlib.suppress(ReplyError):
                assert key in read_object(reply, key)[0]
        with contextlib.suppress(ReplyError):
            assert all(map(math.isfinite, parse_scores(reply, 3).values.values()))
        with contextlib.suppress(ReplyError):
            for row in parse_verdicts(reply, 3, 2, is_graded=True).values.values():
                assert {*row} <= {0, 1, 2}
        with contextlib.suppress(ReplyError):
            assert parse_rubric(reply, RubricsConfig())[0].criteria


COUNTS = st.fixed_dictionaries({"prompt_tokens": VALUES, "completion_tokens": VALUES})
CHOICES = st.fixed_dictionaries({"message": VALUES, "finish_reason": VALUES})
MESSAGES = st.fixed_dictionaries({"message": st.fixed_dictionaries({"content": VALUES})})


@each(st.lists(CHOICES | MESSAGES | VALUES, max_size=2), COUNTS | VALUES)
def test_responses_of_servers(tmp_path, choices, usage):
    body = {"messages": [{"role": "user", "content": "1+1"}]}
    try:
        reply = read_reply({"choices": choices, "usage": usage}, body, is_structured=True)
    except (ValueError, LookupError, TypeError, AttributeError):  # as `client` catches them
        return
    assert isinstance(reply, Reply)
    assert 0 <= reply.input_tokens <= REPLY_BYTES * 100
    assert reply.output_tokens * 1.25 < math.inf
    assert len(reply.finish_reason) <= 40


@each(TEXTS, VALUES.map(dumped), st.text(max_size=40))
def test_errors_and_headers_of_servers(tmp_path, text, document, header):
    assert error_message(text)
    assert error_message(document)
    wait = retry_after({"retry-after": header})
    assert wait is None or wait >= 0


@each(st.lists(st.text(max_size=50), max_size=4), st.text(max_size=50))
def test_texts_in_prompts(tmp_path, texts, question):
    blocks = {"question": ("question", [question]), "answers": ("answer", texts)}
    filled = fill("# t 1\n[[tag]] carry the tag [[tag]]\n[[question]]\n[[answers]]", {}, blocks)
    found = read_blocks(filled)
    assert found.get("answer", []) == texts
    assert found["question"] == [question]
    assert len(shown_answer(question, False, 10)) <= 70


@each(TEXTS, st.sampled_from(["42", "A", "1/2", "x"]), count=150)
def test_answers_to_grade(tmp_path, text, answer):
    for grader in ("gsm8k", "last_number", "choice", "exact"):
        assert grader_named(grader)(text, answer) in (True, False)
    for number in numbers_in(text):
        rational(number)
    rational(text)


def with_field(raw, path, value):
    """A copy of a JSON object in which a field, also inside of others, has another value."""
    name, *rest = path
    if not rest or not isinstance(raw.get(name), dict):
        return {**raw, name: value}
    return {**raw, name: with_field(raw[name], rest, value)}


FIELDS = [(name,) for name in CONFIG] + [("rope_parameters", "rope_type")]
FIELDS += [("rope_parameters", name) for name in ("factor", "beta_fast", "rope_theta", "type")]
FIELDS += [(name,) for name in ("head_dim", "layer_types", "sliding_window", "rope_scaling")]
FIELDS += [("rope_parameters", kind) for kind in ("full_attention", "sliding_attention")]
FIELDS += [(name,) for name in ("no_rope_layers", "use_sliding_window", "sliding_window_pattern")]
FIELDS += [(name,) for name in ("partial_rotary_factor", "num_experts", "num_experts_per_tok")]
NUMBERS = st.sampled_from([0, -1, 1, 2, 10**9, 1e308, 1e-308, math.inf, math.nan, 10**400, "yarn"])


@each(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(st.tuples(st.sampled_from(FIELDS), VALUES | NUMBERS), max_size=3),
    count=200,
)
def test_configs(tmp_path, family, changes):
    raw = CONFIG | {"architectures": [family]}
    for path, value in changes:
        raw = with_field(raw, path, value)
    with contextlib.suppress(UnsupportedModelError, KeyError):
        config = family_of(raw).read_config(raw)
        assert config.num_layers <= 10_000
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with contextlib.suppress(UnsupportedModelError, CheckpointError):
        open_checkpoint(tmp_path)


TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", "x"]) | VALUES,
        "shape": st.lists(st.integers(-2, 2**40), max_size=4) | VALUES,
        "data_offsets": st.lists(st.integers(-2, 2**40), max_size=3) | VALUES,
    }
)


@each(st.dictionaries(st.text(max_size=3), TENSORS | VALUES, max_size=3), st.integers(-9, 9))
def test_headers_of_weights(tmp_path, fields, shift):
    written = json.dumps(fields).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", max(len(written) + shift, 0)) + written + b"\0" * 64)
    with contextlib.suppress(CheckpointError):
        assert isinstance(list(open_weights(file).keys()), list)


@each(st.binary(max_size=300))
def test_weights_of_noise(tmp_path, data):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        open_weights(file)


PARTS = ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens"]
KINDS = st.sampled_from(["Replace", "Sequence", "Split", "Metaspace", "BPE", "Digits", "Strip"])
PIECES = st.fixed_dictionaries({"type": KINDS, "content": VALUES, "pattern": VALUES}) | VALUES


@each(st.sampled_from(PARTS), PIECES, count=60)
def test_tokenizers(tmp_path, part, value):
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER | {part: value}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with contextlib.suppress(TokenizerError):
        load_tokenizer(tmp_path).encode("1+1=")


SNIPPETS = ["{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{{ m.role }}"]
SNIPPETS += ["{% if add_generation_prompt %}", "{% endif %}", "{{ 'a' + m['content'] }}", "{{ x }}"]
SNIPPETS += ["{% else %}", "{{ 1 if m is defined else 2 }}", "{{", "}}", "{%", "|", "{{ -1 }}", " "]


@each(st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=5), max_size=8).map("".join))
def test_templates_that_are_run_here(tmp_path, template):
    variables = {"messages": [{"role": "user", "content": "1+1="}], "add_generation_prompt": True}
    if _is_plain(template):
        text, error = written(template, variables, "2026-01-01")
        assert error is None or text == ""
        if error is None:
            assert render_template(template, variables) == text


@each(st.dictionaries(st.sampled_from(["prompt", "answer", "tools", "references"]), VALUES))
def test_rows(tmp_path, row):
    with contextlib.suppress(DataError):
        prompt = _parse_row(row, ColumnMap())
        with contextlib.suppress(ValueError):
            render(prompt.prompt, LETTERS, format="raw", system_prompt=None, enable_thinking=None)


LETTERS = load_tokenizer(MINI_PAIR / "student")
SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".parquet"])


@each(st.lists(TEXTS | VALUES.map(dumped), max_size=4).map("\n".join), SUFFIXES)
def test_files_of_rows(tmp_path, text, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_text(text, errors="surrogatepass")
    with contextlib.suppress(DataError):
        assert read_prompts(str(file))
    start = '{"schema": "opdjax.references/1", "teacher": {}}\n'
    file.write_text(start + text, errors="surrogatepass")
    with contextlib.suppress(DataError):
        read_index(file)


@each(st.binary(max_size=200), SUFFIXES)
def test_files_of_noise(tmp_path, data, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(data)
    with contextlib.suppress(DataError):
        assert read_prompts(str(file))
