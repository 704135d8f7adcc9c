"""How a prompt reads to a model, on the tokenizer of the mini pair."""

import copy
import shutil

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opdjax.config import MINI_PAIR
from opdjax.data.chat import (
    TokenizerMismatchError,
    assistant_header,
    check_same_vocabulary,
    render,
    stage_ids,
    stage_starts,
    valid_vocab,
)
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
        match="split the same text differently.*recipe 'opd' compares their logits id by id",
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


@pytest.mark.parametrize("is_of_transformers", [False, True])
def test_the_date_is_today_for_a_template_that_reads_the_clock(tmp_path, is_of_transformers):
    shutil.copytree(MINI_PAIR / "student", tmp_path / "student")
    (tmp_path / "student" / "chat_template.jinja").write_text("{{ strftime_now('%d-%m-%y') }}")
    loaded = AutoTokenizer.from_pretrained if is_of_transformers else load_tokenizer
    tokenizer = loaded(tmp_path / "student")
    options = {"format": "chat", "system_prompt": None, "enable_thinking": None}
    ids = render("1+1=", tokenizer, date="2024-07-26", **options)
    assert tokenizer.decode(ids) == "26-07-24"
