r"""Exact values of numbers as they are written: `$1,234.50`, `\frac{1}{3}`, `2^{88}`."""

from __future__ import annotations

import re
from fractions import Fraction

_MAX_CHARS, _MAX_BITS, _MAX_DEPTH = 2000, 100_000, 50  # an answer beyond them is no plain number
_SPACE = r"(?:[ \u00a0\u2009\u202f']|\\,|\\ )"
_DIGITS = rf"(?:[0-9]{{1,3}}(?:(?:,|\{{,\}}|{_SPACE})[0-9]{{3}})+(?![0-9])|[0-9]+)"
_NUMBER = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,5}}(?![0-9]))?"
_TOKEN = re.compile(rf"\s*({_NUMBER}|\\frac|[-+*/^(){{}}])")
_SEPARATOR = re.compile(rf",|\{{,\}}|{_SPACE}")
_SAME = {  # ways to write the same sign; longer ones first
    r"\left": "",
    r"\right": "",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cdot": "*",
    r"\times": "*",
    r"\!": "",
    r"\$": "",
    "$": "",
    "€": "",
    "£": "",
    "¥": "",
    "−": "-",
    "–": "-",
    "×": "*",
    "·": "*",
}
# A number inside of prose. A minus after a digit, a letter or a bracket is an operator, not a sign.
_SIGN = r"(?:(?<![0-9A-Za-z)\]}])[-+−–])?"
_WRITTEN = re.compile(
    rf"{_SIGN}(?:\\?[$€£¥])?{_SIGN}"
    rf"(?:\\[dt]?frac(?:{{[^{{}}]{{1,50}}}}){{2}}|(?<![\w.]){_NUMBER}|(?<=[^\w.]\.){_NUMBER})"
    r"(?:[:/^][-−]?(?:{-?[0-9.]+}|[0-9.]+))*(?:[.,][0-9]+)*"
)


def rational(text: str) -> Fraction | None:
    r"""The exact value of a number, or of a product, fraction or power of numbers; else None.

    Thousands may be separated by commas or spaces, in groups of three. Sums are not evaluated, and
    neither is anything longer than 2,000 characters or larger than 2^100,000.
    """
    if len(text) > _MAX_CHARS or ("," in text and "(" in text):  # (1,234) may be a point
        return None
    for written, sign in _SAME.items():
        text = text.replace(written, sign)
    tokens, end = [], 0
    text = text.strip()
    while end < len(text):
        match = _TOKEN.match(text, end)
        if match is None:
            return None
        tokens.append(match[1])
        end = match.end()
    try:
        value, rest = _signed(tokens, 0, 0)
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return value if rest == len(tokens) else None


def numbers_in(text: str) -> list[str]:
    """The numbers of a text as they are written, in order; some may have no value (`3:30`)."""
    return [match[0] for match in _WRITTEN.finditer(text)]


def _signed(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    """The value that starts at a token, and where it ends; ValueError or IndexError if none."""
    if depth > _MAX_DEPTH:
        raise ValueError(depth)
    sign = 1
    while tokens[at] in ("+", "-"):
        sign, at = -sign if tokens[at] == "-" else sign, at + 1
    value, at = _power(tokens, at, depth)
    while at < len(tokens) and tokens[at] in ("*", "/"):
        other, end = _power(tokens, at + 1, depth)
        value, at = _bounded(value * other if tokens[at] == "*" else value / other), end
    return sign * value, at


def _power(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    base, at = _atom(tokens, at, depth)
    if at == len(tokens) or tokens[at] != "^":
        return base, at
    sign = -1 if tokens[at + 1] == "-" else 1
    exponent, at = _atom(tokens, at + 1 + (sign < 0), depth)
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) * size > _MAX_BITS:
        raise ValueError(exponent)
    return base ** (sign * int(exponent)), at


def _atom(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    token = tokens[at]
    if token == r"\frac":
        above, at = _argument(tokens, at + 1, depth)
        below, at = _argument(tokens, at, depth)
        return above / below, at
    if token in ("(", "{"):
        value, at = _signed(tokens, at + 1, depth + 1)
        if tokens[at] != {"(": ")", "{": "}"}[token]:
            raise ValueError(tokens[at])
        return value, at + 1
    return _bounded(_value(token)), at + 1


def _argument(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    """An argument of `\\frac`: in braces. `\\frac12` is left to math-verify."""
    if tokens[at] != "{":
        raise ValueError(tokens[at])
    return _atom(tokens, at, depth)


def _value(token: str) -> Fraction:
    number, _, exponent = _SEPARATOR.sub("", token).lower().partition("e")
    if abs(int(exponent or 0)) * 4 > _MAX_BITS:
        raise ValueError(token)
    return Fraction(number.rstrip(".")) * Fraction(10) ** int(exponent or 0)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ValueError("too large")
    return value
