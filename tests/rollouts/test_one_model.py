"""A checkpoint as a value."""

import pytest

import opdjax
from opdjax.config.validation import ConfigError
from opdjax.models.hf import CheckpointError


@pytest.fixture(scope="module")
def teacher():
    return opdjax.load("@mini_teacher")


def test_samples_and_scores_agree(teacher):
    prompts = ["34-17+25=", "1+2-3="]
    answers = opdjax.sample(teacher, prompts, temperature=0.0, max_completion_length=24)
    assert [text.rpartition("#")[2] for (text,) in answers] == ["42", "0"]
    right, wrong = (opdjax.score(teacher, prompts, [text, text]) for text in ("34-17=17", "9"))
    assert right[0].sum() > wrong[0].sum()
    assert all((scores <= 0).all() for scores in (*right, *wrong))
    assert len(right[0]) == len(teacher.tokenizer.encode("34-17=17", add_special_tokens=False))


def test_draws_depend_on_seed_and_place_alone(teacher):
    how = {"num_generations": 2, "max_completion_length": 8}
    both = opdjax.sample(teacher, ["34-17+25=", "1+2-3="], **how)
    assert opdjax.sample(teacher, ["34-17+25="], **how) == both[:1]
    assert len(both[1]) == 2


def test_what_does_not_fit_is_refused(teacher):
    with pytest.raises(ConfigError, match="no prompt given; expected one or more"):
        opdjax.sample(teacher, [])
    with pytest.raises(ConfigError, match="number of answers is 1; expected as many as prompts, 2"):
        opdjax.score(teacher, ["1+1=", "2+2="], ["2"])
    with pytest.raises(ConfigError, match="min_p is 1"):
        opdjax.sample(teacher, ["1+1="], min_p=1)
    with pytest.raises(ConfigError, match="max_prompt_length is 512, exceeded by prompt 1"):
        opdjax.sample(teacher, ["1+1=", "1+" * 900 + "1="])


def test_training_is_a_call_of_the_module(tmp_path):
    config = opdjax.Config(student=opdjax.ModelConfig(str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match="nowhere"):
        opdjax.train(config, tmp_path / "run")
