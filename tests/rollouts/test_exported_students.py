"""An exported student is used as its run used it: by `opdjax evaluate`, `opdjax sample` and
transformers.
"""

import dataclasses
import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
from tiny_runs import vary

from opdjax.cli.export import export_step, push
from opdjax.cli.main import main
from opdjax.config import (
    MINI_PAIR,
    MINI_STUDENT,
    MINI_TEACHER,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
)
from opdjax.config.validation import ConfigError
from opdjax.data.chat import render, valid_vocab
from opdjax.data.prompts import collate, encode_prompts, load_rows
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import sample
from opdjax.models.hf import CheckpointError, load_params, open_checkpoint
from opdjax.rollouts import one_model
from opdjax.rollouts.export import export_student, pinned, recorded_use
from opdjax.rollouts.one_model import describe, load
from opdjax.rollouts.setup import facts, prepare, stop_ids
from opdjax.runs.results import DIVERGENCES
from opdjax.runs.workdir import append_lines, claim, read_lines
from opdjax.train import train

ONCE = vary(
    train={"num_steps": 1},
    evaluation={"num_prompts": 8, "temperatures": (1.0,)},
    log={"samples_every": 0},
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The mini student as a base model is published: its end of text ends no turn of its template,
    and its generation config has settings that opdjax does not sample with.
    """
    directory = tmp_path_factory.mktemp("base") / "student"
    shutil.copytree(MINI_PAIR / "student", directory)
    for name, changed in {
        "config.json": {"eos_token_id": 0},
        "generation_config.json": {
            "eos_token_id": 0,
            "temperature": 0.6,
            "top_k": 20,
            "repetition_penalty": 3.0,
            "max_length": 30,
        },
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
    }.items():
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return directory


@pytest.fixture(scope="module")
def of_base(base):
    """A run of the base model in which everything that changes how a student is used is set."""
    return vary(
        ONCE,
        student={"path": str(base)},
        data={
            "format": "no_thinking",
            "system_prompt": "0=0",
            "prompt_format": "0+{prompt}",
            "max_prompt_length": 64,
        },
        sampling={"stop_token_ids": (2,)},
        evaluation={"top_k": 5, "temperatures": (0.7,)},
    )


@pytest.fixture(scope="module")
def exported(of_base, tmp_path_factory):
    """The untrained student, exported as that of the run."""
    workdir = tmp_path_factory.mktemp("exported")
    setup = prepare(of_base)
    claim(workdir, setup.config, facts(setup))
    scores = {"step": 0, "temperature": 0.7, "k": 2, "num_prompts": 8}
    scores |= {"avg@k": 0.25, "avg@k_interval": 0.125, "pass@k": 0.5, "pass@k_interval": 0.25}
    append_lines(workdir / "eval.jsonl", [scores])
    means = dict.fromkeys(DIVERGENCES, 0.5) | {f"{name}_interval": 0.25 for name in DIVERGENCES}
    counts = {"step": 0, "temperature": 0.7, "num_prompts": 8, "n": 2}
    both = {"student": means, "teacher": means | {"forward_kl": 0.75}}
    append_lines(workdir / "divergence.jsonl", [counts | both, counts | both | {"step": 1}])
    params = load_params(setup.student, "float32")
    student = (params, setup.student, setup.config, workdir, workdir / "student", "float32", 0)
    return export_student(*student)


@pytest.fixture(scope="module")
def trained(of_base, tmp_path_factory):
    """Work directory of the run."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(of_base, workdir)
    return workdir


def evaluated(directory, tmp_path, *options):
    """The scores that `opdjax evaluate DIRECTORY` writes."""
    file = tmp_path / "scores.json"
    main_with("evaluate", *options, directory, "--output", file)
    return json.loads(file.read_text())


def main_with(*words):
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr("sys.argv", ["opdjax", *map(str, words)])
        main()


def assert_scores_of_the_run(scores, workdir):
    last = read_lines(workdir / "eval.jsonl")[-1]
    for name in ("per_prompt", "per_prompt_greedy", "length_mean", "temperature", "avg@k"):
        assert scores[name] == last[name], name


def test_evaluate_repeats_the_last_evaluation_of_the_run(tiny_run, tmp_path, capsys):
    scores = evaluated(tiny_run / "student", tmp_path)
    assert_scores_of_the_run(scores, tiny_run)
    assert "settings not given are those of" in capsys.readouterr().err


@pytest.mark.long
def test_evaluate_repeats_the_last_evaluation_with_other_stop_ids(trained, tmp_path):
    scores = evaluated(trained / "student", tmp_path)
    assert_scores_of_the_run(scores, trained)
    assert scores["length_mean"] < 20  # answers end where the run stopped


def test_options_win_over_those_of_the_run_wherever_they_stand(exported, of_base, monkeypatch):
    seen = []

    def scores_of(config):
        seen.append(config)
        raise ConfigError("seen")

    monkeypatch.setattr(one_model, "scores_of", scores_of)
    given = ("--evaluation.num-prompts", 3)
    for words in ((exported, *given), (*given, exported), (MINI_STUDENT,)):
        with pytest.raises(SystemExit):
            main_with("evaluate", *words)
    wanted = dataclasses.replace(of_base.evaluation, grader="gsm8k", num_prompts=3)
    assert [config.evaluation for config in seen[:2]] == [wanted, wanted]
    assert seen[0].data.system_prompt == "0=0"
    assert (seen[2].data, seen[2].evaluation) == (DataConfig(), EvaluationConfig())


CASES = {
    "lora": {"lora": LoraConfig(rank=4)},
    "bfloat16": {"train": {"dtype": "bfloat16"}},
    "raw": {"data": {"format": "raw"}},
    "teacher_reads_more": {"data": {"teacher_prompt_format": "{prompt} {answer}"}},
    "filter": {"evaluation": {"top_p": 0.7}},
    "opd": {"estimator": {"recipe": "opd"}},
    "full_kl": {"estimator": {"recipe": "full_kl"}},
    "topk_kl": {"estimator": {"recipe": "topk_kl"}},
    "npd": {"estimator": {"recipe": "npd"}},
    "sft": {"estimator": {"recipe": "sft"}, "sampling": {"completions_from": "teacher"}},
    "grpo": {"estimator": {"recipe": "grpo"}, "sampling": {"num_generations": 2}},
}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_evaluate_repeats_the_last_evaluation_with(name, tmp_path):
    lora = {"lora": CASES[name]["lora"]} if "lora" in CASES[name] else {}
    sections = {key: value for key, value in CASES[name].items() if key != "lora"}
    train(dataclasses.replace(vary(ONCE, **sections), **lora), tmp_path / "run")
    scores = evaluated(tmp_path / "run" / "student", tmp_path)
    assert_scores_of_the_run(scores, tmp_path / "run")
    again = export_step(tmp_path / "run", "latest", tmp_path / "again", None)
    for file in (tmp_path / "run" / "student").iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_other_engines_find_what_the_run_sampled_with(exported, of_base):
    read = lambda name: json.loads((exported / name).read_text())
    assert read("generation_config.json") == {
        "pad_token_id": 0,
        "eos_token_id": [0, 2],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 5,
        "max_new_tokens": 20,
    }
    assert read("config.json")["eos_token_id"] == [0, 2]
    assert read("config.json")["dtype"] == "float32"
    use = recorded_use(open_checkpoint(exported))
    assert use.data.prompt_format == "0+{prompt}"
    assert use.evaluation == dataclasses.replace(of_base.evaluation, grader="gsm8k")
    assert load(exported).data == use.data  # for opdjax sample, and in Python


def test_the_prompt_of_the_run_is_the_default_of_the_exported_template(exported, of_base):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "0+3+4="}]
    options = {"format": "chat", "system_prompt": "0=0", "enable_thinking": False}
    wanted = render("0+3+4=", load_tokenizer(of_base.student.path), **options)
    theirs = AutoTokenizer.from_pretrained(exported)
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs.encode(found, add_special_tokens=False) == wanted
    ours, defaults = load_tokenizer(exported), {"system_prompt": None, "enable_thinking": None}
    assert render("0+3+4=", ours, **(options | defaults)) == wanted
    assert render("0+3+4=", ours, **options) == wanted  # not a second time


def test_a_pinned_template_keeps_the_day_of_the_run():
    template = "{{ strftime_now('%d %b %Y') }}|{{ strftime_now( \"%Y-%m-%d\" ) }}"
    assert pinned(template, DataConfig()) == template
    data = DataConfig(date="2024-07-26")
    assert pinned(template, data) == '{{ "26 Jul 2024" }}|{{ "2024-07-26" }}'


@pytest.mark.long
@pytest.mark.xdist_group("torch")
def test_transformers_stops_where_the_run_stops(trained, of_base):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    directory = trained / "student"
    checkpoint, tokenizer = open_checkpoint(directory), load_tokenizer(directory)
    rows = load_rows(of_base.data, tokenizer)[:8]
    prompts = encode_prompts(rows, recorded_use(checkpoint).data, tokenizer, tokenizer)
    batch = collate(prompts, np.arange(8))
    stops, width = stop_ids(checkpoint, tokenizer), valid_vocab(tokenizer)
    decoding = Decoding(20, stops, temperature=0.0, valid_vocab=width)
    params = load_params(checkpoint, "float32")
    ours = jax.device_get(sample(params, batch, 0, 0, config=checkpoint.config, decoding=decoding))
    model = AutoModelForCausalLM.from_pretrained(directory)
    their_tokenizer = AutoTokenizer.from_pretrained(directory)
    for row in range(8):
        messages = [{"role": "user", "content": f"0+{rows[row].prompt}"}]
        text = their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor([their_tokenizer.encode(text, add_special_tokens=False)])
        theirs = model.generate(ids, do_sample=False)[0, ids.shape[1] :]
        answer = np.asarray(ours.tokens)[row][np.asarray(ours.mask)[row]]
        np.testing.assert_array_equal(theirs.numpy(), answer)
    assert not ours.is_truncated.all()


def test_a_model_card_describes_the_run(exported):
    card = (exported / "README.md").read_text()
    for text in (
        "library_name: transformers",
        "`@mini_teacher`",
        "`vopd`",
        "`arithmetic:train[:64]`, format `no_thinking`",
        "| 0 | 0.2500 ± 0.1250 | 0.5000 ± 0.2500 |  |",
        "| KL(S \\|\\| T) | 0.5000 ± 0.2500 | 0.5000 ± 0.2500 |\n"
        "| KL(T \\|\\| S) | 0.5000 ± 0.2500 | 0.7500 ± 0.2500 |\n",
        "Each prompt was shown as `0+{prompt}`.",
        "jax " + jax.__version__,
    ):
        assert text in card, card
    assert card.count("± 0.2500 |\n") == len(DIVERGENCES)
    assert "base_model" not in card  # a local directory is not a model of the hub


def test_a_file_that_changed_since_the_export_is_named(exported, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "README.md").write_text("mine")
    assert describe(str(copy))["files"].endswith(" as exported")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-5] ^= 16
    (copy / "model.safetensors").write_bytes(data)
    record = json.loads((copy / "opdjax.json").read_text())
    record["config"]["evaluation"]["top_p"] = 0.5
    (copy / "opdjax.json").write_text(json.dumps(record))
    words = f"{copy} is not what was exported: opdjax.json, model.safetensors changed or missing"
    with pytest.raises(CheckpointError, match=words):
        describe(str(copy))


@pytest.mark.parametrize("model", [MINI_STUDENT, MINI_TEACHER])
def test_the_mini_pair_has_its_digests(model):
    assert describe(model)["files"] == "7 as exported"


def test_a_student_is_pushed_to_the_hub(tiny_run, tmp_path, monkeypatch, capsys):
    uploaded = []

    def create_repo(self, name, *, private, exist_ok):
        assert (private, exist_ok) == (True, True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, repo_id, folder_path):
        uploaded.append((repo_id, sorted(file.name for file in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    main_with("export", tiny_run, tmp_path / "out", "--push-to-hub", "owner/name")
    assert "https://huggingface.co/owner/name" in capsys.readouterr().out
    ((name, files),) = uploaded
    assert name == "owner/name"
    assert {"README.md", "config.json", "model.safetensors", "opdjax.json"} <= {*files}


def test_nothing_is_exported_that_cannot_be_pushed(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SystemExit):
        main_with("export", tiny_run, tmp_path / "out", "--push-to-hub", "owner/name")
    assert "needs a token of the hub, and there is none; run `hf auth" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_says_what_to_do(monkeypatch, tmp_path):
    def create_repo(self, name, **_):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    with pytest.raises(ConfigError, match="no network; try again with hf upload owner/name"):
        push(tmp_path, "owner/name")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="not uploaded to a/b/c: Repo id must"):
        push(tmp_path, "a/b/c")
