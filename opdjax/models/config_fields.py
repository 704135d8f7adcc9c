"""Fields of `config.json`, read with their types and bounds, and the rotation that they describe.

A value that the decoder does not implement is refused with the field's name.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from opdjax.models.rope import Rope, yarn_attention_factor
from opdjax.runs.bounds import MODEL_SIZE, BoundedError


class UnsupportedModelError(BoundedError):
    """The decoder does not implement the checkpoint's architecture or one of its options."""


_LARGEST = 1e12  # of a config's numbers with a point: beyond it float32 loses what they describe


@dataclasses.dataclass(frozen=True)
class Fields:
    """An object of `config.json`; null fields count as absent. KeyError without a default."""

    values: dict[str, Any]
    within: str = ""

    def has(self, name: str) -> bool:
        """Whether the field is set, and not to null."""
        return self.values.get(name) is not None

    def number(self, name: str, default: float | None = None, least: float = 1e-12) -> float:
        """The field, an integer or a number with a point."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not least <= value <= _LARGEST:
            self.refuse(name, f"a positive number, from {least:g} to {_LARGEST:g}")
        return float(value)

    def integer(
        self, name: str, default: int | None = None, least: int = 1, most: int = MODEL_SIZE
    ) -> int:
        """The field, an integer from `least` to `most`."""
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(name, f"an integer of at least {least} and at most {most}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        """The field, true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def _get(self, name: str, default: Any) -> Any:
        if not self.has(name) and default is None:
            raise KeyError(self.within + name)
        return self.values[name] if self.has(name) else default

    def expect(self, name: str, expected: Any, reason: str) -> None:
        """Refuse any value but the one that the decoder implements."""
        if self.has(name) and self.values[name] != expected:
            self.refuse(name, f"{json.dumps(expected)} ({reason})")

    def refuse(self, name: str, expected: str) -> None:
        """UnsupportedModelError that names the field, its value and what was expected."""
        raise UnsupportedModelError(
            f"config.json sets {self.within}{name} {self.values[name]!r}; expected {expected}"
        )


def _read_original_length(rope: Fields, config: Fields) -> int:
    """As in transformers: the field next to the rope object wins over the one inside it."""
    name = "original_max_position_embeddings"
    owner = config if config.has(name) else rope
    return owner.integer(name) if owner.has(name) else config.integer("max_position_embeddings")


def _read_llama3(rope: Fields, config: Fields) -> dict[str, Any]:
    slow, fast = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if fast <= slow:
        rope.refuse("high_freq_factor", f"more than low_freq_factor, {slow}")
    length = _read_original_length(rope, config)
    factor, rotations = rope.number("factor"), {"slow_rotations": slow, "fast_rotations": fast}
    return {"factor": factor, "original_length": length, **rotations}


def _read_yarn(rope: Fields, config: Fields) -> dict[str, Any]:
    factor, names = rope.number("factor"), ("mscale", "mscale_all_dim")
    scales = [rope.number(name) if rope.has(name) else None for name in names]
    return {
        "factor": factor,
        "original_length": _read_original_length(rope, config),
        "slow_rotations": rope.number("beta_slow", 1.0),
        "fast_rotations": rope.number("beta_fast", 32.0),
        "rounds_range": rope.boolean("truncate", True),
        "attention_factor": rope.number("attention_factor", yarn_attention_factor(factor, *scales)),
    }


_ROPE_READERS = {
    "default": lambda rope, config: {},
    "linear": lambda rope, config: {"factor": rope.number("factor")},
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}
_IMPURE = (
    "the frequencies of this kind depend on the longest sequence in the batch, so cached tokens "
    "would disagree with a full forward"
)
_IMPURE_ROPES = {
    "dynamic": f"{_IMPURE}; up to max_position_embeddings tokens it equals 'default', which you "
    "may write instead",
    "longrope": _IMPURE,
}


def read_rope(raw: dict[str, Any], default_theta: float | None, is_partial: bool = False) -> Rope:
    """transformers 5 writes `rope_parameters`, older versions `rope_scaling` and `rope_theta`."""
    written = [name for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    written = written or ["rope_parameters"]
    ropes = [_read_written_rope(raw, name, default_theta, is_partial) for name in written]
    if ropes[0] != ropes[-1]:
        same = f"the same as rope_parameters, {raw['rope_parameters']!r}"
        Fields(raw).refuse("rope_scaling", f"{same}, or only one of the two")
    return ropes[0]


def _read_written_rope(
    raw: dict[str, Any], name: str, default_theta: float | None, is_partial: bool
) -> Rope:
    config, values = Fields(raw), raw.get(name) or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        config.refuse(name, "one flat object, the same for every layer")
    rope = Fields(values, f"{name}.")
    spelling = "rope_type" if "rope_type" in values or "type" not in values else "type"
    kind = values.get(spelling, "default")
    if not isinstance(kind, str) or kind not in _ROPE_READERS:
        reason = f"; {_IMPURE_ROPES[kind]}" if str(kind) in _IMPURE_ROPES else ""
        rope.refuse(spelling, f"one of {sorted(_ROPE_READERS)}{reason}")
    rotated = 1.0
    for fields in (config, rope):  # the inner factor wins
        if is_partial:
            rotated = fields.number("partial_rotary_factor", rotated)
        else:
            fields.expect("partial_rotary_factor", 1, "all dimensions of a head are rotated")
    owner = rope if rope.has("rope_theta") else config
    if not owner.has("rope_theta") and default_theta is None:  # a silent default would be wrong
        raise UnsupportedModelError(
            "config.json has neither rope_parameters.rope_theta nor rope_theta; add the base "
            "frequency"
        )
    theta = owner.number("rope_theta", default_theta, least=1.001)
    return Rope(theta, kind, rotated=rotated, **_ROPE_READERS[kind](rope, config))
