"""The audit's page: every section says what the numbers say, whatever was measured and whatever
came out as nothing.
"""

import builtins
import copy
import html
import itertools
import json
import math
import re
import subprocess
import sys

import pytest
from test_report import NASTY, config, read, row, write_run

from opdjax.report import audit, drawing
from opdjax.report.page import write_audit_report, write_report
from opdjax.runs.workdir import WorkdirError

SECTIONS = ["direction", "noise", "places", "tree", "costs", "pitfalls"]
BINS = ((0.0, 0.5), (0.5, 0.99), (0.99, 1.0))


def described(
    recipe, advertises="reverse", *, is_sampled=True, is_coupled=False, about="", **options
):
    return {
        "recipe": recipe,
        "options": options,
        "is_pitfall": recipe is None,
        "advertises": advertises,
        "is_sampled": is_sampled,
        "is_coupled": is_coupled,
        "about": about,
    }


def measured(reverse, forward, ratio, *, is_sampled=True, bias=None):
    found = {
        "bias": {
            "reverse": bias if bias is not None else 0.0 if reverse == 1.0 else 0.5,
            "forward": 0.75,
        },
        "cosine": {"reverse": reverse, "forward": forward},
        "variance": ratio,
        "noise_to_signal": None if reverse is None else 2.0,
        "variance_ratio": ratio,
        "worse": 0.25,
    }
    if is_sampled:
        cells = [[ratio, ratio - 0.1, ratio + 0.1], [None, None, None], [ratio, ratio, ratio]]
        found |= {
            "variance_ratio_interval": [ratio - 0.1, ratio + 0.1],
            "by_kl": cells,
            "by_position": cells[:2],
        }
    return found


def split(noise, prompt, trajectory, action, snr=1.5):
    return {
        "signal": 2e-3,
        "noise": noise,
        "prompt": prompt,
        "trajectory": trajectory,
        "action": action,
        "signal_to_noise": snr,
        "noise_ratio": noise / 4.0,
        **({"action_ratio": [action / 2.0, 0.4, 1.2]} if action is not None else {}),
    }


def placed(contexts, kl_mean, kl_share, variance_share):
    return {
        "contexts": contexts,
        "kl_mean": kl_mean,
        "kl_share": kl_share,
        "variance_share": variance_share,
    }


def document():
    rows = {
        "opd": measured(1.0, 0.7, 1.0),
        "vopd baseline=optimal": measured(1.0, 0.7, 0.625),
        "full_kl divergence=reverse": measured(1.0, 0.7, 0.0, is_sampled=False),
        "full_kl divergence=forward": measured(0.7, 1.0, 0.0, is_sampled=False),
        "opd reward_floor=-2": measured(0.9, 0.5, 0.8),
        "k1_direct": measured(None, None, 1.5),
        "k3_direct": measured(0.7, 1.0, 30.0),
    }
    tree = [
        {
            "title": "token-level credit",
            "name": "opd",
            "frozen": 1e-16,
            "sequence": 0.5,
            "baseline": None,
            "variance": 0.25,
        },
        {
            "title": "two rows, token_mean",
            "name": "opd",
            "frozen": 0.125,
            "sequence": 0.5,
            "baseline": None,
            "variance": 0.25,
        },
        {
            "title": "stale, token_mask, baseline full",
            "name": "vopd",
            "frozen": 0.25,
            "sequence": 0.5,
            "baseline": 0.4,
            "variance": 0.25,
        },
    ]
    return {
        "student": "@mini_student",
        "teacher": "models/teacher",
        "settings": {"num_generations": 2},
        "subjects": {
            "opd": described("opd"),
            "vopd baseline=optimal": described("vopd", baseline="optimal"),
            "full_kl divergence=reverse": described(
                "full_kl", is_sampled=False, divergence="reverse"
            ),
            "full_kl divergence=forward": described(
                "full_kl", "forward", is_sampled=False, divergence="forward"
            ),
            "opd reward_floor=-2": described("opd", "own", reward_floor=-2.0),
            "opd discount=1": described("opd", is_coupled=True, discount=1.0),
            "k1_direct": described(None, about="Looks like a loss."),
            "k3_direct": described(None, about="Of the other direction."),
        },
        "pitfalls": {
            "k1_direct": "Looks like a loss.",
            "k3_direct": NASTY,
            "mean_of_means": "Cut.",
            "bfloat16_sums": "Lost.",
            "other": "Rare.",
        },
        "vocabulary": {
            "num_contexts": 50,
            "vocab": 20,
            "seed": 0,
            "rows": rows | {"opd reward_floor=-2": measured(0.8, 0.4, 0.9)},
        },
        "contexts": {
            "num_prompts": 8,
            "num_contexts": 236,
            "kl_mean": 0.35,
            "rows": rows,
            "bins": [
                {"from": low, "to": high} | placed(*cells)
                for (low, high), cells in zip(
                    BINS, [(118, 0.01, 0.05, 0.1), (116, 0.5, 0.7, 0.6), (2, 6.0, 0.25, 0.3)]
                )
            ],
            "buckets": [
                {"first": 0, "last": 4} | placed(200, 0.5, 0.9, 0.8),
                {"first": 5, "last": 5} | placed(36, 0.1, 0.1, 0.2),
            ],
        },
        "tree": {"seed": 0, "vocab": 3, "length": 3, "rows": tree},
        "costs": {
            "opd": {"seconds_per_token": 2e-6, "bytes_per_token": 4000.0},
            "full_kl divergence=reverse": {"seconds_per_token": 3e-6, "bytes_per_token": None},
        },
        "batch_pitfalls": {
            "mean_of_means": {"bias": 0.375, "cosine": 0.5},
            "bfloat16_sums": {"error_by_tokens": {"1024": -0.125}},
        },
        "gradients": {
            "num_redraws": 2,
            "batch": 64,
            "rows": {
                "opd": split(4.0, 1.0, 1.0, 2.0),
                "vopd baseline=optimal": split(3.0, 1.0, 1.0, 1.0),
                "full_kl divergence=reverse": split(2.0, 2.5, -0.5, 0.0),
                "opd discount=1": split(40.0, 2.0, 38.0, None, None),
                "k3_direct": split(8.0, -1.0, 1.0, 8.0, 0.0),
            },
            "by_kl": {
                "variance_share": [0.1, 0.2, 0.7],
                "rows": {"vopd baseline=optimal": [[0.6, 0.5, 0.7], [None] * 3, [0.5, 0.4, 0.6]]},
            },
        },
        "environment": {
            "opdjax": "0.1.0",
            "commit": "c0ffee" * 7,
            "jax": "0.10.2",
            "python": "3.11.7",
            "machine": "x86_64",
            "cores": 2,
            "devices": ["cpu"],
        },
    }


def write(directory, found):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "audit.json").write_text(json.dumps(found))
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return read(write(tmp_path_factory.mktemp("audit") / "a", document()))


def sections(parser):
    return [attributes["id"] for name, attributes in parser.tags if name == "section"]


def told(parser, anchor):
    found = re.search(
        rf'<section id="{anchor}"><h2>[^<]*</h2>\s*<p class="finding">(.*?)</p>',
        parser.source,
        re.DOTALL,
    )
    return " ".join(html.unescape(found[1]).split())


def test_it_has_every_section_and_says_what_was_measured(page):
    assert sections(page) == SECTIONS
    assert "Audit: @mini_student ← models/teacher" in page.all
    assert (
        "6 estimators and 2 pitfalls at 236 contexts that the student reached on 8 prompts,"
        " 2 answers each." in page.all
    )
    assert (
        f"Made with opdjax 0.1.0, commit {('c0ffee' * 7)[:40]}, jax 0.10.2, python 3.11.7,"
        " machine x86_64, cores 2, devices cpu." in page.all
    )


def test_each_section_has_a_sentence_from_its_numbers(page):
    assert told(page, "direction") == (
        "4 of 4 recipes that claim the gradient of a KL point along it within 1°. Of the pitfalls,"
        " k1_direct has no direction (its expected gradient is 0) and k3_direct points along"
        " KL(teacher || student), 46° from KL(student || teacher)."
    )
    assert (
        "vopd optimal has the smallest variance in logits: 0.625 (0.525 to 0.725) times opd's."
        in told(page, "noise")
    )
    assert (
        "sampled tokens cause 50 % of opd's noise, the only part that a baseline can reduce"
        in told(page, "noise")
    )
    assert told(page, "places") == (
        "The 1 % of contexts with the highest KL have 25 % of the KL and 30 % of opd's variance;"
        " the half with the lowest KL has 5 % and 10 %. By position, the KL is highest at tokens"
        " 0–4: 0.5 nats a token, 0.35 overall."
    )
    assert told(page, "tree") == (
        "1 of 3 cases have one of the two exact gradients in expectation; the largest bias is that"
        " of “stale, token_mask, baseline full” (25 %). A baseline changes the expectation in 1 of"
        " 1 cases, most in “stale, token_mask, baseline full” (40 %)."
    )


def test_a_recipe_that_misses_is_named(tmp_path):
    found = document()
    found["contexts"]["rows"]["opd"]["cosine"]["reverse"] = math.cos(math.radians(20))
    text = told(read(write(tmp_path / "a", found)), "direction")
    assert text.startswith(
        "3 of 4 recipes that claim the gradient of a KL point along it within 1°;"
        " opd (20°) does not."
    )


def test_the_tables_hold_the_numbers_as_they_are(page):
    assert row(page, "k3_direct pitfall", "KL(student || teacher)")[2:] == [
        "0.7000",
        "1.0000",
        "50 %",
        "75 %",
        "2",
        "30 (29.9 to 30.1)",
        "25 %",
    ]
    assert row(page, "k1_direct pitfall")[2:4] == ["none", "none"]
    assert row(page, "full_kl divergence=reverse", "0.002") == [
        "full_kl divergence=reverse",
        "0.002",
        "2",
        "2.5",
        "−0.5",
        "0",
        "1.5",
        "0.5",
        "0 (0.4 to 1.2)",
    ]
    assert row(page, "opd discount=1")[5:] == ["–", "–", "10", "–"]
    assert row(page, "token-level credit")[1:] == ["exact", "50 %", "–", "0.25", "opd"]
    assert row(page, "full_kl divergence=reverse", "3") == [
        "full_kl divergence=reverse",
        "3",
        "1.5",
        "–",
        "–",
    ]
    assert row(page, "vopd baseline=optimal / opd, parameters")[1:] == [
        "0.6 (0.5 to 0.7)",
        "–",
        "0.5 (0.4 to 0.6)",
    ]


def test_pitfalls_stand_with_what_is_known_and_what_was_measured(page):
    names = [cells[0] for cells in page.rows if len(cells) == 3 and cells[0].endswith("pitfall")]
    assert len(names) == 5 + 1  # and the head
    for text in ("off by 37.5 %, turned by 60°", "wrong by −12.5 %", "not measured"):
        assert text in page.all


def test_what_the_document_says_is_text_and_never_markup(tmp_path):
    found = document()
    found["student"] = found["environment"]["commit"] = NASTY
    found["subjects"][NASTY] = described(None, about=NASTY)
    found["contexts"]["rows"][NASTY] = measured(0.5, 0.5, 1.0)
    found["tree"]["rows"][0]["title"] = NASTY
    assert read(write(tmp_path / "a", found)).source.count("<script") == 0


def test_without_gradients_of_parameters_it_says_so(tmp_path):
    found = document()
    del found["gradients"]
    parser = read(write(tmp_path / "a", found))
    assert sections(parser) == SECTIONS
    assert "The gradients of all parameters were not measured" in parser.all
    assert "Parameters:" not in parser.source


def test_few_subjects_and_numbers_that_are_nothing(tmp_path):
    found = document()
    for source in (found["contexts"], found["vocabulary"], found["gradients"]):
        source["rows"] = {
            name: copy.deepcopy(values)
            for name, values in source["rows"].items()
            if name == "k3_direct"
        }
    found["contexts"]["rows"]["k3_direct"]["variance_ratio"] = math.nan
    found["gradients"]["rows"]["k3_direct"] |= {"noise_ratio": math.inf, "signal_to_noise": None}
    found["gradients"]["by_kl"] = {"variance_share": [None] * 3, "rows": {}}
    found["subjects"] = {"k3_direct": found["subjects"]["k3_direct"]}
    del found["costs"]
    assert sections(read(write(tmp_path / "a", found))) == [
        name for name in SECTIONS if name != "costs"
    ]


def test_an_audit_inside_a_run_has_a_page_of_its_own(tmp_path):
    directory = write(
        write_run(tmp_path / "run", config(), metrics=[], evaluations=False), document()
    )
    assert "Audit:" not in write_report(directory).read_text()
    assert write_audit_report(directory) == f"wrote {directory / 'audit.html'}"
    assert "Audit:" in (directory / "audit.html").read_text()


def test_a_file_that_is_no_audit_is_refused(tmp_path):
    with pytest.raises(WorkdirError, match="lacks subjects"):
        write_report(write(tmp_path / "a", {"student": "x"}))


def test_without_matplotlib_the_audit_ends_well(tmp_path, monkeypatch):
    imports = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    line = write_audit_report(write(tmp_path / "a", document()))
    assert line.count("\n") == 0
    assert "pip install 'opdjax[report]'" in line
    assert not (tmp_path / "a" / "audit.html").exists()


def test_the_page_needs_no_jax():
    code = (
        f"import sys, {audit.__name__};"
        "sys.exit('jax' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("low", "high"), [(8e-4, 2e4), (0.7, 1.4), (0.09, 30), (1e-7, 1.3)])
def test_labels_of_a_logarithmic_axis_do_not_touch(low, high):
    for width in (150, 250, 400):
        ticks = drawing.log_ticks(low, high, width)
        assert 1 in ticks
        assert len(ticks) <= 6
        at = [width * math.log(value / low) / math.log(high / low) for value in ticks]
        for (left, one), (right, two) in itertools.pairwise(zip(at, ticks)):
            assert right - left > 7 * (len(f"{drawing.tick(one)}×{drawing.tick(two)}×") / 2)


@pytest.mark.parametrize("done", [[], ["contexts"], ["contexts", "batch_pitfalls", "tree"]])
def test_a_page_of_an_audit_that_was_stopped_names_what_is_missing(tmp_path, done):
    found, parts = document(), ["contexts", "batch_pitfalls", "vocabulary", "tree", "costs"]
    for part in [*parts, "gradients"]:
        if part not in done:
            del found[part]
    found["unfinished"] = [part for part in [*parts, "gradients"] if part not in done]
    parser = read(write(tmp_path / "a", found))
    assert f"Not measured yet: {', '.join(found['unfinished'])}." in parser.all
    assert ("tree" in sections(parser)) == ("tree" in done)
