"""Built-in instructions without answers: templates filled with topics, for students and teachers
that were trained to follow instructions.

`train` and `validation` share topics and templates but no instruction; the topics and the templates
of `test` occur in neither, so that it measures generalisation.
"""

from __future__ import annotations

import importlib.resources
import random

import yaml

SPLITS = ("train", "validation", "test")
_VALIDATION = 256  # instructions
_SEED = 0


def instructions(split: str) -> list[str]:
    """The distinct instructions of a split in a mixed order, always the same ones: `train` 3384,
    `validation` 256, `test` 252. ValueError on another name.
    """
    if split not in SPLITS:
        raise ValueError(f"instructions has no split {split!r}; expected one of {list(SPLITS)}")
    file = importlib.resources.files("opdjax") / "assets" / "instructions.yaml"
    words, part = yaml.safe_load(file.read_text("utf-8")), "test" if split == "test" else "train"
    found = [
        template.format(topic=topic)
        for group in words["groups"].values()
        for template in words["general"][part] + group["templates"][part]
        for topic in group[part]
    ]
    random.Random(_SEED).shuffle(found)
    return {"train": found[_VALIDATION:], "validation": found[:_VALIDATION], "test": found}[split]
