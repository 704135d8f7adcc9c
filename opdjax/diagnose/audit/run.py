"""The whole audit: everything it measures, as one JSON document for the table and the page."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial

import jax
from tqdm import tqdm

from opdjax.config import AuditConfig, Config, EstimatorConfig, MeshConfig, SamplingConfig
from opdjax.config.recipes import EXACT, WITH_BASELINE
from opdjax.config.validation import ConfigError
from opdjax.diagnose.audit.contexts import audit_vocabulary
from opdjax.diagnose.audit.gradients import NUM_REDRAWS, audit_batch_pitfalls, audit_gradients
from opdjax.diagnose.audit.pair import audit_contexts, audit_costs, collect_states
from opdjax.diagnose.audit.subjects import Part, Subject, subject
from opdjax.diagnose.audit.tree import audit_tree, own_case
from opdjax.estimators import TOKEN_LOSSES
from opdjax.estimators.pitfalls import PITFALLS
from opdjax.rollouts.setup import Setup, prepare
from opdjax.runs.workdir import environment


def audit(
    config: Config,
    subjects: list[Subject],
    settings: AuditConfig,
    *,
    skip_cost: bool = False,
    save: Callable[[Part], None] = lambda document: None,
) -> Part:
    """Measure the subjects and return a JSON document; progress is shown on stderr.

    They are measured on the config's pair of models, at random contexts and on an enumerated tree.
    The student samples the pair's contexts at temperature 1 without filters. After each part, which
    is a key of the document, `save(document)` is called; `unfinished` names the parts to come.
    """
    progress = lambda part: partial(tqdm, desc=part, mininterval=1.0)
    uniforms = NUM_REDRAWS * max(each.num_draws for each in subjects)
    at_once = config.rows_per_step // config.train.gradient_accumulation_steps
    setup = _prepare(config, settings)
    states = collect_states(setup, settings, uniforms, at_once, progress("sampling"))
    document: Part = {
        "subjects": {each.name: _describe(each) for each in subjects},
        "settings": dataclasses.asdict(settings),
        # Of all pitfalls: those of a batch are not among the subjects.
        "pitfalls": {name: pitfall.about for name, pitfall in PITFALLS.items()},
        "student": config.student.path,
        "teacher": config.teacher.path,
        "seed": config.seed,
        "environment": environment([device.device_kind for device in jax.devices()]),
    }
    ordered = sorted(subjects, key=lambda each: each.is_coupled)
    uncoupled = [each for each in ordered if not each.is_coupled]
    # Estimators that sample no token differ in bias alone, so only three of them are measured in
    # parameter space: the two exact ones and the config's own.
    exact = [subject(EXACT, divergence=name) for name in ("reverse", "forward")]
    varying = [each for each in ordered if each.is_sampled or each.is_own or each in exact]
    own = [own_case(each, config.estimator.aggregation) for each in subjects if each.is_own]
    size = settings.num_contexts, settings.vocab
    parts = {  # the slowest ones last
        "contexts": partial(audit_contexts, states, uncoupled),
        "batch_pitfalls": partial(audit_batch_pitfalls, states),
        "vocabulary": partial(audit_vocabulary, uncoupled, size, config.seed),
        "tree": partial(audit_tree, own, seed=config.seed),
    }
    if not skip_cost:
        parts["costs"] = partial(audit_costs, states, [each for each in ordered if each.recipe])
    if settings.parameter_space:
        parts["gradients"] = partial(audit_gradients, states, varying)
    for number, (name, measure) in enumerate(parts.items(), 1):
        document[name] = measure(progress=progress(f"{name} ({number}/{len(parts)})"))
        document["unfinished"] = list(parts)[number:]
        save(document)
    return document


def _prepare(config: Config, settings: AuditConfig) -> Setup:
    """Set up models and data for the recipe that needs most: teacher weights, one vocabulary."""
    names = ("max_completion_length", "stop_token_ids", "stop_strings")
    one_batch = {"prompts_per_step": settings.num_prompts, "gradient_accumulation_steps": 1}
    changed = {
        "estimator": EstimatorConfig(WITH_BASELINE),
        "sampling": SamplingConfig(**{name: getattr(config.sampling, name) for name in names}),
        "train": dataclasses.replace(config.train, **one_batch),
        "evaluation": dataclasses.replace(config.evaluation, source=None),
        "mesh": MeshConfig(1),
        "near_policy": type(config.near_policy)(),
    }
    return prepare(dataclasses.replace(config, **changed))


def _describe(each: Subject) -> Part:
    about = each.pitfall.about if each.row is None else each.row.description
    if not each.is_on_policy:
        about += " Measured at the student's contexts with the teacher's tokens;"
        about += " in training the contexts are the teacher's too."
    if each.row is not None and each.row.cross_entropy is None:
        about += " Measured on all of the student's own tokens;"
        about += " in training an older student samples them and a filter selects some."
    names = ("recipe", "options", "advertises", "is_sampled", "is_coupled", "is_own")
    entry = {name: getattr(each, name) for name in names}
    return entry | {"is_pitfall": each.recipe is None, "about": about}


def explain(name: str) -> str:
    """Return the documentation of a recipe or a pitfall; ConfigError on an unknown name."""
    if name not in (known := [*TOKEN_LOSSES, *PITFALLS]):
        raise ConfigError(f"there is no recipe and no pitfall {name!r}; expected one of {known}")
    return inspect.getdoc(TOKEN_LOSSES[name]) if name in TOKEN_LOSSES else PITFALLS[name].about
