"""Tables of "Near-Policy: Accelerating On-Policy Distillation via Asynchronous Generation and
Selective Packing" (arXiv 2605.05940).
"""

from functools import partial

from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Row, numbers

PAPER = "NPD, arXiv 2605.05940"
_OPENPANGU = (
    "openPangu-Embedded-7B to 1B, 1.2 million samples of its makers, mean of 11 benchmarks, 8 "
    "Ascend NPUs, 366 hours on one"
)
_MATH = (
    "Qwen2.5-Math-1.5B from Qwen2.5-Math-7B-Instruct, 50 thousand prompts (apparently MetaMathQA), "
    "lr 1e-5, ten epochs"
)
_BOTH_SETTINGS = f"{_OPENPANGU}; here the pair of its controlled experiment: {_MATH}"
_PAIR, _MINI_PAIR = {"pair": "qwen2_5_math_1_5b"}, {"pair": "mini"}
_MATH500 = PaperColumn("1.5B MATH500", "avg@k:MATH500", _PAIR, 100, "%")
_GSM8K = PaperColumn("1.5B GSM8K", "avg@k:GSM8K", _PAIR, 100, "%")
_MINI = PaperColumn("mini pair, avg@8", labels=_MINI_PAIR)
_PANGU = PaperColumn("openPangu-1B, 11 benchmarks", "", {}, 1, "%")
_more = partial(PaperClaim, "more", column=_MATH500.label, mark="N")


def _vary(name: str, title: str, best: str, setting: str, rows: tuple[Row, ...]) -> PaperTable:
    """One setting varied; only the peak of the paper's curve was recovered, not the curve."""
    others = [row.label for row in rows if row.label != best]
    return PaperTable(
        name,
        PAPER,
        title,
        _BOTH_SETTINGS,
        (_MATH500, _GSM8K, _MINI),
        rows,
        tuple(_more(f"{setting}: {best} is better than {each}", best, each) for each in others),
        ("The paper's curve was not recovered; its text names the best setting.",),
    )


_STALENESS = PaperColumn("1.5B staleness", "last:staleness/kl", _PAIR, 1, "nats")
_pangu = lambda number, mark: numbers((_PANGU,), (number,), mark)
COMPONENTS = PaperTable(
    name="npd_components",
    paper=PAPER,
    title="The gain of each component: the student's own answers, the filter, one refresh",
    settings=_BOTH_SETTINGS,
    columns=(
        *(_PANGU, _MATH500, _GSM8K, _STALENESS, _MINI),
        PaperColumn("mini pair, staleness", _STALENESS.read, _MINI_PAIR, 1, "nats"),
    ),
    rows=(
        Row("SFT", {"arm": "npd_sft"}, _pangu(56.28, "N"), "on the teacher's answers"),
        Row(
            "offline KD",
            {"arm": "npd_offline_kd"},
            _pangu(58.79, "I"),
            "on the teacher's answers; the remainder of the gains below",
        ),
        Row(
            "+ packed rollouts",
            {"arm": "npd_rollouts"},
            _pangu(61.63, "I"),
            "its own answers, sampled once; +2.84 in the notes",
        ),
        Row("+ filter", {"arm": "npd_filter"}, _pangu(62.78, "I"), "+1.15 in the notes"),
        Row("NPD", {"arm": "npd"}, _pangu(64.37, "N"), "+ one refresh: +1.59 in the notes"),
        Row(
            "SFT + GRPO",
            None,
            _pangu(59.86, "D"),
            "a second training of 300 steps; +3.58 in the notes",
        ),
        Row(
            "NPD + GRPO",
            None,
            _pangu(68.73, "N"),
            "a second training of the exported student: recipe grpo",
        ),
        Row("Qwen3-1.7B", None, _pangu(63.69, "N"), "another model, untrained here"),
    ),
    claims=(
        _more("NPD is better than SFT", "NPD", "SFT", mark="A"),
        _more("its own answers are better than the teacher's", "+ packed rollouts", "offline KD"),
        _more("the filter adds to that", "+ filter", "+ packed rollouts"),
        _more("one refresh adds to that", "NPD", "+ filter"),
        PaperClaim(
            "less",
            "the filter keeps data closer to the student",
            "+ filter",
            "+ packed rollouts",
            _STALENESS.label,
            mark="N",
        ),
    ),
    notes=(
        "openPangu is not a supported model family and its data belong to its makers: the column "
        "has only the paper's numbers.",
        "The paper states the gains of the components; their sum leaves 2.51 points for the step "
        "from SFT to offline distillation, which is inferred.",
        "Staleness: KL(student || behaviour) of the tokens trained on, last ten steps; in the "
        "paper under 0.10, without the filter 0.12.",
    ),
)

LAMBDA = _vary(
    "npd_lambda",
    "The teacher's share of the loss",
    "lambda = 0.9",
    "lambda",
    (
        Row("lambda = 0", {"arm": "npd_lambda_0"}, note="cross-entropy on what the filter kept"),
        Row("lambda = 0.5", {"arm": "npd_lambda_0.5"}),
        Row("lambda = 0.9", {"arm": "npd"}),
        Row("lambda = 1", {"arm": "npd_lambda_1"}),
    ),
)
K = _vary(
    "npd_k",
    "How many of the teacher's top ids are distilled",
    "k = 10",
    "k",
    (
        Row("k = 1", {"arm": "npd_k1"}),
        Row("k = 5", {"arm": "npd_k5"}),
        Row("k = 10", {"arm": "npd"}),
        Row("k = 50", {"arm": "npd_k50"}),
    ),
)
TAU = _vary(
    "npd_tau",
    "The largest teacher-student difference of an answer that is kept",
    "tau = 0.8",
    "tau",
    (
        Row("tau = 0.1", {"arm": "npd_tau_0.1"}),
        Row("tau = 0.2", {"arm": "npd_tau_0.2"}),
        Row("tau = 0.4", {"arm": "npd_tau_0.4"}),
        Row("tau = 0.8", {"arm": "npd"}),
    ),
)
REFRESH = _vary(
    "npd_refresh",
    "How often the student answers the prompts again in ten epochs",
    "one refresh",
    "refreshes",
    (
        Row("none", {"arm": "npd_filter"}),
        Row("one refresh", {"arm": "npd"}, note="before the sixth epoch"),
        Row("two", {"arm": "npd_refresh_2"}),
        Row("nine", {"arm": "npd_refresh_9"}, note="before every epoch"),
    ),
)

_BOTH = (_GSM8K, _MATH500)
_ON_POLICY_NOTE = "the same loss on on-policy answers; the paper's baseline is DistiLLM-2"
MATH = PaperTable(
    name="npd_math",
    paper=PAPER,
    title="Controlled experiment on mathematics: the closed share of the gap to the teacher",
    settings=_MATH,
    columns=(*_BOTH, _MINI),
    rows=(
        Row(
            "student before",
            {"arm": "npd"},
            numbers(_BOTH, (77.33, 62.0), "N"),
            "base or fine-tuned is unclear",
            "before",
        ),
        Row("SFT", {"arm": "npd_sft"}),
        Row("offline KD", {"arm": "npd_offline_kd"}),
        Row("on-policy", {"arm": "npd_on_policy"}, note=_ON_POLICY_NOTE),
        Row("DistiLLM-2, GKD", None, note="in the paper, but their numbers were not recovered"),
        Row("NPD", {"arm": "npd"}, numbers(_BOTH, (82.87, 76.6), "N")),
        Row(
            "teacher",
            {"arm": "teacher"},
            numbers(_BOTH, (89.31, 80.0), "N"),
            "scored before any update",
            "before",
        ),
    ),
    claims=(
        PaperClaim(
            "gap",
            "NPD closes 46 to 81 % of the gap to its teacher",
            "NPD",
            "teacher",
            _MATH500.label,
            0.46,
            "N",
            "student before",
        ),
        _more("NPD is better than SFT", "NPD", "SFT"),
        _more("NPD is better than offline distillation", "NPD", "offline KD"),
        _more("NPD is better than the on-policy baseline", "NPD", "on-policy"),
    ),
    notes=("The claim on the gap is tested with its smaller share, 46 %, in every column.",),
)

_SPEED = tuple(
    PaperColumn(f"{name} {what}", read, labels, 1, unit)
    for name, labels in (("1.5B", _PAIR), ("mini pair", _MINI_PAIR))
    for what, read, unit in (
        ("learner", "median:perf/tokens_per_second", "tokens/s"),
        ("whole run", "seconds", "s"),
    )
)
SPEED = PaperTable(
    name="npd_speed",
    paper=PAPER,
    title="Speed against the on-policy baseline: the learner alone, and whole runs with generation",
    settings=_MATH,
    columns=_SPEED,
    rows=(
        Row("NPD", {"arm": "npd"}),
        Row("on-policy", {"arm": "npd_on_policy"}, note=_ON_POLICY_NOTE),
        Row("SFT", {"arm": "npd_sft"}),
    ),
    claims=(
        PaperClaim(
            "ratio",
            "the learner is 8.1 times as fast as on-policy",
            "NPD",
            "on-policy",
            _SPEED[0].label,
            8.1,
            "B",
        ),
    ),
    notes=(
        "The median step of a refresh schedule samples nothing, that of the on-policy one does; "
        "the whole run includes both.",
        "How the paper accounts for its 300 of 366 hours of generation was not recovered.",
    ),
)

TABLES = (COMPONENTS, LAMBDA, K, TAU, REFRESH, MATH, SPEED)
