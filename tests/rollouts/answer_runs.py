"""Runs on given answers, and changed copies of a checkpoint."""

import json
import shutil

from tiny_runs import vary

from opdjax.config import ModelConfig


def taught(completions_from="teacher", recipe="sft", **sections):
    """Two steps of four answers; some fields of some sections replaced."""
    changes = {
        "train": {"num_steps": 2, "prompts_per_step": 4},
        "log": {"samples_every": 1},
        "evaluation": {"source": None},
    }
    changes |= sections
    changes["sampling"] = {"completions_from": completions_from} | sections.get("sampling", {})
    return vary(estimator={"recipe": recipe}, **changes)


def copy_of(model, out, change):
    """A checkpoint directory with its JSON files changed by `change(file name, content)`."""
    shutil.copytree(model, out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((out / name).read_text())
        change(name, content)
        (out / name).write_text(json.dumps(content))
    return ModelConfig(str(out))


def swap_two_ids(name, content):
    """Exchange the ids of 98 and 99."""
    if name == "tokenizer.json":
        words = content["model"]["vocab"]
        words["98"], words["99"] = words["99"], words["98"]
