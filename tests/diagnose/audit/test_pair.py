"""The audit of a real pair: bins, intervals, the analysis of variance, and the whole command on the
built-in models.
"""

import itertools
import json
import re

import numpy as np
import pytest

from opdjax.cli import runs
from opdjax.config import AuditConfig
from opdjax.diagnose.audit.gradients import _components, _share_signal
from opdjax.diagnose.audit.pair import KL_QUANTILES, kl_bins
from opdjax.diagnose.audit.run import audit
from opdjax.diagnose.audit.subjects import Subject, choose, subject
from opdjax.diagnose.audit.table import text

pytestmark = pytest.mark.long


def test_every_context_is_in_one_bin_and_bins_are_ordered(rng):
    kl, mask = rng.exponential(size=(7, 9)), rng.random((7, 9)) < 0.8
    bins = kl_bins(kl, mask)
    np.testing.assert_array_equal(np.sum(bins, axis=0), mask)
    assert len(bins) == len(KL_QUANTILES) - 1
    held = [kl[inside] for inside in bins if inside.any()]
    assert all(low.max() <= high.min() for low, high in itertools.pairwise(held))


def test_the_variance_components_are_estimated(rng):
    """2,000 prompts, 3 rollouts, 2 redraws, 5 dimensions; component variances 1, 4, 9 in each."""
    prompts, rollouts, redraws, size = 2000, 3, 2, 5
    g = (
        0.5
        + rng.normal(size=(prompts, 1, 1, size))
        + 2 * rng.normal(size=(prompts, rollouts, 1, size))
    )
    g = g + 3 * rng.normal(size=(prompts, rollouts, redraws, size))
    by_rollout, center = g.mean(axis=2), g.mean(axis=(1, 2))
    sums = [
        np.square(g - by_rollout[:, :, None]).sum(axis=(1, 2, 3)),
        np.square(by_rollout - center[:, None]).sum(axis=(1, 2)),
    ]
    found = _components(
        np.square(center.mean(axis=0)).sum(),
        *sums,
        np.square(center).sum(axis=1),
        redraws,
        rollouts,
    )
    for name, expected in (
        ("prompt", 5),
        ("trajectory", 20),
        ("action", 45),
        ("noise", 70),
        ("signal", 1.25),
    ):
        assert found[name] == pytest.approx(expected, rel=0.15), name


@pytest.mark.parametrize("parameter_space", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_few_estimators_on_the_built_in_pair(parameter_space):
    subjects = [
        subject("opd"),
        subject("opd", extra_draws=3),
        subject("opd", discount=1.0),
        subject("npd"),
        Subject("k3_direct"),
    ]
    settings = AuditConfig(
        num_contexts=20, vocab=8, num_prompts=16, parameter_space=parameter_space
    )
    saved = []
    document = audit(
        runs.MINI,
        subjects,
        settings,
        skip_cost=parameter_space,
        save=lambda found: saved.append(json.loads(json.dumps(found, allow_nan=False))),
    )
    contexts = document["contexts"]["rows"]
    assert contexts["opd"]["bias"]["reverse"] < 1e-4
    assert contexts["k3_direct"]["cosine"]["forward"] > 0.999
    assert document["batch_pitfalls"]["shifted_mask"]["bias"] > 0.1
    assert "k3_direct (pitfall)" in text(document)
    last = "gradients" if parameter_space else "costs"
    parts = ["contexts", "batch_pitfalls", "vocabulary", "tree", last]
    assert saved[-1] == json.loads(json.dumps(document))
    for number, found in enumerate(saved, 1):  # after each part
        assert [name for name in parts if name in found] == parts[:number]
        assert found["unfinished"] == parts[number:]
    assert f"not measured yet: vocabulary, tree, {last}" in text(saved[1])
    assert "not measured yet" not in text(document)
    if parameter_space:
        assert "costs" not in document
        gradients = document["gradients"]["rows"]
        assert (
            0.08 < gradients["opd extra_draws=3"]["action"] / gradients["opd"]["action"] < 0.6
        )  # 1 / 4 in expectation
        assert gradients["opd discount=1"]["action"] is None
    else:
        assert document["costs"]["opd"]["seconds_per_token"] > 0


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("opd", {"reward_floor": -3.0}),
        ("full_kl", {"divergence": "jsd"}),  # samples no token
        ("opd", {"discount": 0.5}),  # couples tokens
    ],
)
def test_the_configs_own_recipe_is_in_every_table(recipe, options):
    subjects = choose(["opd", "k3_direct"], options, recipe)
    own = subjects[0].name
    settings = AuditConfig(num_contexts=5, vocab=5, num_prompts=4)
    document = audit(runs.MINI, subjects, settings, skip_cost=True)
    lines = text(document).splitlines()
    assert sum(own in line for line in lines) == 7  # two rows by KL: in logits and parameters
    assert document["tree"]["rows"][-1]["title"] == f"two rows, token_mean, {own}"


@pytest.mark.long
def test_the_command_writes_tables_and_page(tmp_path, capsys):
    runs.audit(
        [
            "--workdir",
            str(tmp_path),
            "--audit.num-contexts",
            "20",
            "--audit.num-prompts",
            "4",
            "--only",
            "opd",
            "k3_direct",
        ]
    )
    printed, progress = capsys.readouterr()
    assert (tmp_path / "audit.txt").read_text() in printed
    assert "gradients (6/6): 100%" in progress
    assert json.loads((tmp_path / "audit.json").read_text())["subjects"]["k3_direct"]["is_pitfall"]
    assert str(tmp_path / "audit.html") in printed


def test_recipes_of_one_expectation_share_the_most_precise_signal():
    subjects = [
        subject("opd"),
        subject("full_kl", divergence="reverse"),
        subject("opd", reward_floor=-2.0),
        Subject("k3_direct"),
    ]
    rows = {each.name: {"signal": float(place)} for place, each in enumerate(subjects)}
    _share_signal(subjects, rows)
    assert [row["signal"] for row in rows.values()] == [1, 1, 2, 3]


def test_what_cannot_be_measured_is_refused_first(tmp_path, capsys):
    for arguments, message in (
        (["--teacher.path", "@mini_student", "--only", "opd"], "student and teacher have the same"),
        (
            ["--estimator.recipe", "opd", "--estimator.importance", "token_truncate"],
            "estimator.importance is 'token_truncate'",
        ),
        (["--audit.num-prompts", "100000"], "expected at most"),
        (["--only", "vodp"], "cannot audit"),
    ):
        small = ["--audit.num-contexts", "2", "--audit.vocab", "3"]
        with pytest.raises(ValueError, match=message):
            runs.audit(["--workdir", str(tmp_path / "x"), *small, *arguments])
    options = ["--estimator.recipe", "opd", "--estimator.baseline", "full"]
    with pytest.raises(SystemExit):  # an option's message, in the box of the command line
        runs.audit(["--workdir", str(tmp_path / "x"), *options])
    assert "recipe 'opd' has no option 'baseline'" in capsys.readouterr().err


def test_explain_prints_the_page_of_every_recipe_and_pitfall(capsys):
    for name in ("opd", "vopd", "full_kl", "topk_kl", "npd", "sft"):
        runs.audit(["--explain", name])
        page = capsys.readouterr().out
        for part in ("Equation:", "Detached:", "Cost:", "Use it (when|for|to) "):
            assert re.search(part, page), (name, part)
    runs.audit(["--explain", "k3_direct"])
    assert "KL(teacher || student)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no recipe and no pitfall 'opq'"):
        runs.audit(["--explain", "opq"])
