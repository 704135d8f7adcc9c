"""Tokenizers read from files: ids and chats equal those of transformers on the same files."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from opdjax.config import MINI_PAIR
from opdjax.data.tokenizer import TokenizerError, load_tokenizer

STUDENT = MINI_PAIR / "student"
TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{% generation %}{{ m.role }}: {{ m | tojson }}"
    "{{ strftime_now('') }}\n{% endgeneration %}{% if loop.index > 8 %}{% break %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant{{ ' ' ~ mood if mood }}:{% endif %}"
)


@pytest.fixture
def copied(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(STUDENT / name, tmp_path / name)
    return tmp_path


def test_ids_and_texts_equal_those_of_transformers():
    ours, theirs = load_tokenizer(STUDENT), AutoTokenizer.from_pretrained(str(STUDENT))
    text = "<|im_start|>user\n134-17+25=<|im_end|>\n"
    for special in (True, False):
        assert ours.encode(text, add_special_tokens=special) == theirs.encode(
            text, add_special_tokens=special
        )
    ids = ours.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )
        both = [[ids, ids[2:]], {"skip_special_tokens": skip}]
        assert ours.batch_decode(both[0], **both[1]) == theirs.batch_decode(both[0], **both[1])
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("place", ["file", "field", "named"])
def test_chats_equal_those_of_transformers(copied, place):
    file = copied / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "bos_token": {"__type": "AddedToken", "content": "<|im_start|>"}
    }
    if place == "file":
        (copied / "chat_template.jinja").write_text(TEMPLATE)
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    if place != "file":
        config["chat_template"] = TEMPLATE if place == "field" else named
    file.write_text(json.dumps(config))
    ours, theirs = load_tokenizer(copied), AutoTokenizer.from_pretrained(str(copied))
    messages = [{"role": "user", "content": "<é> 'x'"}] * 12
    for options in ({}, {"add_generation_prompt": True, "mood": "calm"}):
        made = ours.apply_chat_template(messages, **options)
        assert made == theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.apply_chat_template(messages, tokenize=True, **options) == theirs.encode(
            made, add_special_tokens=False
        )


def test_a_template_cannot_reach_out_of_its_sandbox(copied):
    (copied / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(Exception, match="unsafe|__class__"):
        load_tokenizer(copied).apply_chat_template([{"role": "user", "content": "x"}])


def test_truncation_and_padding_of_a_file_do_not_apply(copied):
    file = copied / "tokenizer.json"
    found = json.loads(file.read_text())
    found["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(found))
    assert len(load_tokenizer(copied).encode("1+2+3+4+5")) == 9


def test_damaged_files_are_named_and_no_code_is_asked_for(copied):
    (copied / "config.json").write_text(
        json.dumps({"model_type": "other", "auto_map": {"AutoTokenizer": "code.Other"}})
    )
    assert load_tokenizer(copied).encode("1") == load_tokenizer(STUDENT).encode("1")
    (copied / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(TokenizerError, match="no tokenizer could be read from"):
        load_tokenizer(copied)


def test_transformers_is_not_imported():
    code = (
        "import sys; from opdjax.config import MINI_PAIR;"
        "from opdjax.data.tokenizer import load_tokenizer; load_tokenizer(MINI_PAIR / 'student');"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
