"""tokenizer.json from the metadata of a GGUF file, by the file's own rules: its pieces, merges or
scores, and the pre-tokenizer that it names.
"""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # values of token_type

# Words of a text, by the name of the pre-tokenizer; digits are grouped by at most three or one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": None,
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "llama-bpe": tokenizers.Regex(_WORDS.replace("DIGITS", "{1,3}")),
    "qwen2": tokenizers.Regex(_WORDS.replace("DIGITS", "")),
}


def build_tokenizer(fields: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of the fields `tokenizer.ggml.*`, given without that prefix. ValueError for a
    kind that is not known here, KeyError for a field that is missing.
    """
    pieces, kinds = fields["tokens"], fields["token_type"]
    if len(pieces) != len(kinds) or len(set(pieces)) != len(pieces):
        raise ValueError(f"{len(pieces)} tokens, {len(kinds)} types; expected one of each a token")
    ids = {piece: i for i, (piece, kind) in enumerate(zip(pieces, kinds)) if kind != _UNUSED}
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if fields["model"] not in builders:
        raise ValueError(f"tokenizer.ggml.model {fields['model']!r}; expected {list(builders)}")
    tokenizer = builders[fields["model"]](fields, ids)
    for kind, is_special in ((_USER_DEFINED, False), (_CONTROL, True), (_UNKNOWN, True)):
        of_kind = [piece for piece, its in zip(pieces, kinds) if its == kind]
        tokenizer.add_tokens(
            [tokenizers.AddedToken(each, special=is_special, normalized=False) for each in of_kind]
        )
    if fields.get("add_bos_token", fields["model"] == "llama"):
        bos = fields["bos_token_id"]
        tokenizer.post_processor = processors.Sequence(
            [
                *([tokenizer.post_processor] if tokenizer.post_processor else []),
                processors.TemplateProcessing(
                    single=f"{pieces[bos]} $A", special_tokens=[(pieces[bos], bos)]
                ),
            ]
        )
    return tokenizer


def _byte_level(fields: dict[str, Any], ids: dict[str, int]) -> tokenizers.Tokenizer:
    """Merges of bytes, as in GPT-2 and its descendants."""
    name = fields.get("pre", "gpt-2")
    if name not in _SPLITS:
        raise ValueError(f"tokenizer.ggml.pre {name!r}; expected one of {list(_SPLITS)}")
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    # Llama 3 looks a whole word up before it merges.
    model = models.BPE(ids, merges, ignore_merges=name == "llama-bpe")
    tokenizer, split = tokenizers.Tokenizer(model), _SPLITS[name]
    is_pattern = isinstance(split, tokenizers.Regex)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(split, "isolated") if is_pattern else split] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not is_pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any], ids: dict[str, int]) -> tokenizers.Tokenizer:
    """Merges of characters, best score first, and bytes for what no piece covers, as in Llama 2."""
    pieces, scores = fields["tokens"], fields["scores"]
    merges = []
    for piece, rank in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-scores[rank], ids[left], ids[right], (left, right)))
    unknown = pieces[fields.get("unknown_token_id", 0)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            ids,
            [merge[-1] for merge in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = fields.get("add_space_prefix", True)
    space = [normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
