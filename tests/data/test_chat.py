"""How a prompt reads to a model, on the tokenizer of the mini pair."""

import copy
import dataclasses
import json
import pathlib
import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opdjax.config import MINI_PAIR
from opdjax.data.chat import (
    TokenizerMismatchError,
    assistant_header,
    check_same_vocabulary,
    render,
    stage_ids,
    stage_starts,
    text_of,
    valid_vocab,
)
from opdjax.data.prompt_rows import Prompt, read_prompts
from opdjax.data.references import key_of
from opdjax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINI_PAIR / "student")


@pytest.fixture
def untemplated(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = None
    return changed


def word_level(words, split=None):
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def show(prompt, tokenizer, *, format="chat", system_prompt=None, enable_thinking=None):
    return render(
        prompt,
        tokenizer,
        format=format,
        system_prompt=system_prompt,
        enable_thinking=enable_thinking,
    )


def test_chat_opens_the_turn_of_the_assistant(tokenizer):
    ids = show("34-17+25=", tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\n34-17+25=<|im_end|>\n<|im_start|>assistant\n"
    # A number below 200 is one token; 34-17+25= are six.
    assert tokenizer.convert_ids_to_tokens(ids[3:9]) == ["34", "-", "17", "+", "25", "="]
    assert len(ids) == 3 + 6 + 2 + 3


def test_a_conversation_is_rendered_turn_by_turn(tokenizer):
    messages = (
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+1="},
    )
    expected = (
        "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+1=<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(show(messages, tokenizer)) == expected
    assert show(({"role": "user", "content": "7+8="},), tokenizer) == show("7+8=", tokenizer)


def test_the_system_prompt_comes_first(tokenizer):
    plain, ids = show("7+8=", tokenizer), show("7+8=", tokenizer, system_prompt="12")
    assert tokenizer.decode(ids).startswith(
        "<|im_start|>system\n12<|im_end|>\n<|im_start|>user\n7+8="
    )
    assert ids[len(ids) - len(plain) :] == plain


def test_enable_thinking_reaches_the_template(tokenizer):
    default, on, off = (
        show("7+8=", tokenizer, enable_thinking=value) for value in (None, True, False)
    )
    assert default == on
    # The template answers False with an empty thought behind the assistant's opening.
    assert off[: len(on)] == on
    assert len(off) > len(on)


def test_raw_is_the_bare_text(tokenizer):
    ids = show("34-17+25=", tokenizer, format="raw")
    assert tokenizer.convert_ids_to_tokens(ids) == ["34", "-", "17", "+", "25", "="]


def header(tokenizer, format="chat", enable_thinking=None):
    return assistant_header(tokenizer, format=format, enable_thinking=enable_thinking)


def test_an_answer_without_its_prompt_follows_the_opening_of_the_turn(tokenizer):
    ids = header(tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>assistant\n"
    assert show("7+8=", tokenizer)[-len(ids) :] == ids
    thoughtless = header(tokenizer, enable_thinking=False)
    assert tokenizer.decode(thoughtless) == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert show("7+8=", tokenizer, enable_thinking=False)[-len(thoughtless) :] == thoughtless


def test_without_an_opening_it_follows_bos_or_eos(tokenizer, untemplated):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "user:": 3, "assistant:": 4}
    plain = word_level(words)
    with pytest.raises(
        ValueError, match="has no chat template that opens an assistant's turn, no BOS and no EOS"
    ):
        header(plain)
    plain.eos_token = "</s>"
    assert header(plain) == header(plain, "raw") == [2]
    plain.bos_token = "<s>"
    assert header(plain) == header(plain, "raw") == [1]
    # A template that opens nothing is none.
    plain.chat_template = "{% for m in messages %}{{ m.role }}: {% endfor %}"
    assert header(plain) == [1]
    plain.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert header(plain) == [4]
    plain.chat_template = plain.chat_template.replace("{% endif %}", "{% else %} </s>{% endif %}")
    assert header(plain) == [4]
    # Where conversations begin with BOS, so does this one.
    plain.chat_template = "<s> " + plain.chat_template
    assert header(plain) == [1, 4]
    assert header(plain, "raw") == [1]
    assert header(untemplated) == header(tokenizer, "raw") == [tokenizer.eos_token_id]


def test_messages_cannot_be_raw(tokenizer):
    with pytest.raises(ValueError, match="made of messages needs format 'chat'"):
        show(({"role": "user", "content": "1"},), tokenizer, format="raw")


def test_a_tokenizer_without_template_says_so(untemplated):
    with pytest.raises(
        ValueError, match=r"mini_pair.student has no chat template; use format 'raw'"
    ):
        show("7+8=", untemplated)
    assert len(show("7+8=", untemplated, format="raw")) == 4


def test_a_place_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer could be read from {tmp_path}"):
        load_tokenizer(tmp_path)


def test_valid_vocab_counts_to_the_largest_id(tokenizer):
    assert valid_vocab(word_level({"<unk>": 0, "a": 1, "b": 7})) == 8
    # 200 numbers, the marks, and the template's words: all ids are in use.
    assert valid_vocab(tokenizer) == len(tokenizer.get_vocab()) == 214


def test_the_mini_pair_shares_its_vocabulary(tokenizer):
    check_same_vocabulary(tokenizer, load_tokenizer(MINI_PAIR / "teacher"), "vopd")


def test_a_differing_vocabulary_is_refused_with_its_tokens():
    ours = word_level({"<unk>": 0, "cat": 1, "dog": 2, "emu": 3})
    theirs = word_level({"<unk>": 0, "cat": 2, "dog": 1, "fox": 3})
    with pytest.raises(TokenizerMismatchError) as error:
        check_same_vocabulary(ours, theirs, "full_kl")
    message = str(error.value)
    assert "differ in 4 tokens" in message
    for part in (
        "'cat': 1 / 2",
        "'dog': 2 / 1",
        "'emu': 3 / None",
        "'fox': None / 3",
        "recipe 'full_kl'",
    ):
        assert part in message


def test_only_the_first_of_many_differing_tokens_are_shown():
    ours = word_level({"<unk>": 0} | {f"w{i}": i for i in range(1, 40)})
    with pytest.raises(TokenizerMismatchError, match="differ in 39 tokens") as error:
        check_same_vocabulary(ours, word_level({"<unk>": 0}), "vopd")
    assert str(error.value).count("/ None") == 5


def test_the_same_vocabulary_split_otherwise_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("[0-9]|[a-z]+|\n|."), "isolated"
    )
    assert other.get_vocab() == tokenizer.get_vocab()
    assert show("12", other, format="raw") != show("12", tokenizer, format="raw")
    with pytest.raises(
        TokenizerMismatchError,
        match="split the text ' 12.5;' differently .*'12' .* / .*'1' '2' .*recipe 'opd' compares",
    ):
        check_same_vocabulary(tokenizer, other, "opd")


# Stages


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("1+2=3;3+4=7#7", [0, 5, 11]),
        ("1+2=3#3", [0, None, 5]),  # no second step: its text is the first one's
        ("1+2=3;3+4=7", [0, 5, None]),
        ("#7;1", [0, 2, None]),  # a marker counts after the stage before alone
        ("", [0, None, None]),
    ],
)
def test_where_the_stages_of_an_answer_begin(text, starts):
    assert stage_starts(text, (";", "#")) == starts


def test_a_marker_that_matches_nothing_still_moves_on():
    assert stage_starts("ab", ("", "")) == [0, 0, 1]


@pytest.mark.parametrize(
    "text", ["34-17=17;17+25=42#42", "34-17=17#42", "34;1#", "#", ";;##", "17+25"]
)
def test_each_token_has_the_stage_that_its_text_stands_in(text, tokenizer):
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    ids, starts = stage_ids(tokens, tokenizer, (";", "#")), stage_starts(text, (";", "#"))
    assert ids == sorted(ids)
    for count, stage in enumerate(ids[:-1]):
        last = len(tokenizer.decode(tokens[: count + 1])) - 1
        assert stage == max(
            number for number, start in enumerate(starts) if start is not None and start <= last
        )
    assert ids[-1] == ids[-2]
    assert stage_ids([], tokenizer, (";",)) == []


# Rows of every kind, by three templates


OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = {
    # Writes whatever the content is.
    "plain": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}" + OPEN,
    # Needs texts.
    "strict": "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    + OPEN,
    # Reads everything; of reasoning, that after the user's last turn.
    "full": """{%- if tools %}<tools>{{ tools | tojson }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}<{{ m.role }}{{ ' ' + m.name if m.name is defined }}>
{%- if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}{% endif %}
{%- if m.content is string %}{{ m.content }}
{%- elif m.content %}{% for part in m.content %}{{ part.text }}{% endfor %}
{%- endif %}
{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}</s>
{%- endfor %}"""
    + OPEN,
}
ROWS = [
    json.loads(line)
    for line in pathlib.Path(__file__).with_name("conversations.jsonl").read_text().splitlines()
]


@pytest.fixture(scope="module")
def in_letters(tmp_path_factory):
    """in_letters(**fields of tokenizer_config.json) -> a directory whose tokens are letters."""

    def write(**fields):
        letters = pre_tokenizers.ByteLevel.alphabet()
        tokenizer = Tokenizer(models.BPE({x: n for n, x in enumerate(sorted(letters))}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        if fields.pop("adds_eos", False):
            ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>", pair="<s> $A </s> $B:1", special_tokens=ids
            )
        path = tmp_path_factory.mktemp("letters")
        tokenizer.save(str(path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | fields
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return write


def rendered(row, template, in_letters, tmp_path):
    """(ids of the row, ids of transformers' apply_chat_template on it)."""
    place = in_letters(chat_template=TEMPLATES[template])
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({name: row[name] for name in ("prompt", "tools") if name in row}))
    (found,) = read_prompts(str(file))
    if "references" in row:
        assert list(found.references) == row["references"]
    ours = load_tokenizer(place)
    options = {"format": "chat", "system_prompt": None, "enable_thinking": None}
    ids = render(found.prompt, ours, tools=found.tools, **options)
    theirs, given = AutoTokenizer.from_pretrained(str(place)), row["prompt"]
    given = [{"role": "user", "content": given}] if isinstance(given, str) else given
    # Of a table, null is a field that a turn lacks; the assistant's last turn is the reference.
    turns = [{n: x for n, x in m.items() if x is not None or n == "content"} for m in given]
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    tools = row.get("tools") or None
    text = theirs.apply_chat_template(
        turns,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        add_generation_prompt=True,
        tokenize=False,
    )
    return ids, ours.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("row", ROWS, ids=[row["kind"] for row in ROWS])
def test_a_row_is_rendered_as_by_transformers_or_refused_by_name(
    row, template, in_letters, tmp_path
):
    refusal = row.get("row") or row[template]
    if refusal:
        with pytest.raises(ValueError, match=re.escape(refusal)):
            rendered(row, template, in_letters, tmp_path)
    else:
        ours, theirs = rendered(row, template, in_letters, tmp_path)
        assert ours == theirs


def test_conversations_with_tools_have_a_template_of_their_own(in_letters):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    places = [in_letters(chat_template=named), in_letters(chat_template="no")]
    (places[1] / "chat_template.jinja").write_text("plain")
    (places[1] / "additional_chat_templates").mkdir()
    (places[1] / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    hello = [{"role": "user", "content": "hello"}]
    for place in places:
        for tokenizer in (load_tokenizer(place), AutoTokenizer.from_pretrained(str(place))):
            for tools, text in ((None, "plain"), ([{"name": "add"}], "tools")):
                assert tokenizer.apply_chat_template(hello, tools=tools, tokenize=False) == text


def test_judges_and_the_index_of_references_see_calls_and_tools():
    calls = [{"function": {"name": "add"}}]
    row = Prompt(({"role": "assistant", "content": None, "tool_calls": calls},), tools=({"n": 1},))
    assert [text_of(turn) for turn in row.with_tools] == ['[{"n": 1}]', json.dumps(calls)]
    assert key_of(row.with_tools) != key_of(row.prompt)
    assert dataclasses.replace(row, tools=()).with_tools == row.prompt


# Ends of prompts


def test_a_raw_prompt_does_not_end_in_eos(in_letters):
    tokenizer = load_tokenizer(in_letters(adds_eos=True))
    assert tokenizer.decode(tokenizer.encode("1+1=")) == "<s>1+1=</s>"
    assert tokenizer.decode(show("1+1=", tokenizer, format="raw")) == "<s>1+1="
    # An ending that the text itself has stays.
    assert tokenizer.decode(show("1+1=</s>", tokenizer, format="raw")) == "<s>1+1=</s>"
