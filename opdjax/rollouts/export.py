"""The student of a run as a Hugging Face checkpoint that others use as the run did.

Its generation config and its chat template hold what the run sampled with, for any engine.
`opdjax.json` holds the rest of it, for `opdjax evaluate` and `opdjax sample`, and README.md
describes the run.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import pathlib
import re
from typing import Any

import jinja2

from opdjax.config import PACKAGE, Config, DataConfig
from opdjax.config.saved import upgrade
from opdjax.config.validation import from_dict, to_dict
from opdjax.data.chat import with_day
from opdjax.data.prompts import dated
from opdjax.data.tokenizer import load_tokenizer
from opdjax.models.decoder import Params
from opdjax.models.hf import Checkpoint, CheckpointError
from opdjax.models.hf_export import export, export_adapter
from opdjax.models.lora import continues
from opdjax.rollouts.setup import needs_teacher, stop_ids, student_view
from opdjax.runs.results import DIVERGENCES
from opdjax.runs.workdir import read_json, read_lines, read_run_config, write_json

RECORD = "opdjax.json"
_CARD = PACKAGE / "assets" / "model_card.jinja"


def export_student(
    params: Params,
    source: Checkpoint,
    config: Config,
    workdir: pathlib.Path,
    out: pathlib.Path,
    dtype: str,
    step: int,
) -> pathlib.Path:
    """Export the student after `step` to `out`, and its adapters, if it has any, to `OUT_adapter`;
    returns `out`. Adapters of a base that another adapter was merged into are in `out` alone.

    `workdir` holds the run's config.json and evaluations. CheckpointError if `out` is not new.
    """

    def describe(directory: pathlib.Path) -> None:
        (directory / "README.md").write_text(_model_card(config, workdir, step), "utf-8")

    def complete(directory: pathlib.Path) -> None:
        _write_use(directory, config, source)
        describe(directory)

    export(params, source, out, dtype, complete)
    if config.lora.rank and (source.adapter is None or continues(source, config.lora)):
        adapter = out.with_name(f"{out.name}_adapter")
        export_adapter(params, source, config.lora, config.student, adapter, describe)
    return out


def recorded_use(checkpoint: Checkpoint) -> Config | None:
    """How the run that exported a checkpoint used it: the sections `data`, `evaluation` and
    `train.dtype`; None if no run did. A grader of the user's own in it must not be run.
    """
    file = (checkpoint.adapter or checkpoint).path / RECORD
    advice = "delete it, and give its settings as options"
    if not file.exists() or read_json(file, advice).keys() == {"files"}:
        return None
    found = read_json(file, advice, "the settings of an exported student", config=dict)
    return from_dict(Config, upgrade(found["config"]))


def _write_use(directory: pathlib.Path, config: Config, source: Checkpoint) -> None:
    """Write what the run decided about the use of the student into an exported checkpoint."""
    tokenizer = load_tokenizer(source.path)
    data = dated(student_view(config.data), tokenizer, tokenizer)
    stops = stop_ids(source, tokenizer, config.sampling.stop_token_ids)
    # The checkpoint's own come first: engines pad with the first one.
    ids: Any = list(dict.fromkeys((*source.stop_token_ids, *stops)))
    ids = ids if len(ids) > 1 else ids[0]
    file = directory / "generation_config.json"
    generation = json.loads(file.read_text("utf-8")) if file.exists() else source.raw_config
    # The checkpoint's other settings, such as a repetition penalty, would change what is sampled.
    names = ("bos_token_id", "pad_token_id", "stop_strings")
    kept = {name: generation[name] for name in names if name in generation}
    used = config.sampling if config.evaluation.source is None else config.evaluation
    distribution = {name: getattr(used, name) for name in ("temperature", "top_p", "top_k")}
    length = {"max_new_tokens": used.max_completion_length}
    write_json(file, kept | {"eos_token_id": ids, "do_sample": True} | distribution | length)
    model = directory / "config.json"
    write_json(model, json.loads(model.read_text("utf-8")) | {"eos_token_id": ids})
    if tokenizer.chat_template is not None:
        _pin_templates(directory, tokenizer.chat_template, data)
    evaluation = dataclasses.replace(config.evaluation, grader=config.grader)
    own = dataclasses.replace(data, source=DataConfig().source, references=None)
    sections = {"data": to_dict(own), "evaluation": to_dict(evaluation)}
    sections["train"] = {"dtype": config.train.dtype}
    record_files(directory, {"config": sections})


def record_files(directory: pathlib.Path, record: dict[str, Any]) -> None:
    """Write opdjax.json: the record of an export, with the digest of each of its files."""
    write_json(directory / RECORD, record | {"files": _digests(directory, record)})


def check_files(directory: pathlib.Path) -> str:
    """Says how many files are as they were exported; CheckpointError that names those that changed
    or are missing.
    """
    file = directory / RECORD
    record = read_json(file, "export the checkpoint again") if file.exists() else {}
    if (known := record.pop("files", None)) is None:
        return "no digests to compare with: opdjax export writes them"
    found = _digests(directory, record)
    if changed := [name for name in known if found.get(name) != known[name]]:
        raise CheckpointError(
            f"{directory} is not what was exported: {', '.join(changed)} changed or missing; "
            f"export it again, or delete `files` in {file} if the change is yours"
        )
    return f"{len(known)} as exported"


def _digests(directory: pathlib.Path, record: dict[str, Any]) -> dict[str, str]:
    """By name: of the record itself too, not of README.md, which people edit."""
    found = {RECORD: hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()}
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.name not in (RECORD, "README.md"):
            with file.open("rb") as opened:
                found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def _pin_templates(directory: pathlib.Path, template: str, data: DataConfig) -> None:
    """Write the chat template, and one for tools, with the defaults of `data`."""
    now = pinned(template, data)
    if now == template:
        return
    file, own = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    found = json.loads(file.read_text("utf-8")) if file.exists() else {}
    named = found.pop("chat_template", None)
    if isinstance(named, list) and not own.exists():
        named = [each | {"template": pinned(each["template"], data)} for each in named]
        write_json(file, found | {"chat_template": named})
        return
    own.write_text(now, "utf-8")
    if named is not None:  # this file takes its place
        write_json(file, found)


def pinned(template: str, data: DataConfig) -> str:
    """The chat template with the day, system prompt and enable_thinking of `data` as defaults."""
    begin, thinking = "", data.student_template[1]
    if thinking is not None:
        begin += "{%- if enable_thinking is not defined %}{%- set enable_thinking = "
        begin += f"{str(thinking).lower()} %}}{{%- endif %}}"
    if data.system_prompt is not None:
        text = json.dumps(data.system_prompt, ensure_ascii=False)
        begin += "{%- if messages[0]['role'] != 'system' %}{%- set messages = "
        begin += f"[{{'role': 'system', 'content': {text}}}] + messages %}}{{%- endif %}}"
    if data.date is not None:
        template = with_day(template, datetime.date.fromisoformat(data.date))
    return begin + template


def _model_card(config: Config, workdir: pathlib.Path, step: int) -> str:
    """README.md of an exported student: models, recipe, data, scores and versions."""
    run = read_run_config(workdir)
    rows = [
        row
        for row in read_lines(workdir / "eval.jsonl")
        if row["step"] in (0, step) and row["temperature"] == config.evaluation.temperature
    ]
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_CARD.read_text("utf-8"))
    name, revision = config.student.place
    is_hub_id = not name.startswith("@") and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    base = name if is_hub_id and not pathlib.Path(name).exists() else None
    facts = {"base": base, "revision": revision, "step": step, "rows": rows}
    facts["has_teacher"] = needs_teacher(config)
    measured = [row for row in read_lines(workdir / "divergence.jsonl") if row["step"] == step]
    facts |= {"divergence": measured[-1] if measured else None, "labels": DIVERGENCES}
    return template.render(config=config, environment=run["environment"], **facts)
