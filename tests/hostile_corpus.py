"""Files, templates, answers and addresses made to crash, hang or fill a process that reads them.

`python hostile_corpus.py GROUP DIRECTORY` tries the cases of a group, one after the other, and
prints a line of JSON about each: the error, the seconds of CPU, and the megabytes that it added to
the largest size of the process.
"""

import gzip
import itertools
import json
import os
import pathlib
import resource
import shutil
import struct
import sys
import time

from opdjax.config import MINI_PAIR

STUDENT = MINI_PAIR / "student"
NESTED = "[" * 50_000 + "]" * 50_000
DIGITS = "9" * 6000


def text(value):
    """The JSON text of a value; a text is one already."""
    return value if isinstance(value, str) else json.dumps(value)


def fresh(place, *names):
    """A new directory with these files of the mini student."""
    place = pathlib.Path(place, "model")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in names:
        shutil.copy(STUDENT / name, place / name)
    return place


# Configs

RAW = json.loads((STUDENT / "config.json").read_text())
SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "intermediate_size")
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
WRONG_SIZES = (10**9, -1, 0, 1.5, "8", True, [8], {"8": 8}, 10**400)
NUMBERS = ("rms_norm_eps", "rope_theta")
ROPES = {
    "yarn without a range": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 0},
    "yarn of a huge factor": {"rope_type": "yarn", "factor": 1e300},
    "yarn of no base": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0},
    "llama3 upside down": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4}
    | {"high_freq_factor": 1, "original_max_position_embeddings": 64},
    "a kind that is a list": {"rope_type": ["yarn"]},
    "a kind that is none": {"rope_type": "../../etc/passwd"},
    "objects within": {"rope_type": {"a": {"a": {}}}},
    "a factor of text": {"rope_type": "linear", "factor": "x" * 100_000},
}


def config_texts():
    """Name -> the text of a config.json."""
    for name, value in itertools.product(SIZES, WRONG_SIZES):
        yield f"{name} {text(value)[:12]}", text(RAW | {name: value})
    experts = RAW | {"architectures": ["Qwen3MoeForCausalLM"]}
    for name, value in itertools.product(EXPERTS, WRONG_SIZES):
        yield f"{name} {text(value)[:12]}", text(experts | {name: value})
    for name, value in itertools.product(NUMBERS, ("1e400", "NaN", "-1", "1" * 400, '"x"')):
        changed = {key: kept for key, kept in RAW.items() if key not in (name, "rope_parameters")}
        yield f"{name} {value[:5]}", f'{text(changed)[:-1]}, "{name}": {value}}}'
    for name, rope in ROPES.items():
        yield f"rope: {name}", text(RAW | {"rope_parameters": {"rope_theta": 1e4} | rope})
    yield "lists without end", "[" * 100_000
    yield "nested lists", text(RAW)[:-1] + f', "x": {NESTED}}}'
    yield "nested objects", '{"x":' * 20_000 + "1" + "}" * 20_000
    yield "thousands of digits", text(RAW)[:-1] + f', "x": {DIGITS}}}'
    yield "nothing", ""
    yield "a list", "[]"
    yield "one bit", text(RAW).replace('"hidden_size"', '"hidden_s\x00ze"')
    yield "megabytes", text(RAW)[:-1] + ', "x": "' + "x" * (9 << 20) + '"}'
    yield "code", text({"model_type": "x", "auto_map": {"AutoConfig": "code.X"}})
    yield "quantized", text(RAW | {"quantization_config": {"x": "y" * 100_000}})
    yield "an architecture that is a path", text(RAW | {"architectures": ["../x", {"y": []}]})
    yield "stop ids of another vocabulary", text(RAW | {"eos_token_id": [0, 10**9]})
    yield "a million stop ids", text(RAW | {"eos_token_id": [-1] * 10**6})
    yield "a dtype that is a list", text(RAW | {"dtype": ["float32"]})


def configs(place):
    from opdjax.models.hf import open_checkpoint

    for name, content in config_texts():
        model = fresh(place)
        (model / "config.json").write_text(content)
        yield name, "config.json", lambda model=model: open_checkpoint(model)
    for name, content in {
        "a number": "3",
        "a list of numbers": "[1, 2]",
        "ten thousand": text(["x"] * 10_000),
        "an object": '{"a": "b"}',
        "an empty text": '[""]',
    }.items():
        model = fresh(place, "config.json")
        (model / "generation_config.json").write_text(f'{{"stop_strings": {content}}}')
        yield f"stop strings: {name}", "stop_strings", lambda model=model: open_checkpoint(model)


# Weights


def header(fields, size=None, rest=b"\0" * 64):
    """The bytes of a safetensors file."""
    written = fields if isinstance(fields, bytes) else text(fields).encode()
    return struct.pack("<Q", len(written) if size is None else size) + written + rest


def tensor(dtype="F32", shape=(4, 4), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NORM = "model.norm.weight"
WEIGHTS = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header of 2^63 bytes": header({}, 2**63),
    "a header of a gigabyte": header({}, 2**30),
    "a header without end": header({}, 10**6),
    "a header of noise": header(bytes(range(256)) * 40),
    "a header that is a list": header(b"[]"),
    "a header of nested lists": header(NESTED.encode()),
    "a header of digits": header(b'{"x": ' + DIGITS.encode() + b"}"),
    "zero bytes of header": header(b""),
    "offsets beyond the file": header({NORM: tensor(offsets=(0, 2**50))}),
    "offsets that run backwards": header({NORM: tensor(offsets=(64, 0))}),
    "negative offsets": header({NORM: tensor(offsets=(-64, 0))}),
    "offsets that overlap": header({NORM: tensor(), "b": tensor(offsets=(32, 96))}),
    "a hole in the data": header({NORM: tensor(), "b": tensor(offsets=(128, 192))}),
    "a shape of 2^80": header({NORM: tensor(shape=(2**40, 2**40))}),
    "a negative shape": header({NORM: tensor(shape=(-4, -4))}),
    "a shape of text": header({NORM: tensor(shape=("4", "4"))}),
    "a shape of a thousand axes": header({NORM: tensor(shape=(1,) * 1000 + (16,))}),
    "a dtype that is none": header({NORM: tensor("F1024")}),
    "integers": header({NORM: tensor("I32")}),
    "four-bit numbers": header({NORM: tensor("F4", (128,))}),
    "no dtype": header({NORM: {"shape": [4], "data_offsets": [0, 64]}}),
    "another model": header({NORM: tensor()}),
    "a hundred thousand tensors": header(
        {f"t{n}": tensor(shape=(0,), offsets=(0, 0)) for n in range(100_000)}, rest=b""
    ),
    "metadata of numbers": header({"__metadata__": {"format": 3}, NORM: tensor()}),
    "the same tensor twice": header(
        (f'{{"{NORM}": {text(tensor())}, "{NORM}": {text(tensor())}}}').encode()
    ),
    "a pickle": b"\x80\x04\x95" + b"cposix\nsystem\n(S'touch hacked'\ntR." * 10,
}
INDEXED = {
    "above the directory": "../model.safetensors",
    "far above": "../" * 20 + "etc/passwd",
    "absolute": "/etc/passwd",
    "the directory": ".",
    "its parent": "..",
    "no name": "",
    "a subdirectory": "sub/model.safetensors",
    "a NUL": "a\0b",
    "a link that leads out": "out.safetensors",
    "a link to itself": "loop.safetensors",
    "a directory by name": "sub",
    "a name of thousands of letters": "x" * 5000,
    "not there": "gone.safetensors",
    "half a character": "\ud800.safetensors",
    "a line break": "a\nb",
}


def weights(place):
    from opdjax.models.hf import load_params, open_checkpoint
    from opdjax.models.hf_export import export

    load = lambda model: load_params(open_checkpoint(model), "float32")
    for name, content in WEIGHTS.items():
        model = fresh(place, "config.json")
        (model / "model.safetensors").write_bytes(content)
        yield name, str(model), lambda model=model: load(model)
    for name, file in INDEXED.items():
        model = fresh(place, "config.json")
        index = {"weight_map": {NORM: file}}
        (model / "model.safetensors.index.json").write_text(text(index))
        (model / "sub").mkdir()
        (model / "out.safetensors").symlink_to(STUDENT / "model.safetensors")
        (model / "loop.safetensors").symlink_to(model / "loop.safetensors")
        yield f"index: {name}", "index.json", lambda model=model: load(model)
    for name, content in {
        "a list": "[]",
        "files that are numbers": '{"weight_map": {"a": 3}}',
        "nested lists": NESTED,
        "megabytes": '{"x": "' + "x" * (9 << 20) + '"}',
    }.items():
        model = fresh(place, "config.json")
        (model / "model.safetensors.index.json").write_text(content)
        yield f"index: {name}", "index.json", lambda model=model: load(model)
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        model = fresh(place, "config.json")
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
        yield f"{name} is a pipe", name, lambda model=model: load(model)
        model = fresh(place, "config.json")
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("/dev/zero")
        yield f"{name} has no end", name, lambda model=model: load(model)
    model = fresh(place, "config.json")
    with (model / "model.safetensors").open("wb") as sparse:
        sparse.truncate(1 << 40)
    yield "a terabyte of nothing", str(model), lambda model=model: load(model)
    for name, base in {
        "of itself": str(pathlib.Path(place, "model")),
        "of a path that is none": "/etc/passwd",
        "of a number": 3,
        "of a NUL": "a\0b/c",
    }.items():
        model = fresh(place)
        adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base}
        (model / "adapter_config.json").write_text(text(adapter))
        yield f"an adapter {name}", "adapter", lambda model=model: load(model)
    for field, value in (("r", 10**9), ("r", -1), ("lora_alpha", 1e308), ("lora_alpha", 10**400)):
        model = fresh(place)
        adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
        adapter |= {"base_model_name_or_path": str(STUDENT), field: value}
        (model / "adapter_config.json").write_text(text(adapter))
        yield f"an adapter of {field} {text(value)[:9]}", "adapter", lambda m=model: load(m)
    for name in ("tokenizer.json", "merges.txt", "generation_config.json"):
        model = fresh(place, "config.json", "model.safetensors")
        (model / name).symlink_to("/etc/passwd")
        out = pathlib.Path(place, "out")

        def exported(model=model, out=out):
            shutil.rmtree(out, ignore_errors=True)
            source = open_checkpoint(STUDENT)
            import dataclasses

            params = load_params(source, "float32")
            export(params, dataclasses.replace(source, path=model), out)

        yield f"export of a link, {name}", name, exported
    model = fresh(place, "config.json", "model.safetensors")
    (model / "merges.txt").mkdir()
    yield "export of a directory", "merges.txt", lambda: exported(model)


# Tokenizers and templates

TOKENIZER = json.loads((STUDENT / "tokenizer.json").read_text())
REPLACE = [{"type": "Replace", "pattern": {"String": "1"}, "content": "1" * 10}] * 12
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TOKENIZERS = {
    "nothing": "",
    "nested lists": NESTED,
    "lists without end": "[" * 100_000,
    "thousands of digits": text(TOKENIZER)[:-1] + f', "x": {DIGITS}}}',
    "a list": "[]",
    "no model": TOKENIZER | {"model": None},
    "a model of another kind": TOKENIZER | {"model": {"type": "Pickle", "vocab": {}}},
    "an empty vocabulary": TOKENIZER
    | {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}, "added_tokens": []},
    "ids that are texts": TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": {"a": "b"}}},
    "ids below zero": TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": {"a": -1}}},
    "a text that becomes a terabyte": TOKENIZER
    | {"normalizer": {"type": "Sequence", "normalizers": REPLACE}},
    "an answer that becomes a terabyte": TOKENIZER
    | {"decoder": {"type": "Sequence", "decoders": REPLACE}},
    "a pattern that is none": TOKENIZER | {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a"}}},
    "added tokens of text": TOKENIZER | {"added_tokens": "x"},
    "merges of other tokens": TOKENIZER
    | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
    "a map of noise": TOKENIZER
    | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "a template of other tokens": TOKENIZER
    | {
        "post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
        | {"single": [{"SpecialToken": {"id": "zz", "type_id": 0}}]}
    },
}
SETTINGS = {
    "a list": "[]",
    "a token that is a number": {"eos_token": 3},
    "a token that is a list": {"eos_token": ["a"]},
    "a token without text": {"eos_token": {"lstrip": True}},
    "a template that is a number": {"chat_template": 3},
    "templates without names": {"chat_template": [{"template": "x"}]},
    "templates that are texts": {"chat_template": ["x", "y"]},
    "nested lists": NESTED,
    "megabytes": '{"x": "' + "x" * (9 << 20) + '"}',
}
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "loops in loops": LOOPS,
    "a text of ten gigabytes": "{{ 'a' * 10**10 }}",
    "a text that doubles": "{% set n = namespace(x='aa') %}{% for i in range(40) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a list of ten gigabytes": "{{ ([0] * 10**10) | length }}",
    "a wide text": "{{ 'a' | center(10**11) }}",
    "a number of a wide format": "{{ '%0999999999999d' % 3 }}",
    "a format of fields": "{{ '{:>99999999999}'.format(1) }}",
    "a power": "{{ (10**(10**8)) % 7 }}{{ 9**9**9**9 }}",
    "two calls of itself": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "calls without end": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "brackets": "{{" + "(" * 3000,
    "sums": "{{" + "a+" * 30_000 + "a}}",
    "blocks": "{% if a %}" * 2000,
    "output without end": "{% for a in range(99999) %}" + "x" * 500 + "{% endfor %}",
    "a long template": "x" * 300_000,
    "a long number": "{{ " + DIGITS + " }}",
    "the classes of Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "the modules of Python": "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
    "a frame": "{{ (messages | map(attribute='__class__') | list)[0].__subclasses__() }}",
    "a format that looks inside": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "a parent": "{% extends '/etc/passwd' %}",
    "an own error": "{{ raise_exception('x' * 1000) }}",
    "a division": "{{ 1 // 0 }}",
    "a message that is changed": "{% set _ = messages.append(3) %}",
    "no template": "{% nothing %}",
    "replacements": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "an indented text": "{{ messages | tojson(indent=10**10) }}",
    "batches": "{{ 'ab' | batch(10**10, 'x') | list }}",
}


def tokenizers(place):
    from opdjax.data.tokenizer import load_tokenizer

    def used(model):
        tokenizer = load_tokenizer(model)
        return tokenizer.decode(tokenizer.encode("1+1="))

    for name, content in TOKENIZERS.items():
        model = fresh(place, "tokenizer_config.json")
        (model / "tokenizer.json").write_text(text(content))
        yield name, str(model), lambda model=model: used(model)
    for name, content in SETTINGS.items():
        model = fresh(place, "tokenizer.json")
        (model / "tokenizer_config.json").write_text(text(content))
        yield f"settings: {name}", str(model), lambda model=model: used(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        model = fresh(place, "tokenizer.json")
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
        yield f"{name} is a pipe", str(model), lambda model=model: used(model)
    model = fresh(place)
    with (model / "tokenizer.json").open("wb") as sparse:
        sparse.truncate(1 << 40)
    yield "a terabyte of nothing", str(model), lambda model=model: used(model)
    model = fresh(place, "tokenizer.json")
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe")
    yield "a template of noise", str(model), lambda model=model: used(model)
    model = fresh(place)
    slow = SPLIT | {"pattern": {"Regex": "(a+)+$"}}
    (model / "tokenizer.json").write_text(text(TOKENIZER | {"pre_tokenizer": slow}))
    yield "a slow pattern", "", lambda: load_tokenizer(model).encode("a" * 40 + "b")


def templates(place):
    import opdjax.data.templates
    from opdjax.data.chat import render
    from opdjax.data.tokenizer import load_tokenizer

    opdjax.data.templates._SECONDS = 0.5
    tokenizer = load_tokenizer(STUDENT)
    options = {"format": "chat", "system_prompt": None, "enable_thinking": None}

    def rendered(template, prompt="1+1="):
        tokenizer.chat_template = template
        return len(render(prompt, tokenizer, **options))

    for name, template in TEMPLATES.items():
        yield name, "chat template", lambda template=template: rendered(template)
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    yield "a prompt of megabytes", "characters", lambda: rendered(plain, "1" * 5_000_000)
    raw = {**options, "format": "raw"}
    prompt = "1" * 5_000_000
    yield "a raw prompt of megabytes", "characters", lambda: render(prompt, tokenizer, **raw)


# Rows of data

ROW = '{"prompt": "1+1=", "answer": "2"}\n'
LINES = {
    "nested lists": f'{{"prompt": {NESTED}}}',
    "lists without end": '{"prompt": ' + "[" * 100_000,
    "objects without end": '{"prompt": ' * 50_000,
    "thousands of digits": f'{{"prompt": "1", "answer": {DIGITS}}}',
    "NaN": '{"prompt": "1", "answer": NaN}',
    "infinity": '{"prompt": "1", "answer": 1e999}',
    "a line of 20 MB": '{"prompt": "' + "x" * (20 << 20) + '"}',
    "spaces": " " * (20 << 20),
    "a byte order mark within": ROW + "\ufeff" + ROW + "\ufeff\ufeff{}",
    "zero bytes": "\0" * 1000,
    "a list": "[1, 2]\n",
    "a text": '"abc"\n',
    "a prompt that is an object": '{"prompt": {"a": 1}}',
    "a prompt that is empty": '{"prompt": ""}',
    "a prompt of turns without roles": '{"prompt": [{"content": "x"}]}',
    "a role that is a list": '{"prompt": [{"role": [], "content": "x"}]}',
    "a turn that is a list": '{"prompt": [[], []]}',
    "parts that are no text": '{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}',
    "a part that is null": '{"prompt": [{"role": "user", "content": [null]}]}',
    "a turn of the assistant alone": '{"prompt": [{"role": "assistant", "content": "x"}]}',
    "references that are numbers": '{"prompt": "1", "references": [1, 2]}',
    "a reference that is an object": '{"prompt": "1", "reference": {"a": "b"}}',
    "tools that are a text": '{"prompt": "1", "tools": "' + "[" * 10_000 + '"}',
    "tools that are numbers": '{"prompt": "1", "tools": [1]}',
    "a value of megabytes": '{"prompt": [{"role": "user", "content": ["' + "x" * 10**6 + '"]}]}',
    "a cut line": ROW + '{"prompt": "1+',
    "no prompt": '{"question": "1"}',
    "no line": "\n\n\n",
}
BYTES = {
    "a zip bomb": ("rows.jsonl", gzip.compress(b"x" * 10**8)),
    "UTF-16": ("rows.jsonl", ROW.encode("utf-16")),
    "half a character": ("rows.jsonl", b'{"prompt": "\xc3"}'),
    "a list of nested lists": ("rows.json", f"[{NESTED}]".encode()),
    "a list without end": ("rows.json", b"[" + b'{"prompt": "1"},' * 1000),
    "a list of numbers": ("rows.json", b"[1, 2, 3]"),
    "a list of digits": ("rows.json", f"[{DIGITS}]".encode()),
    "quotes without end": ("rows.csv", b'prompt\n"' + (b"x" * 999 + b"\n") * 18_000),
    "a line of 20 MB as CSV": ("rows.csv", b"prompt\n" + b"x" * (20 << 20)),
    "zero bytes as CSV": ("rows.csv", b"prompt\n" + b"\0" * 1000),
    "no cells": ("rows.csv", b"\n\n"),
    "too many cells": ("rows.csv", b"prompt\n" + b"1," * 100_000),
    "UTF-16 as CSV": ("rows.csv", "prompt\n1".encode("utf-16")),
    "the beginning of a table": ("rows.parquet", b"PAR1" + b"\0" * 100),
    "a footer of 4 GB": ("rows.parquet", b"PAR1" + b"\0" * 20 + b"\xff\xff\xff\xffPAR1"),
    "a footer of noise": ("rows.parquet", b"PAR1" + b"\x15" * 64 + b"\x40\0\0\0PAR1"),
    "nothing as a table": ("rows.parquet", b""),
}
INDEXES = {
    "nothing": "",
    "another schema": '{"schema": "opdjax.references/9", "teacher": {}}\n',
    "nested lists": NESTED + "\n",
    "a line of 20 MB": '{"schema": "' + "x" * (20 << 20),
    "rows of numbers": '{"schema": "opdjax.references/1", "teacher": {}}\n3\n',
    "draws of texts": '{"schema": "opdjax.references/1", "teacher": {}}\n'
    '{"key": "a", "answers": [{"draw": "1"}]}\n',
    "the same draw twice": '{"schema": "opdjax.references/1", "teacher": {}}\n'
    + '{"key": "a", "answers": [{"draw": 1, "text": "x", "is_truncated": false}]}\n' * 2,
    "digits": '{"schema": "opdjax.references/1", "teacher": {}}\n{"key": ' + DIGITS + "}\n",
}


def tables(place):
    """Name -> a Parquet file of few bytes that expands to gigabytes."""
    import pyarrow
    import pyarrow.parquet

    def write(name, column, **options):
        table = pyarrow.table({"prompt": column})
        file = pathlib.Path(place, f"{name.replace(' ', '_')}.parquet")
        pyarrow.parquet.write_table(table, file, **options)
        return file

    same = pyarrow.DictionaryArray.from_arrays
    indices = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), 1 << 21)
    long, short = pyarrow.array(["x" * 200_000]), pyarrow.array(["x"])
    yield "two million rows of a letter", write("letters", same(indices, short))
    yield "gigabytes of a text", write("texts", same(indices[:200_000], long))
    yield "two thousand rows of 200 kB", write("rows", same(indices[:2000], long))
    whole = pyarrow.array(["x" * (70 << 20)])
    yield "a text of 70 MB", write("text", whole, compression="zstd", use_dictionary=False)


def rows(place):
    from opdjax.data.prompt_rows import read_prompts
    from opdjax.data.references import read_index

    place = pathlib.Path(place)
    for name, content in LINES.items():
        file = place / "rows.jsonl"
        file.write_text(content)
        yield name, "rows.jsonl", lambda: read_prompts(str(place / "rows.jsonl"))
    for name, (file, content) in BYTES.items():
        (place / file).write_bytes(content)
        yield name, file, lambda file=file: read_prompts(str(place / file))
    for name, content in INDEXES.items():
        (place / "index.jsonl").write_text(content)
        yield f"references: {name}", "index.jsonl", lambda: read_index(place / "index.jsonl")
    for name, file in tables(place):
        yield name, file.name, lambda file=file: read_prompts(str(file))
    os.mkfifo(place / "pipe.jsonl")
    yield "a pipe", "pipe.jsonl", lambda: read_prompts(str(place / "pipe.jsonl"))
    with (place / "sparse.json").open("wb") as sparse:
        sparse.write(b"[")
        sparse.truncate(1 << 40)
    yield "a terabyte as a list", "sparse.json", lambda: read_prompts(str(place / "sparse.json"))
    with (place / "sparse.jsonl").open("wb") as sparse:
        sparse.truncate(1 << 40)
    yield "a terabyte as a line", "sparse", lambda: read_prompts(str(place / "sparse.jsonl"))
    for name, features in {
        "a class of Python": {"pythonClassName": "antigravity.X", "featuresDict": {}},
        "a class by its older name": {"type": "this.X", "content": {}},
        "nested lists": NESTED,
        "a list": "[]",
        "nothing": "",
    }.items():
        stored = place / "stored"
        shutil.rmtree(stored, ignore_errors=True)
        stored.mkdir()
        (stored / "features.json").write_text(text(features))
        (stored / "dataset_info.json").write_text('{"name": "x", "version": "1.0.0"}')
        yield f"TFDS: {name}", "tfds:", lambda: read_prompts(f"tfds:{place}/stored#train")
    assert not {"antigravity", "this"} & sys.modules.keys()


# Answers to grade

LONG = 300_000
ANSWERS = {
    "boxes in boxes": r"\boxed{" * (LONG // 7),
    "boxes that close": r"\boxed{" * 20_000 + "1" + "}" * 20_000,
    "braces": "{" * LONG,
    "empty boxes": r"\boxed{}" * (LONG // 8),
    "hashes": "#" * LONG,
    "hashes and spaces": "# " * (LONG // 2),
    "digits": "1" * LONG,
    "groups of digits": "1,111" * (LONG // 5),
    "points": "1." * (LONG // 2),
    "colons": "1:" * (LONG // 2),
    "signs": "-" * LONG + "1",
    "fractions": r"\frac{1}{2}" * (LONG // 11),
    "powers": "#### " + "9^" * 900 + "9",
    "a power": "#### 9^9999999999",
    "an exponent": "#### 1e99999",
    "many products": "#### " + "1e30000*" * 200 + "1",
    "answers": "answer " * (LONG // 7),
    "answers and spaces": "answer is" + " " * LONG + "X",
    "answers of words": ("answer is is is " * (LONG // 16)),
    "letters": "(A) " * (LONG // 4),
    "stars": "**(" * (LONG // 3),
    "thoughts": "<think></think>" * (LONG // 15),
    "lines": "\n" * LONG,
    "half a character": "#### \ud800 42",
    "zero bytes": "\0" * LONG,
    "other digits": "#### \u0664\u0662" * 1000,
    "nothing": "",
}


def answers(place):
    from opdjax.data import isolated
    from opdjax.data.grading import grader_named

    isolated._SECONDS_PER_CALL = 0.5
    for name, answer in ANSWERS.items():
        for grader in ("gsm8k", "last_number", "choice", "exact"):
            grade = grader_named(grader)
            yield f"{grader}: {name}", None, lambda g=grade, a=answer: g(a, "42")
    slow = grader_named("regex:(a+)+$")
    yield "regex: backtracking", None, lambda: slow("a" * 60 + "b", "a")


# Paths and addresses

PATHS = {
    "spaces": "a b",
    "a line break": "a\nb",
    "a bell": "a\x07b",
    "a color": "a\x1b[31mb",
    "another script": "\u4f60\u597d",
    "written backwards": "a\u202eb",
    "half a character": "a\udcffb",
    "a NUL": "a\0b",
    "thousands of letters": "a" * 1000,
    "above": "../../../../../../etc/passwd",
    "a home that is none": "~nobody-here/x",
    "a device": "/dev/zero",
    "a dash": "--help",
    "nothing": "",
    "a dot": ".",
    "the root": "/",
    "a web address": "https://x.y/z",
    "a bucket of others": "s3://bucket/x",
    "a file address": "file:///etc/passwd",
}
ADDRESSES = ("file:///etc/passwd", "ftp://x/y", "javascript:alert(1)", "//x/y", "x", " http://x")
ADDRESSES += (
    "http://",
    "http://[::1",
    "http://a b/c",
    "http://x:99999/",
    "http://\0/",
    "http://x:y/",
)
ADDRESSES += ("http://" + "a" * 5000, "http://127.0.0.1:9/v1\r\nx: y", "http://%00/", "http://-/")


def addresses(place):
    import asyncio

    from opdjax.config.api import ApiConfig
    from opdjax.data.prompt_rows import read_prompts
    from opdjax.data.tokenizer import load_tokenizer
    from opdjax.judge.client import ApiClient
    from opdjax.models.hf import open_checkpoint

    os.environ["HF_HUB_OFFLINE"] = "1"
    for name, path in PATHS.items():
        yield f"a model: {name}", "", lambda path=path: open_checkpoint(path)
        if not os.path.isdir(path):  # transformers, which reads other files, takes seconds
            yield f"a tokenizer: {name}", "", lambda path=path: load_tokenizer(path)
        yield f"rows: {name}", "", lambda path=path: read_prompts(f"{path}.jsonl")
        yield f"a table: {name}", "", lambda path=path: read_prompts(f"parquet:{path}")

    yield "a model: no bucket", "", lambda: open_checkpoint("gs://")

    def asked(url):
        api = ApiConfig(base_url=url, max_retries=0, timeout=2.0)

        async def scenario():
            client = ApiClient({"judge": api.endpoint("judge", "m", "")}, api, None)
            try:
                return await client.complete("judge", [{"role": "user", "content": "x"}])
            finally:
                await client.close()

        return asyncio.run(scenario())

    for url in ADDRESSES:
        yield f"a judge: {url[:30]!r}", "", lambda url=url: asked(url)


GROUPS = {
    "configs": configs,
    "weights": weights,
    "tokenizers": tokenizers,
    "templates": templates,
    "rows": rows,
    "answers": answers,
    "addresses": addresses,
}


def spent():
    """(Seconds of CPU, largest megabytes) of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(each.ru_utime + each.ru_stime for each in used)
    return seconds, max(each.ru_maxrss for each in used) / 1024


def main(group, place):
    from opdjax.cli.main import is_user_error

    resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
    for name, words, attempt in GROUPS[group](place):
        (seconds, size), began = spent(), time.monotonic()
        kind = message = ""
        is_named = True
        try:
            attempt()
        except BaseException as error:
            kind, message = type(error).__name__, str(error)
            is_named = is_user_error(error)
            if isinstance(error, ValueError) and type(error) is ValueError:
                is_named = group in ("templates", "tokenizers")  # `prompt_ids` names the prompt
        after = spent()
        row = {"group": group, "name": name, "error": kind, "message": message[:3000]}
        row |= {"is_named": is_named, "words": words, "seconds": after[0] - seconds}
        row |= {"elapsed": time.monotonic() - began, "megabytes": after[1] - size}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
