"""GGUF files: tensors, settings and ids are what transformers and the file's own rules give; a file
that is damaged or of another kind is refused by name.
"""

import contextlib
import itertools
import json
import random
import unicodedata

import gguf
import numpy as np
import pytest
import regex
import tokenizers
from safetensors.numpy import load_file

from opdjax.data.tokenizer import load_tokenizer
from opdjax.models.families import UnsupportedModelError
from opdjax.models.gguf_tokenizer import build_tokenizer
from opdjax.models.hf import CheckpointError, load_params, open_checkpoint
from opdjax.models.rope import Rope, inverse_frequencies

TEXT = (
    "Ein schöner Tag, 12345 naïve cafés; don't we'LL They've  x=3.14\n\n\tdef f(a_b):\r\n  return "
    "[a,b]\n   日本語のテキスト 한국어 🙂 e\u0301 é Ⅳ ½ ٣٤٥ 1234567890 …\u00a0nbsp ﬁ \u2028 end  "
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL = ["<|unk|>", "<|bos|>", "<|eos|>", "<|eot|>"]


@pytest.fixture(scope="module")
def pieces():
    """Pieces and merges of a small byte-level BPE."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT * 3], vocab_size=400, min_frequency=1)
    model = json.loads(trained.to_str())["model"]
    ids = sorted(model["vocab"], key=model["vocab"].get)
    return SPECIAL + ids, [" ".join(merge) for merge in model["merges"]]


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("OPDJAX_SCRATCH", str(tmp_path / "scratch"))


def quantized(rng, rows, columns, kind):
    """Random blocks of a kind, with the kind; scales are small numbers."""
    if kind not in ("Q4_K", "Q6_K"):
        values = rng.normal(0, 0.1, (rows, columns)).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    scales = np.full((rows, columns // block, 1), 0.001, np.float16).view(np.uint8)
    for start in {"Q4_K": (0, 2), "Q6_K": (size - 2,)}[kind]:
        data[..., start : start + 2] = scales
    return data.reshape(rows, -1)


def write(path, architecture, pieces, kinds, *, tied=False, metadata=(), tensors=(), pre="qwen2"):
    """A model of two layers with random weights; `metadata` is added as (method, arguments)."""
    tokens, merges = pieces
    writer, rng = gguf.GGUFWriter(path, architecture), np.random.default_rng(0)
    width, heads, kv_heads, inner = 256, 4, 2, 256
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    head_size = 128 if architecture == "qwen3" else width // heads  # transformers expects 128
    writer.add_key_length(head_size)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kind = gguf.TokenType
    types = [kind.UNKNOWN, *[kind.CONTROL] * 3] + [kind.NORMAL] * (len(tokens) - 4)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|eot|>{% endfor %}")
    for method, arguments in metadata:
        getattr(writer, method)(*arguments)
    choose = iter(kinds * 40)

    def matrix(name, rows, columns=width):
        chosen = next(choose)
        data = quantized(rng, rows, columns, chosen)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[chosen])

    vector = lambda name, size=width: writer.add_tensor(
        name, rng.normal(1, 0.1, size).astype(np.float32)
    )
    matrix("token_embd.weight", len(tokens))
    vector("output_norm.weight")
    if not tied:
        matrix("output.weight", len(tokens))
    for layer in range(2):
        at = f"blk.{layer}."
        vector(f"{at}attn_norm.weight")
        vector(f"{at}ffn_norm.weight")
        for part, heads_of in {"q": heads, "k": kv_heads, "v": kv_heads}.items():
            rows = heads_of * head_size
            matrix(f"{at}attn_{part}.weight", rows)
            if architecture == "qwen2":
                vector(f"{at}attn_{part}.bias", rows)
        matrix(f"{at}attn_output.weight", width, heads * head_size)
        if architecture == "qwen3":
            vector(f"{at}attn_q_norm.weight", head_size)
            vector(f"{at}attn_k_norm.weight", head_size)
        for part, rows in {"gate": inner, "up": inner, "down": width}.items():
            matrix(f"{at}ffn_{part}.weight", rows)
    for name, values in tensors:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]


@pytest.mark.parametrize(("architecture", "tied"), [("llama", 1), ("qwen2", 0), ("qwen3", 0)])
def test_tensors_and_logits_are_those_of_transformers(
    tmp_path, pieces, architecture, tied, our_logits, torch_logits
):
    import torch
    import transformers

    torch.set_num_threads(1)
    file = write(tmp_path / "tiny.gguf", architecture, pieces, KINDS, tied=tied)
    checkpoint = open_checkpoint(file)
    config = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, quantization_config=config
    )
    wanted = {name: value.float().numpy() for name, value in model.state_dict().items()}
    found = load_file(checkpoint.path / "model.safetensors")
    assert wanted.keys() - found.keys() == ({"lm_head.weight"} if tied else set())
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[name], err_msg=name)
    rows = np.arange(4, 24)[None], np.ones((1, 20), int)
    logits = our_logits(load_params(checkpoint, "float32"), checkpoint.config, *rows)
    np.testing.assert_allclose(logits, torch_logits(model, *rows), rtol=2e-4, atol=2e-4)


def test_a_file_is_converted_once_for_each_of_its_versions(tmp_path, pieces):
    file = write(tmp_path / "tiny.gguf", "llama", pieces, ["F32"])
    first = open_checkpoint(file).path
    made = (first / "config.json").stat().st_mtime_ns
    assert open_checkpoint(str(file)).path == first
    assert (first / "config.json").stat().st_mtime_ns == made
    write(file, "llama", pieces, ["F16"])
    assert open_checkpoint(file).path != first
    assert not list(first.parent.glob("*.partial*"))


# Rotary frequencies and stop ids


def test_scaled_rotary_frequencies_are_read(tmp_path, pieces):
    rope = Rope(50000.0, "llama3", 32.0, 8192, 1.0, 4.0)
    factors = inverse_frequencies(Rope(50000.0), 64) / inverse_frequencies(rope, 64)
    at = lambda name, **more: (
        open_checkpoint(
            write(tmp_path / f"{name}.gguf", "llama", pieces, ["F16"], **more)
        ).config.rope
    )
    assert at("factors", tensors=[("rope_freqs.weight", factors)]) == rope
    linear = [
        ("add_rope_scaling_type", (gguf.RopeScalingType.LINEAR,)),
        ("add_rope_scaling_factor", (4.0,)),
    ]
    assert at("linear", metadata=linear) == Rope(50000.0, "linear", 4.0)
    yarn = [
        ("add_rope_scaling_type", (gguf.RopeScalingType.YARN,)),
        ("add_rope_scaling_factor", (4.0,)),
        ("add_rope_scaling_orig_ctx_len", (128,)),
    ]
    found = at("yarn", metadata=yarn)
    assert (found.kind, found.factor, found.original_length) == ("yarn", 4.0, 128)


def test_both_ends_of_a_turn_stop_an_answer(tmp_path, pieces):
    file = write(
        tmp_path / "tiny.gguf", "llama", pieces, ["F16"], metadata=[("add_eot_token_id", (3,))]
    )
    assert open_checkpoint(file).stop_token_ids == (2, 3)


# Tokenizers


def bpe_ids(text, tokens, merges, words):
    """The file's own rules, slowly: special tokens first, then the best merge of each word until
    none is left. `words(text)` splits.
    """
    to_byte = {byte: char for char, byte in gpt2_bytes().items()}
    ids, rank = {t: i for i, t in enumerate(tokens)}, {m: i for i, m in enumerate(merges)}
    found = []
    for part in regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text):
        if part in SPECIAL:
            found.append(ids[part])
            continue
        for word in words(part):
            parts = [to_byte[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = [f"{a} {b}" for a, b in itertools.pairwise(parts)]
                best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
                if best not in rank:
                    break
                at = pairs.index(best)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            found += [ids[each] for each in parts]
    return found


def gpt2_bytes():
    """Printable character -> the byte that it stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def single_digits(text):
    parts = regex.findall(r"\p{N}|\P{N}+", text)
    return [word for part in parts for word in regex.findall(GPT2, part)]


SPLITTERS = {
    "gpt-2": lambda text: regex.findall(GPT2, text),
    "smollm": single_digits,
    "llama-bpe": lambda text: regex.findall(WORDS, text),
    "qwen2": lambda text: regex.findall(
        WORDS.replace("{1,3}", ""), unicodedata.normalize("NFC", text)
    ),
}


@pytest.mark.parametrize("pre", SPLITTERS)
def test_ids_are_those_of_the_rules_in_the_file(tmp_path, pieces, pre):
    file = write(tmp_path / "tiny.gguf", "llama", pieces, ["F16"], pre=pre)
    tokenizer = load_tokenizer(open_checkpoint(file).path)
    draw = random.Random(0)
    texts = [TEXT] + ["".join(draw.choices(TEXT, k=60)) + "<|eot|> x" for _ in range(60)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == bpe_ids(text, *pieces, SPLITTERS[pre]), text
        if pre != "qwen2":  # which composes characters
            assert tokenizer.decode(ids) == text
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message) == "hi<|eot|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_sentencepiece_merges_the_pair_of_the_best_score(tmp_path, pieces):
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc", "cab"]
    scores = [0.0] * len(texts) + [-9, -9, -9, -9, -2, -1, -3, -4, -5, -6]
    kind = gguf.TokenType
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256 + [kind.NORMAL] * 10
    fields = {
        "model": "llama",
        "tokens": texts + words,
        "token_type": [int(each) for each in types],
        "scores": scores,
        "bos_token_id": 1,
        "unknown_token_id": 0,
    }
    encode = lambda text, **more: build_tokenizer(fields | more).encode(text).tokens
    # `bc` comes first, then `▁a` before `abc`; what no piece covers becomes bytes.
    assert encode("abc ab") == ["<s>", "▁a", "bc", "▁ab"]
    assert encode("é", add_bos_token=False) == ["▁", "<0xC3>", "<0xA9>"]
    assert encode("ab", add_space_prefix=False, add_bos_token=False) == ["ab"]
    tokenizer = build_tokenizer(fields)
    assert tokenizer.decode(tokenizer.encode("abc é ab").ids) == "abc é ab"


# Refusals


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": "gemma3"}, "its architecture is 'gemma3'"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre 'deepseek-llm'"),
        ({"metadata": [("add_rope_dimension_count", (32,))]}, "rope.dimension_count is 32"),
        ({"metadata": [("add_rope_scaling_type", (gguf.RopeScalingType.LONGROPE,))]}, "longrope"),
        ({"metadata": [("add_sliding_window", (4096,))]}, "attention.sliding_window is 4096"),
        ({"tensors": [("rope_freqs.weight", np.ones(32, "f") * 3)]}, "none of the factors"),
        ({"tensors": [("blk.0.ffn_gate_inp.weight", np.ones((8, 256), "f"))]}, "ffn_gate_inp"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(tmp_path, pieces, change, expected):
    change = {"architecture": "llama"} | change
    file = write(tmp_path / "other.gguf", change.pop("architecture"), pieces, ["F16"], **change)
    with pytest.raises(CheckpointError, match=regex.escape(expected)):
        load_params(open_checkpoint(file), "float32")


def test_a_damaged_file_is_refused_by_name(tmp_path, pieces):
    whole = write(tmp_path / "whole.gguf", "llama", pieces, ["Q8_0"]).read_bytes()
    draw, damaged = random.Random(0), tmp_path / "damaged.gguf"
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "absent.gguf")
    cuts = [0, 3, 20, *(draw.randrange(len(whole)) for _ in range(10)), len(whole) - 1]
    for content in [whole[:cut] for cut in cuts] + [b"{}" * 100, whole[::-1]]:
        damaged.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged.gguf"):
            open_checkpoint(damaged)
    for _ in range(40):  # a changed byte of the header: refused, or another value of a setting
        at = draw.randrange(2000)
        damaged.write_bytes(whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :])
        with contextlib.suppress(CheckpointError, UnsupportedModelError):
            load_params(open_checkpoint(damaged), "float32")
