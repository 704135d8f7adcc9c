"""`opdjax doctor`: finds mistakes that would train without an error.

A check is a pure function of what measurements.py measures, and a row of CHECKS; its docstring says
what it finds. It returns None if there is nothing to judge. Log-probs and tolerances are in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from opdjax.config import Config, MeshConfig
from opdjax.config.recipes import RECIPES
from opdjax.config.validation import require
from opdjax.data.chat import first_difference, valid_vocab
from opdjax.data.packing import to_train_batch
from opdjax.data.references import ReferenceMissError, key_of
from opdjax.data.tokenizer import FileTokenizer, load_tokenizer
from opdjax.diagnose.measurements import Measurements
from opdjax.models.hf import open_checkpoint
from opdjax.rollouts import checks as cheap
from opdjax.rollouts.checks import Finding, fault, finding, warning
from opdjax.rollouts.on_policy import step_rollouts
from opdjax.rollouts.setup import Setup, prepare, reads_scores

# Below this mean score, the teacher's own answers do not meet the criteria.
_MIN_REFERENCE_SCORE = 0.5
_TEACHER_ADVICE = "check the teacher's weights, its tokenizer and its prompt format"


def tokenizers(m: Measurements) -> Finding:
    """Strings that student and teacher map to different ids."""
    recipe = m.config.estimator.recipe
    return cheap.check_tokenizers(m.setup.tokenizer, m.setup.teacher.tokenizer, recipe)


def tokenizer_file(m: Measurements) -> Finding:
    """Texts that transformers splits otherwise than tokenizer.json, which is read here."""
    from transformers import AutoTokenizer  # seconds

    problems, both = [], {"student": m.setup.tokenizer, "teacher": m.setup.teacher.tokenizer}
    files = {role: each for role, each in both.items() if isinstance(each, FileTokenizer)}
    for role, ours in files.items():
        try:
            theirs = AutoTokenizer.from_pretrained(ours.name_or_path, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            problems.append(warning(f"transformers cannot read the {role}'s tokenizer: {error}"))
            continue
        if (found := first_difference(ours, theirs)) is not None:
            split = "tokenizer.json splits {!r} as {}, transformers as {}".format(*found)
            advice = "opdjax reads the file; in transformers load it by PreTrainedTokenizerFast"
            problems.append(warning(f"the {role}'s {split}", advice))
    return finding("tokenizer_file", problems, "transformers splits texts as tokenizer.json does")


def stop_tokens(m: Measurements) -> Finding:
    """Answers that do not stop where the models end them."""
    return cheap.check_stop_tokens(m.setup, m.teacher_answers if reads_scores(m.config) else None)


def chat_template(m: Measurements) -> Finding:
    """Prompts that student and teacher read differently."""
    return cheap.check_chat_template(m.setup)


def sampling_filter(m: Measurements) -> Finding:
    """A filter of the sampler that the loss does not know of."""
    return cheap.check_sampling_filter(m.setup, m.rollouts)


def staleness(m: Measurements) -> Finding | None:
    """Tokens of an older policy that are weighted as the student's own."""
    return next(iter(cheap.check_staleness(m.setup)), None)


def mask(m: Measurements) -> Finding:
    """A mask that is not 1 on exactly the sampled tokens."""
    width, rollouts, batch = m.prompts.tokens.shape[1], m.rollouts, m.batch
    if m.config.sampling.completions_from == "references":
        rollouts = step_rollouts(m.setup, {}, m.prompts, 0)
        batch = to_train_batch(rollouts, m.prompts)
    return cheap.check_mask(batch, rollouts, width, m.setup.decoding)


def data(m: Measurements) -> Finding:
    """Prompts that repeat, that are trained on and evaluated, or that lack an answer."""
    config, held_out, problems = m.config, m.setup.evaluator, []
    rows, count = m.setup.prompts.prompts, len(m.setup.prompts)
    parts = {config.data.source: rows}
    parts |= {config.evaluation.source: held_out.prompts.prompts} if held_out else {}
    keys = {source: [key_of(row.prompt) for row in part] for source, part in parts.items()}
    for source, found in keys.items():
        if repeated := len(found) - len(set(found)):
            text = f"{repeated} of {len(found)} prompts of {source} repeat an earlier one"
            problems.append(warning(text))
    trained, evaluated = set(keys[config.data.source]), keys.get(config.evaluation.source, [])
    if shared := sum(key in trained for key in evaluated):
        found = f"{shared} of {len(evaluated)} prompts of the evaluation are also trained on"
        problems.append(warning(found, "its scores do not show how the student does on others"))
    if count < (wanted := config.train.prompts_per_step):
        found = f"{count} prompts are fewer than train.prompts_per_step, {wanted}"
        problems.append(warning(f"{found}: a step repeats them"))
    for name in ("answer", "references"):
        if 0 < (lacking := sum(not getattr(row, name) for row in rows)) < count:
            problems.append(warning(f"{lacking} of {count} prompts have no {name}"))
    otherwise = f"{count} different prompts, and {len(evaluated)} others in the evaluation"
    return finding("data", problems, otherwise)


def padded_vocabulary(m: Measurements) -> Finding:
    """Embedding rows beyond the tokenizer that can be sampled, or have a probability."""
    width = valid_vocab(m.setup.tokenizer)
    sampled = np.asarray(m.rollouts.tokens)[np.asarray(m.rollouts.mask)]
    problems, masked = [], m.setup.decoding.valid_vocab
    if beyond := int((sampled >= width).sum()):
        found = f"{beyond} of {sampled.size} sampled tokens are ids from {width} on"
        problems.append(fault(f"{found}, which stand for no token"))
    for role, (rows, probability) in m.padding.items():
        if probability != 0:
            found = f"the {role} gives its padded ids {width} to {rows - 1} a probability"
            cause = f"expected 0: the run masks ids from {masked} on; set valid_vocab to {width}"
            problems.append(fault(f"{found} of up to {probability:.3g}", cause))
    padding = ", ".join(f"{role} {rows - width}" for role, (rows, _) in m.padding.items())
    otherwise = f"{width} tokens; embedding rows beyond them ({padding}) have probability 0"
    return finding("padded_vocabulary", problems, otherwise)


def sampler_matches_scorer(m: Measurements) -> Finding:
    """Log-probs of the sampler that are not the scorer's; a shift or a temperature is named."""
    temperature, dtype = m.setup.decoding.temperature, cheap.coarsest_dtype(m.setup)
    allowed, name = cheap.tolerance(m.backend, dtype), "sampler_matches_scorer"
    sampled, mask = np.asarray(m.rollouts.unfiltered_logprobs), np.asarray(m.batch.mask)
    if not mask.any():
        return Finding(name, "fault", "the mask is empty; expected 1 on the sampled tokens")
    scores = m.score_at(temperature)

    def agrees(mask, sampled=sampled, scores=scores) -> bool:
        difference = np.abs(sampled - scores)[mask]
        return difference.mean() <= allowed.mean and difference.max() <= allowed.largest

    difference = np.abs(sampled - scores)[mask]
    found = f"log-probs differ by at most {difference.max():.2g}, on average by "
    found += f"{difference.mean():.2g} over {int(mask.sum())} tokens"
    if agrees(mask):
        return Finding(name, "ok", f"{found} ({dtype})")
    causes, unknown = [], "the cause is neither a shift nor a temperature: compare weights, dtypes"
    for side, step in cheap.SHIFTS:
        if agrees(np.roll(mask, -step, axis=1)):
            causes.append(f"the mask is shifted by one column to the {side}")
        if agrees(mask, sampled=np.roll(sampled, -step, axis=1)):
            causes.append(f"the sampler's log-probs are shifted by one column to the {side}")
    if not causes and temperature != 1 and agrees(mask, scores=m.score_at(1.0)):
        other = f"the scorer's of {temperature:g}"
        causes.append(f"the sampler's log-probs are those of temperature 1, {other}")
    severity = fault if causes or not difference.mean() <= allowed.mean else warning
    expected = f"expected at most {allowed.largest:g}, on average {allowed.mean:g} in {dtype}"
    return Finding(name, *severity(found, expected, *(causes or [unknown])))


def self_distillation(m: Measurements) -> Finding:
    """A student that learns from its own weights as the teacher."""
    (itself, from_teacher), recipe = m.first_updates, m.config.estimator.recipe
    allowed = cheap.tolerance(m.backend, m.dtype)
    is_zero = RECIPES[recipe].is_zero_at_teacher(m.config.estimator.options)
    # The norm against the teacher is the scale of "small", unless it is infinite or NaN.
    scale = from_teacher.gradient_norm if np.isfinite(from_teacher.gradient_norm) else 0.0
    largest_norm = max(allowed.gradient * scale, 10 * allowed.mean)
    is_same = itself.log_ratio <= allowed.mean and abs(itself.kl) <= allowed.mean
    is_still = abs(itself.loss) <= allowed.mean and itself.gradient_norm <= largest_norm
    who = "a student that is its own teacher"
    result = "ok", f"{who} has nothing to learn: {itself}"
    if not is_same:
        advice = "give both the same vocabulary mask"
        result = fault(f"{who} disagrees with itself: {itself}", "expected 0", advice)
    elif not is_zero:
        more = f"(recipe {recipe!r} may have another loss and gradient there)"
        result = "ok", f"{who} agrees with itself: {itself} {more}"
    elif not is_still:
        found = f"recipe {recipe!r} updates {who}: {itself}"
        result = fault(found, "expected 0", "check its options")
    return Finding("self_distillation", *result, (f"against the teacher: {from_teacher}",))


def teacher_dtype(m: Measurements) -> Finding:
    """Rounding of the teacher that the student would learn."""
    dtype, stored = m.dtype, m.setup.teacher.checkpoint.stored_dtype
    found, problems = f"the teacher computes in {dtype} (stored as {stored})", []
    if dtype != "float32":
        mean, largest = m.teacher_rounding.mean(), m.teacher_rounding.max()
        found += f", on average {mean:.2g} a token and at most {largest:.2g} from float32"
        if stored == "float32" or not mean <= cheap.tolerance(m.backend, dtype).mean:
            advice = "--train.dtype float32 keeps the checkpoint's precision, at twice the memory"
            problems.append(warning(found, advice))
    return finding("teacher_dtype", problems, found)


def repeated_scores(m: Measurements) -> Finding:
    """Scores of one batch that do not repeat, or depend on its layout and micro-batches."""
    first, again, regrouped, layout = m.repeated_scores
    allowed = cheap.tolerance(m.backend, m.dtype).largest

    def largest_difference(other: np.ndarray) -> float:
        # Other checks judge infinities and NaNs; equal ones are no difference here.
        is_same = (first == other) | (np.isnan(first) & np.isnan(other))
        return float(np.max(np.abs(np.where(is_same, 0, first - other)), initial=0))

    repeated, moved, problems = largest_difference(again), largest_difference(regrouped), []
    if repeated != 0:
        found = f"two teacher scorings of one batch differ by up to {repeated:.2g}"
        cause = "expected the same bits: a run will not repeat, look for nondeterministic kernels"
        problems.append((warning if repeated <= allowed else fault)(found, cause))
    if not moved <= allowed:
        found = f"with {layout} the teacher's log-probs change by up to {moved:.2g}"
        cause = f"expected at most {allowed:g}: the teacher reads tokens outside the rollout"
        problems.append(fault(found, cause, "check its segment ids"))
    otherwise = f"two scorings give the same bits; with {layout} they differ by {moved:.2g}"
    return finding("repeated_scores", problems, otherwise)


def teacher_is_better(m: Measurements) -> Finding:
    """A teacher that answers nothing correctly, or predicts answers no better than the student."""
    (student, teacher, is_reference), correct, problems = m.nll, m.correct, []
    text = "reference answers" if is_reference else "prompts"
    found = f"NLL a token of the {text}: teacher {teacher.mean():.3g}, student {student.mean():.3g}"
    if correct is not None:
        found += f"; correct greedy answers: teacher {correct[1]}, student {correct[0]}"
        found += f" of {len(teacher)}"
    uniform = np.log(valid_vocab(m.setup.tokenizer))
    if not teacher.mean() < uniform / 2:
        is_fault = is_reference or np.isnan(teacher).any()
        expected = f"expected less than ln(V)/2 = {uniform / 2:.2f}"
        problems.append((fault if is_fault else warning)(found, expected, _TEACHER_ADVICE))
    elif not is_reference:
        found += " (without reference answers this does not rank the models)"
    elif teacher.mean() > student.mean():
        # A post-trained teacher may phrase answers unlike the references: then its grades count.
        if correct is not None and correct[1] > correct[0]:
            found += ": the teacher phrases answers unlike the references, but more are correct"
        else:
            advice = "student and teacher look swapped (check --student.path and --teacher.path), "
            advice += "or the teacher does not know its prompt format"
            if m.config.teacher_is_student:
                advice = "the model makes no use of what data.teacher_prompt_format shows it; "
                advice += "reword that"
            # Clear: by more than two standard errors over the prompts.
            behind, count = teacher - student, max(len(teacher) - 1, 1)
            is_clear = behind.mean() > 2 * behind.std() / np.sqrt(count)
            severity = fault if is_clear and correct is not None else warning
            problems.append(severity(found, f"expected a lower NLL of the teacher: {advice}"))
    if correct is not None and correct[1] == 0:
        none = f"{found}: " * (not problems)
        none += f"the teacher answers none of {len(teacher)} prompts correctly"
        problems.append(fault(none, "expected at least one", f"{_TEACHER_ADVICE}, and the grader"))
    return finding("teacher_is_better", problems, found)


def judge(m: Measurements) -> Finding:
    """Judges that cannot be reached, or that give no usable reply."""
    from opdjax.judge.structured_output import described  # needs an extra

    judgements, _, error = m.judged
    if error is not None:
        return Finding("judge", *fault(f"the request failed: {error}"))
    problems = described(judgement.tally for judgement in judgements)
    total, failed = len(judgements), sum(not judgement.is_scored for judgement in judgements)
    text = f"{failed} of {total} groups have no score" if failed else f"{total} groups have scores"
    status = "fault" if failed else "warning" if problems != "none" else "ok"
    return Finding("judge", status, f"{text}; unusable replies: {problems}")


def judge_spread(m: Measurements) -> Finding | None:
    """Scores that are equal within a group, so that they give no gradient."""
    groups = [set(each.scores) - {None} for each in m.judged[0] if len(each.scores) > 1]
    if not any(groups):
        return None
    tied = sum(len(scores) < 2 for scores in groups)
    text = f"in {tied} of {len(groups)} groups all rollouts have the same score: no gradient"
    return Finding("judge_spread", "warning" if tied == len(groups) else "ok", text)


def judge_references(m: Measurements) -> Finding | None:
    """Low scores of the teacher's own answers."""
    scores = [x for each in m.judged[0] for x in each.reference_scores if x is not None]
    if not scores:
        return None
    mean = sum(scores) / len(scores)
    text = f"the teacher's own answers have a mean score of {mean:.2f}"
    return Finding("judge_references", "warning" if mean < _MIN_REFERENCE_SCORE else "ok", text)


def judge_cost(m: Measurements) -> Finding | None:
    """A spending cap that has no effect; says what the judges of a whole run cost."""
    judgements, usage, _ = m.judged
    if not any(judgement.is_scored for judgement in judgements):
        return None
    total = lambda name: sum(value for key, value in usage.items() if key.endswith(f"/{name}"))
    text = f"a run sends about {total('calls'):,.0f} requests with"
    text += f" {total('input_tokens') / 1e6:,.2f} million input tokens and"
    text += f" {total('output_tokens') / 1e6:,.2f} million output tokens"
    api, models = m.config.api, (m.config.rubricator.model, m.config.verifier.model)
    if any(any(api.price_of(model)) for model in models):
        return Finding("judge_cost", "ok", f"{text}, for {total('dollars'):,.2f} dollars")
    text += "; no price is set, so api.max_dollars has no effect"
    return Finding("judge_cost", "warning" if api.max_dollars > 0 else "ok", text)


@dataclasses.dataclass(frozen=True)
class Check:
    """A row of CHECKS: a function whose docstring says what it finds, and what to do then."""

    run: Callable[[Measurements], Finding | None]  # None: there is nothing to judge
    advice: str
    applies: Callable[[Config], bool] = lambda config: True

    @property
    def name(self) -> str:
        """The name of the check and of its finding."""
        return self.run.__name__

    @property
    def finds(self) -> str:
        """The mistake that the check looks for."""
        return self.run.__doc__.partition("\n")[0]


_is_judged = lambda config: config.is_judged
# In the order in which they run. A new check is a function above and a row here.
CHECKS = (
    Check(tokenizers, "choose a teacher with the student's tokenizer", reads_scores),
    Check(tokenizer_file, "in transformers load it by PreTrainedTokenizerFast"),
    Check(data, "remove the repeats and shared prompts, or add what is missing"),
    Check(padded_vocabulary, "mask ids from the tokenizer's size on (valid_vocab)"),
    Check(stop_tokens, "set --sampling.stop-token-ids"),
    Check(chat_template, "copy a template, or set --data.teacher-format", reads_scores),
    Check(sampler_matches_scorer, "look at mask, shift by one, temperature and dtypes"),
    Check(sampling_filter, "set top_p 1, top_k 0, or use an exact divergence"),
    Check(staleness, "set estimator.importance, or use an exact divergence"),
    Check(self_distillation, "use one dtype and one vocabulary mask", reads_scores),
    Check(teacher_dtype, "set --train.dtype", reads_scores),
    Check(repeated_scores, "look at segment ids and kernels", reads_scores),
    Check(teacher_is_better, "look at paths, tokenizer, prompt format", reads_scores),
    Check(mask, "look at the packing of the rollouts"),
    Check(judge, "look at endpoints, keys and the judges' models", _is_judged),
    Check(judge_spread, "use finer criteria or a stronger judge", _is_judged),
    Check(judge_references, "look at references and criteria", _is_judged),
    Check(judge_cost, "set the prices of the endpoints", _is_judged),
)


def choose(names: Sequence[str], config: Config) -> list[Check]:
    """Return the checks of these names, or all that apply; ConfigError, with a list, on others."""
    chosen = {check.name: check for check in CHECKS if check.applies(config)}
    for name in names:
        expected = f"checks that apply to this run: {', '.join(chosen)}"
        require(name in chosen, "--only", name, expected)
    return [check for name, check in chosen.items() if not names or name in names]


def run_checks(config: Config, num_prompts: int = 8, only: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield the findings of the checks `choose(only, config)`; if tokenizers differ, that alone."""
    require(num_prompts > 0, "--num-prompts", num_prompts, "at least 1")
    choose(only, config)  # before the models are loaded
    if reads_scores(config):
        places = (model.place for model in (config.student, config.teacher_model))
        both = [load_tokenizer(open_checkpoint(*place).path) for place in places]
        found = cheap.check_tokenizers(*both, config.estimator.recipe)
        if found.status == "fault":
            note = "the other checks compare ids, so they were not made"
            yield dataclasses.replace(found, details=(*found.details, note))
            return
    # A few rows need one device only and no separate generator.
    near_policy = dataclasses.replace(config.near_policy, generator="inline", lag="fixed")
    config = dataclasses.replace(config, mesh=MeshConfig(1), near_policy=near_policy)
    try:
        setup = prepare(config)
    except ReferenceMissError as error:
        note = "the other checks need them, so they were not made"
        yield Finding("data", *fault(str(error)), (note,))
        return
    yield from examine(setup, num_prompts, only)


def examine(setup: Setup, num_prompts: int = 8, only: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield the finding of each check on the run's first prompts, as soon as it is made."""
    measured = Measurements(setup, num_prompts)
    found = (check.run(measured) for check in choose(only, setup.config))
    return (finding for finding in found if finding is not None)


def describe() -> str:
    """Return all checks: name, what it finds, what to do."""
    return "\n".join(f"{each.name:24}{each.finds} What to do: {each.advice}." for each in CHECKS)
