"""The doctor: a healthy pair passes every check, and each planted fault fails its check alone."""

import dataclasses
import json
import re
import shutil
import sys
from types import SimpleNamespace as space

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import opdjax.data.packing
import opdjax.rollouts.on_policy
import opdjax.rollouts.setup
import opdjax.train
from opdjax.cli import main
from opdjax.config import (
    MINI_PAIR,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.recipes import RECIPES
from opdjax.config.validation import ConfigError
from opdjax.data.packing import answer_rows, to_train_batch
from opdjax.data.tasks.arithmetic import problems
from opdjax.data.tokenizer import load_tokenizer
from opdjax.diagnose import doctor
from opdjax.diagnose.doctor import CHECKS, examine, run_checks
from opdjax.diagnose.measurements import FirstUpdate, Measurements
from opdjax.rollouts.checks import (
    FaultError,
    Finding,
    check_settings,
    check_stop_tokens,
    check_tokenizers,
    end_of_turn,
    enforce,
)
from opdjax.rollouts.setup import prepare
from opdjax.train import train

# Of a run with a teacher's scores, without a judge.
NAMES = [
    "tokenizers",
    "tokenizer_file",
    "data",
    "padded_vocabulary",
    "stop_tokens",
    "chat_template",
    "sampler_matches_scorer",
    "sampling_filter",
    "self_distillation",
    "teacher_dtype",
    "repeated_scores",
    "teacher_is_better",
    "mask",
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The mini pair on sixteen problems with answers and references."""
    source = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [
        {"prompt": p.prompt, "answer": p.answer, "reference": p.reference}
        for p in problems("train")[:32]
    ]
    for file, part in ((source, rows[:16]), (source.with_name("held_out.jsonl"), rows[16:])):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return Config(
        data=DataConfig(str(source), max_prompt_length=32),
        sampling=SamplingConfig(max_completion_length=20),
        estimator=EstimatorConfig("vopd"),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        train=TrainConfig(num_steps=1, prompts_per_step=8),
        evaluation=EvaluationConfig(str(source.with_name("held_out.jsonl"))),
        mesh=MeshConfig(1),
    )


def vary(config, **sections):
    """The config with some fields of some sections replaced."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name, fields in sections.items()
        },
    )


def diagnose(config, only=()):
    """{name: finding} of every check, or of some."""
    return {finding.name: finding for finding in examine(prepare(config), only=only)}


def itself_and_alone(*names):
    """A fault is found by its check among these; with the long tests, all others pass beside it:
    they compile sampler and scorer for the changed model.
    """
    alone = pytest.param((), marks=pytest.mark.long)
    return pytest.mark.parametrize("only", [names, alone], ids=["itself", "alone"])


def complaints(findings):
    """{name: status} of what is not ok."""
    return {name: finding.status for name, finding in findings.items() if finding.status != "ok"}


@pytest.fixture
def plant(tmp_path, healthy):
    """plant(role, file, change) -> the healthy config with a copy of that model whose JSON or text
    file was changed.
    """

    def copy(role, file, change, config=healthy):
        target = tmp_path / role
        if not target.exists():
            shutil.copytree(MINI_PAIR / role, target)
        path = target / file
        text = path.read_text()
        path.write_text(
            json.dumps(change(json.loads(text))) if path.suffix == ".json" else change(text)
        )
        return dataclasses.replace(config, **{role: ModelConfig(str(target))})

    return copy


@pytest.fixture
def opdjax_doctor(monkeypatch, capsys, tmp_path, healthy):
    """opdjax_doctor(*options) -> (status, stdout), of the command on the healthy experiment."""
    experiment = tmp_path / "experiment.py"
    names = sorted(set(re.findall(r"\b\w*Config\b", repr(healthy))))
    experiment.write_text(
        f"from opdjax.config import {', '.join(names)}\n\n"
        f"def get_config() -> Config:\n    return {healthy!r}\n"
    )

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["opdjax", "doctor", str(experiment), *map(str, options)])
        with pytest.raises(SystemExit) as end:
            main.main()
        return end.value.code, capsys.readouterr().out

    return run


# A healthy pair


def test_a_healthy_pair_passes_every_check(opdjax_doctor):
    status, out = opdjax_doctor()
    assert status == 0
    assert re.findall(r"^(.) (\w+): ", out, re.MULTILINE) == [("✓", name) for name in NAMES]
    assert "8 of 8 greedy teacher answers do" in out


def test_a_healthy_pair_passes_under_a_recipe_that_sees_one_log_prob_a_token(healthy):
    assert complaints(diagnose(vary(healthy, estimator={"recipe": "opd"}))) == {}


@pytest.mark.long
def test_a_teacher_view_of_its_own_is_a_warning_and_nothing_else(healthy):
    """Plain text for the student, the template for the teacher: the config says so, and the
    scores still land on the tokens.
    """
    findings = diagnose(vary(healthy, data={"format": "raw", "teacher_format": "chat"}))
    assert complaints(findings) == {"chat_template": "warning"}
    assert "+'<|im_start|>'" in findings["chat_template"].details


@pytest.mark.long
def test_a_student_that_is_its_own_teacher_must_use_what_its_prompt_shows(healthy):
    """The mini student was never trained to read an answer in its prompt; other checks pass."""
    shown = {"teacher_prompt_format": "{answer}#{prompt}", "max_prompt_length": 64}
    config = dataclasses.replace(vary(healthy, data=shown), teacher=ModelConfig("@student"))
    findings = diagnose(config)
    assert list(findings) == NAMES
    assert complaints(findings) == {"chat_template": "warning", "teacher_is_better": "fault"}
    assert (
        "makes no use of what data.teacher_prompt_format shows it; reword that"
        in findings["teacher_is_better"].message
    )


@pytest.mark.long
def test_a_run_that_reads_the_teachers_most_likely_ids(healthy):
    findings = diagnose(
        vary(healthy, estimator={"recipe": "npd", "kd_weight": 1.0, "renormalize": "both"})
    )
    assert list(findings) == NAMES
    assert complaints(findings) == {}


def test_a_run_whose_rollouts_are_filtered_compares_scores_that_its_recipe_does_not_read(healthy):
    near = {"schedule": "continuous", "filter": "ifd"}
    findings = diagnose(
        vary(healthy, estimator={"recipe": "npd", "kd_weight": 0.0}, near_policy=near)
    )
    assert list(findings) == NAMES
    assert complaints(findings) == {}


def test_a_run_that_compares_no_scores_checks_its_student(healthy):
    config = vary(healthy, estimator={"recipe": "sft"}, sampling={"completions_from": "references"})
    findings = diagnose(config)
    assert list(findings) == [
        "tokenizer_file",
        "data",
        "padded_vocabulary",
        "stop_tokens",
        "sampler_matches_scorer",
        "sampling_filter",
        "mask",
    ]
    assert complaints(findings) == {}
    enforce(check_settings(prepare(config)))


def test_which_recipes_are_zero_at_the_teacher():
    def is_zero(recipe, **options):
        EstimatorConfig(recipe, **options)
        return RECIPES[recipe].is_zero_at_teacher(options)

    assert all(is_zero(recipe=name) for name in ("opd", "vopd", "full_kl", "topk_kl"))
    assert is_zero(recipe="topk_kl", renormalize="none", outside="tail")
    assert not is_zero(recipe="topk_kl", renormalize="none")
    assert is_zero(recipe="topk_kl", convention="tunix")
    assert not is_zero(recipe="topk_kl", convention="verl")
    assert is_zero(recipe="npd", kd_weight=1.0, renormalize="both")
    assert not is_zero(recipe="npd", kd_weight=1.0)
    assert not is_zero(recipe="npd", renormalize="both")


def test_data_that_repeats_is_shared_or_lacks_answers_is_counted(healthy, tmp_path):
    sums = [{"prompt": f"{n}+1=", "answer": str(n + 1), "reference": "x"} for n in range(4)]
    del sums[3]["answer"]
    rows = [*sums, sums[0], {**sums[1], "prompt": [{"role": "user", "content": "1+1="}]}]
    files = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    for file, part in zip(files, (rows, sums[1:3])):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    source, held_out = map(str, files)
    config = vary(healthy, data={"source": source}, evaluation={"source": held_out})
    (found,) = examine(prepare(config), only=["data"])
    assert found.status == "warning"
    for words in (
        f"2 of 6 prompts of {source} repeat an earlier one",
        "2 of 2 prompts of the evaluation are also trained on",
        "6 prompts are fewer than train.prompts_per_step, 8",
        "1 of 6 prompts have no answer",
    ):
        assert words in found.message
    missing = str(tmp_path / "none.jsonl")
    (found,) = run_checks(vary(config, data={"references": missing}))
    assert found.status == "fault"
    assert f"data.references names {missing}, which does not exist" in found.message


def test_a_healthy_run_prints_nothing_at_its_start(healthy, capsys):
    findings = check_settings(prepare(healthy))
    assert [finding.name for finding in findings] == [
        "tokenizers",
        "stop_tokens",
        "chat_template",
        "sampling_filter",
    ]
    enforce(findings)
    assert capsys.readouterr().out == ""


# Eight planted faults


def swap_two_ids(tokenizer):
    vocab = tokenizer["model"]["vocab"]
    vocab["17"], vocab["18"] = vocab["18"], vocab["17"]
    return tokenizer


def test_fault_1_a_wrong_tokenizer(plant, opdjax_doctor):
    config = plant("teacher", "tokenizer.json", swap_two_ids)
    status, out = opdjax_doctor("--teacher.path", config.teacher.path)
    assert status == 1
    assert out.startswith("✗ tokenizers: student and teacher differ in 2 tokens")
    assert (
        len(out.splitlines()) == 2
    )  # the other checks would compare ids that mean different things


@pytest.mark.parametrize(
    ("role", "message"),
    [
        (
            "student",
            "the student's generation config ends at 0 '<|endoftext|>', the teacher's at 2 "
            "'<|im_end|>'",
        ),
        ("teacher", "the teacher ends its answers only with 0 '<|endoftext|>'"),
    ],
)
@itself_and_alone("stop_tokens", "chat_template")
def test_fault_2_a_wrong_stop_token(plant, role, message, only):
    findings = diagnose(
        plant(role, "generation_config.json", lambda values: values | {"eos_token_id": 0}), only
    )
    assert complaints(findings) == {"stop_tokens": "fault"}
    assert message in findings["stop_tokens"].message
    advice = {
        "student": "set the same eos_token_id in both",
        "teacher": "what to do: --sampling.stop-token-ids 0",
    }
    assert advice[role] in findings["stop_tokens"].message


@pytest.mark.long
def test_fault_2_a_base_student_without_end_of_turn(plant):
    """Answers run on past the end of the turn; the stop ids of the run's config correct it."""
    plant("student", "generation_config.json", lambda values: values | {"eos_token_id": 0})
    config = plant(
        "student", "tokenizer_config.json", lambda values: values | {"eos_token": "<|endoftext|>"}
    )
    findings = diagnose(config)
    assert complaints(findings) == {"stop_tokens": "fault"}
    message = findings["stop_tokens"].message
    template = "the chat template of student and teacher ends a turn with 2 '<|im_end|>'"
    assert f"{template}, where rollouts do not stop" in message
    assert message.endswith("what to do: --sampling.stop-token-ids 2")
    answers = "8 of 8 greedy teacher answers end with 2 '<|im_end|>'"
    assert f"{answers}, where rollouts do not stop" in message
    assert complaints(diagnose(vary(config, sampling={"stop_token_ids": (2,)}))) == {}
    # Given answers are cut where the student stops.
    given = vary(config, estimator={"recipe": "sft"}, sampling={"completions_from": "references"})
    assert [(f.name, f.status) for f in check_settings(prepare(given)) if f.status != "ok"] == [
        ("stop_tokens", "warning")
    ]


@pytest.mark.parametrize(("side", "step"), [("right", 1), ("left", -1)])
def test_fault_3_a_shifted_mask(healthy, monkeypatch, side, step):
    """Two checks find it: from the tokens, and from the log-probs, which match one column on."""

    def shifted(rollouts, prompts):
        batch = to_train_batch(rollouts, prompts)
        return dataclasses.replace(batch, mask=jnp.roll(batch.mask, step, axis=1))

    monkeypatch.setattr(opdjax.data.packing, "to_train_batch", shifted)
    findings = diagnose(healthy)
    assert complaints(findings) == {"mask": "fault", "sampler_matches_scorer": "fault"}
    for finding in (findings["mask"], findings["sampler_matches_scorer"]):
        assert f"the mask is shifted by one column to the {side}" in finding.message


def pad_embedding(path, rows=16):
    """Rows beyond the tokenizer whose logits are large: three times those of the digits."""
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.concatenate(
        [embedding, 3 * embedding[14 : 14 + rows]]
    )
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"vocab_size": config["vocab_size"] + rows})
    )


@itself_and_alone("padded_vocabulary", "stop_tokens", "mask")
def test_fault_4_padded_vocabulary_that_is_not_masked(plant, tmp_path, monkeypatch, only):
    config = plant("student", "config.json", lambda values: values)
    pad_embedding(tmp_path / "student")
    real = opdjax.rollouts.setup.Decoding
    monkeypatch.setattr(
        opdjax.rollouts.setup,
        "Decoding",
        lambda *args, **options: real(*args, **options | {"valid_vocab": None}),
    )
    findings = diagnose(config, only)
    assert complaints(findings) == {"padded_vocabulary": "fault"}
    message = findings["padded_vocabulary"].message
    assert re.search(r"\d+ of \d+ sampled tokens are ids from 214 on", message)
    assert "the student gives its padded ids 214 to 229 a probability of up to" in message


@pytest.mark.long
def test_fault_4_padded_vocabulary_of_a_teacher(plant, tmp_path):
    config = plant("teacher", "config.json", lambda values: values)
    pad_embedding(tmp_path / "teacher")
    setup = prepare(config)
    finding = doctor.padded_vocabulary(Measurements(setup, 8))
    assert finding.status == "ok"  # padded and masked, as it should be
    assert (
        "embedding rows beyond them (student 0, teacher 16) have probability 0" in finding.message
    )
    head = dataclasses.replace(setup.teacher.head, valid_vocab=None)
    setup = dataclasses.replace(setup, teacher=dataclasses.replace(setup.teacher, head=head))
    finding = doctor.padded_vocabulary(Measurements(setup, 8))
    assert finding.status == "fault"
    assert "the teacher gives its padded ids 214 to 229 a probability of up to" in finding.message


def test_fault_5_a_template_that_differs(plant):
    config = plant(
        "teacher",
        "chat_template.jinja",
        lambda text: text.replace("<|im_start|>assistant", "<|im_start|>user"),
    )
    findings = diagnose(config)
    assert findings["chat_template"].status == "fault"
    assert "their chat templates differ" in findings["chat_template"].message
    assert {"-'assistant'", "+'user'"} <= set(findings["chat_template"].details)
    declared = diagnose(vary(config, data={"teacher_format": "chat"}))["chat_template"]
    assert declared.status == "warning"
    # On a prompt that it was not trained on, the teacher may give no good answers.
    assert complaints(findings).keys() <= {"chat_template", "stop_tokens", "teacher_is_better"}


@pytest.mark.long
def test_fault_6_a_filter_on_an_exact_divergence(opdjax_doctor):
    status, out = opdjax_doctor("--estimator.recipe", "full_kl", "--sampling.top-p", "0.9")
    assert status == 0
    assert re.findall(r"^[!✗] (\w+): ", out, re.MULTILINE) == ["sampling_filter"]
    assert re.search(
        r"! sampling_filter: top_p or top_k is on: it removes \d+\.\d+% of the mass", out
    )


@itself_and_alone("sampling_filter", "mask")
def test_fault_6_a_filter_on_a_policy_gradient(healthy, only):
    """The config refuses the filter, so only the sampler gets it."""
    setup = prepare(healthy)
    setup = dataclasses.replace(setup, decoding=dataclasses.replace(setup.decoding, top_p=0.9))
    findings = {finding.name: finding for finding in examine(setup, only=only)}
    assert complaints(findings) == {"sampling_filter": "fault"}
    assert "its gradient is biased" in findings["sampling_filter"].message


def test_a_teacher_in_a_narrower_dtype_than_its_checkpoint():
    judge = lambda difference, stored: doctor.teacher_dtype(
        measured(
            teacher_rounding=np.array([difference]),
            dtype="bfloat16",
            setup=space(teacher=space(checkpoint=space(stored_dtype=stored))),
        )
    )
    assert judge(0.01, "bfloat16").status == "ok"
    assert judge(0.01, "float32").status == "warning"  # narrower than the checkpoint
    assert judge(0.5, "bfloat16").status == "warning"


def test_fault_8_a_swapped_pair(healthy):
    findings = diagnose(
        dataclasses.replace(healthy, student=healthy.teacher, teacher=healthy.student)
    )
    assert complaints(findings) == {"teacher_is_better": "fault"}
    assert "student and teacher look swapped" in findings["teacher_is_better"].message


# Faults of a run


def test_a_run_with_a_fault_in_its_settings_does_not_start(plant, tmp_path):
    config = plant(
        "teacher",
        "chat_template.jinja",
        lambda text: text.replace("<|im_start|>assistant", "<|im_start|>user"),
    )
    with pytest.raises(
        FaultError, match="the run was stopped.*\n✗ chat_template: .*--data.teacher-format chat"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_with_a_shifted_mask_stops_at_its_first_step(healthy, tmp_path, monkeypatch):
    def shifted(rollouts, prompts):
        batch = to_train_batch(rollouts, prompts)
        return dataclasses.replace(batch, mask=jnp.roll(batch.mask, 1, axis=1))

    def make_update(*_):
        return lambda state, *_: (state, {"rollout/logprob_gap": 0.4})

    monkeypatch.setattr(opdjax.rollouts.on_policy, "to_train_batch", shifted)
    monkeypatch.setattr(
        opdjax.train, "make_update", make_update
    )  # compiling the real one takes seconds
    with pytest.raises(
        FaultError,
        match=r"✗ mask: the mask is shifted by one column to the right[^✗]*"
        r"\n✗ sampler_matches_scorer: ",
    ):
        train(vary(healthy, evaluation={"source": None}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_warning_is_printed_and_the_run_goes_on(capsys):
    enforce([Finding("a", "ok", "fine"), Finding("b", "warning", "look", ("here",))])
    assert capsys.readouterr().out == "! b: look\n    here\n"


# Single checks on plain values


def measured(**values):
    """Measurements that were made elsewhere."""
    config = space(teacher_is_student=False)
    defaults = {"backend": "cpu", "dtype": "float32", "config": config}
    return space(**(defaults | values))


class TestSamplerMatchesScorer:
    @pytest.fixture
    def arrays(self, rng):
        scores = -rng.exponential(size=(3, 12)).astype(np.float32)
        mask = np.zeros((3, 12), bool)
        mask[:, 4:9] = True
        return np.where(mask, scores, 0), mask, scores

    def judge(self, sampled, mask, score_at, temperature=1.0):
        return doctor.sampler_matches_scorer(
            measured(
                rollouts=space(unfiltered_logprobs=sampled),
                batch=space(mask=mask),
                score_at=score_at,
                setup=space(
                    decoding=space(temperature=temperature),
                    config=space(sampling=space(kv_dtype="auto")),
                    dtype="float32",
                ),
            )
        )

    def test_log_probs_that_are_shifted(self, arrays):
        sampled, mask, scores = arrays
        finding = self.judge(np.roll(sampled, 1, axis=1), mask, lambda _: scores)
        assert finding.status == "fault"
        assert "the sampler's log-probs are shifted by one column to the right" in finding.message

    def test_another_temperature(self, arrays):
        sampled, mask, scores = arrays
        finding = self.judge(
            sampled, mask, lambda temperature: scores / temperature, temperature=0.7
        )
        assert (
            "the sampler's log-probs are those of temperature 1, the scorer's of 0.7"
            in finding.message
        )

    def test_no_explanation(self, arrays):
        sampled, mask, scores = arrays
        assert (
            "neither a shift nor a temperature"
            in self.judge(sampled, mask, lambda _: 1.1 * scores).message
        )
        assert self.judge(sampled, mask, lambda _: np.full_like(scores, np.nan)).status == "fault"
        assert self.judge(sampled, np.zeros_like(mask), lambda _: scores).status == "fault"


def test_repeated_scores_that_do_not_repeat():
    first = np.linspace(-1, 0, 5)
    judge = lambda again, otherwise: doctor.repeated_scores(
        measured(repeated_scores=(first, again, otherwise, "packed rows"))
    )
    assert judge(first, first + 1e-5).status == "ok"
    assert judge(first + 1e-6, first).status == "warning"
    assert "the teacher reads tokens outside the rollout" in judge(first, first + 0.1).message
    assert judge(np.full(5, np.nan), first).status == "fault"


def test_a_teacher_that_does_not_know_the_text():
    def judge(student, teacher, is_reference=True, correct=None):
        return doctor.teacher_is_better(
            measured(
                nll=(np.array(student), np.array(teacher), is_reference),
                correct=correct,
                setup=space(tokenizer=space(get_vocab=lambda: {"a": 199})),
            )
        )

    assert "expected less than ln(V)/2" in judge([5.0, 5.0], [4.0, 4.0]).message
    assert judge([0.2, 0.3], [np.nan, 0.1], is_reference=False).status == "fault"
    # Phrased unlike the references, but better answers; without references there is no ranking.
    assert judge([0.2, 0.3], [0.9, 0.8], correct=(1, 2)).status == "ok"
    assert judge([0.2, 0.3], [0.9, 0.8]).status == "warning"
    assert judge([0.2, 0.3], [0.9, 0.8], is_reference=False).status == "ok"
    # Right nowhere: whatever it predicts, it cannot teach this.
    for is_reference in (True, False):
        nothing = judge([0.9, 0.8], [0.2, 0.3], is_reference, correct=(1, 0))
        assert nothing.status == "fault"
        assert "the teacher answers none of 2 prompts correctly" in nothing.message


def test_a_recipe_whose_loss_does_not_vanish():
    teacher = FirstUpdate(0.5, 0.3, -0.6, 27.0)
    itself = FirstUpdate(0.0, 0.0, 0.4, 3.0)
    judge = lambda **estimator: doctor.self_distillation(
        measured(
            first_updates=(itself, teacher), config=space(estimator=EstimatorConfig(**estimator))
        )
    )
    assert judge(recipe="opd").status == "fault"
    biased = judge(recipe="topk_kl", renormalize="none")
    assert biased.status == "ok"
    assert "may have another loss and gradient there" in biased.message


# The table of checks


def test_each_check_is_a_row_with_what_it_finds_and_what_to_do(monkeypatch, capsys):
    assert [check.name for check in CHECKS if check.name in NAMES] == NAMES
    monkeypatch.setattr(sys, "argv", ["opdjax", "doctor", "--list"])
    main.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    for check, line in zip(CHECKS, lines):
        assert line.split()[0] == check.name
        assert check.finds in line
        assert check.advice in line


def test_single_checks_by_name(opdjax_doctor):
    status, out = opdjax_doctor("--only", "mask,chat_template")
    assert status == 0
    assert re.findall(r"^(.) (\w+): ", out, re.MULTILINE) == [("✓", "chat_template"), ("✓", "mask")]


@pytest.mark.parametrize("name", ["masks", "judge"])  # unknown; of runs with judges alone
def test_a_name_that_is_no_check_of_the_run_lists_those_that_are(name):
    with pytest.raises(ConfigError) as error:
        list(run_checks(Config(), only=("mask", name)))
    assert f"--only is {name!r}; expected checks that apply to this run: " in str(error.value)
    assert all(each in str(error.value) for each in NAMES)


def test_tokenizers_that_split_alike_only_some_texts(plant):
    def drop_letters(tokenizer):
        tokenizer["pre_tokenizer"]["pattern"]["Regex"] = "1[0-9][0-9]|[0-9]|[a-z]+|\\n|."
        return tokenizer

    config = plant("teacher", "tokenizer.json", drop_letters)
    finding = check_tokenizers(
        load_tokenizer(MINI_PAIR / "student"), load_tokenizer(config.teacher.path), "opd"
    )
    assert finding.status == "fault"


def test_texts_that_transformers_splits_otherwise_than_tokenizer_json_are_named(tmp_path):
    """It takes the pre-tokenizer of some model types from its own code."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: n for n, letter in enumerate([*sorted(letters), "12"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("1", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for kind, status in (("llama", "ok"), ("qwen2", "warning")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        model = space(tokenizer=load_tokenizer(tmp_path))
        found = doctor.tokenizer_file(space(setup=space(tokenizer=model.tokenizer, teacher=model)))
        assert found.status == status
    assert (
        "tokenizer.json splits ' 12.5;' as 'Ġ' '12' '.' '5' ';', transformers as 'Ġ' '1' '2'"
        in (found.message)
    )


def test_a_stop_string_ends_the_teachers_answers(healthy, monkeypatch):
    config = vary(healthy, sampling={"stop_strings": ("#",)}, evaluation={"source": None})
    setup = prepare(config)
    assert setup.teacher.decoding.stop_strings.texts == ("#",)
    sampled = []
    how = lambda *_, decoding, **__: sampled.append(decoding)
    monkeypatch.setattr(opdjax.diagnose.measurements, "sample", how)
    _ = Measurements(setup, 2).teacher_answers
    assert sampled[0].stop_strings is setup.teacher.decoding.stop_strings
    prompts = Measurements(setup, 2).prompts
    answers = [setup.tokenizer.encode(text) for text in ("34-17=17#", "1+1=2")]
    rollouts = answer_rows(prompts, answers, config.sampling.max_completion_length, 0)
    ended = dataclasses.replace(rollouts, is_truncated=np.array([False, True]))
    found = check_stop_tokens(setup, ended)
    assert "1 of 2 greedy teacher answers reach the length limit" in found.message
    assert "where rollouts do not stop" not in found.message


def test_prompts_that_end_in_a_stop_token_are_a_warning(healthy, tmp_path):
    source = tmp_path / "rows.jsonl"
    prompts = ("1+1=<|im_end|>", "1+1=")
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    config = vary(healthy, data={"source": str(source), "format": "raw"})
    found = {each.name: each for each in check_settings(prepare(config))}["stop_tokens"]
    assert found.status == "warning"
    assert "1 of 2 prompts end in 2 '<|im_end|>', where answers stop" in found.message


def test_the_end_of_a_turn_is_read_from_the_template():
    tokenizer = load_tokenizer(MINI_PAIR / "student")
    assert end_of_turn(tokenizer) == 2
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None
