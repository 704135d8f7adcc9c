"""Tables of "Near-Policy: Accelerating On-Policy Distillation via Asynchronous Generation and
Selective Packing" (arXiv 2605.05940).
"""

from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Row, Value, numbers

PAPER = "NPD, arXiv 2605.05940"
_OPENPANGU = "openPangu-Embedded-7B to 1B, 1.2 million samples of its makers, mean of 11 benchmarks, 8 Ascend NPUs, 366 hours of one"
_MATH = "Qwen2.5-Math-1.5B from Qwen2.5-Math-7B-Instruct, 50 thousand prompts (MetaMathQA by all signs), lr 1e-5, ten epochs"
_PAIR = {"pair": "qwen2_5_math_1_5b"}
_MATH500, _GSM8K = (
    PaperColumn(f"1.5B {name}", f"avg@k:{name}", _PAIR, 100, "%") for name in ("MATH500", "GSM8K")
)
_MINI = PaperColumn("mini pair, avg@8", labels={"pair": "mini"})
_PANGU = PaperColumn("openPangu-1B, 11 benchmarks", "", {}, 1, "%")
_NO_PANGU = "openPangu's weights are read by no family here and its data are its makers': the column has the paper's numbers alone."


def _sweep_of(name: str, title: str, best: str, claim: str, rows: tuple[Row, ...]) -> PaperTable:
    """One setting changed at a time; all that was recovered of the paper's curves is where they
    peak.
    """
    others = [row.label for row in rows if row.label != best]
    return PaperTable(
        name,
        PAPER,
        title,
        f"{_OPENPANGU}; here the pair of its controlled experiment: {_MATH}",
        (_MATH500, _GSM8K, _MINI),
        rows,
        tuple(
            PaperClaim(
                f"{claim}: {best} is better than {other}",
                "more",
                best,
                other,
                _MATH500.label,
                mark="N",
            )
            for other in others
        ),
        ("The paper's curve was not recovered; its text names the best setting.",),
    )


def _pangu(number: float, mark: str) -> dict[str, Value]:
    return {_PANGU.label: Value(number, mark)}


_STALENESS = PaperColumn("1.5B staleness", "last:staleness/kl", _PAIR, 1, "nats")
_MINI_STALENESS = PaperColumn(
    "mini pair, staleness", "last:staleness/kl", {"pair": "mini"}, 1, "nats"
)
COMPONENTS = PaperTable(
    name="npd_components",
    paper=PAPER,
    title="What each part adds: the student's own answers, the filter, one refresh",
    settings=f"{_OPENPANGU}; here the pair of its controlled experiment: {_MATH}",
    columns=(_PANGU, _MATH500, _GSM8K, _STALENESS, _MINI, _MINI_STALENESS),
    rows=(
        Row("SFT", {"arm": "npd_sft"}, _pangu(56.28, "N"), note="on the teacher's answers"),
        Row(
            "offline KD",
            {"arm": "npd_offline_kd"},
            _pangu(58.79, "I"),
            note="teacher's answers; what the steps below leave",
        ),
        Row(
            "+ packed rollouts",
            {"arm": "npd_rollouts"},
            _pangu(61.63, "I"),
            note="its own answers, drawn once; +2.84 in the notes",
        ),
        Row("+ filter", {"arm": "npd_filter"}, _pangu(62.78, "I"), note="+1.15 in the notes"),
        Row("NPD", {"arm": "npd"}, _pangu(64.37, "N"), note="+ one refresh: +1.59 in the notes"),
        Row(
            "SFT + GRPO",
            None,
            _pangu(59.86, "D"),
            note="a second training, of 300 steps; +3.58 in the notes",
        ),
        Row(
            "NPD + GRPO",
            None,
            _pangu(68.73, "N"),
            note="a second training of the exported student: recipe grpo",
        ),
        Row("Qwen3-1.7B", None, _pangu(63.69, "N"), note="another model, as it is"),
    ),
    claims=(
        PaperClaim("NPD is better than SFT", "more", "NPD", "SFT", _MATH500.label, mark="A"),
        PaperClaim(
            "its own answers are better than the teacher's",
            "more",
            "+ packed rollouts",
            "offline KD",
            _MATH500.label,
            mark="N",
        ),
        PaperClaim(
            "the filter adds to that",
            "more",
            "+ filter",
            "+ packed rollouts",
            _MATH500.label,
            mark="N",
        ),
        PaperClaim("one refresh adds to that", "more", "NPD", "+ filter", _MATH500.label, mark="N"),
        PaperClaim(
            "the filter keeps data nearer to the student",
            "less",
            "+ filter",
            "+ packed rollouts",
            _STALENESS.label,
            mark="N",
        ),
    ),
    notes=(
        _NO_PANGU,
        "The paper tells the gains of the parts; their sum leaves 2.51 points for the step from SFT to distillation, which is inferred.",
        "Staleness: KL(student || behaviour) of what was trained on, last ten steps; the paper's: under 0.10, without the filter 0.12.",
    ),
)

LAMBDA = _sweep_of(
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
K = _sweep_of(
    "npd_k",
    "How many of the teacher's tokens are distilled",
    "k = 10",
    "k",
    (
        Row("k = 1", {"arm": "npd_k1"}),
        Row("k = 5", {"arm": "npd_k5"}),
        Row("k = 10", {"arm": "npd"}),
        Row("k = 50", {"arm": "npd_k50"}),
    ),
)
TAU = _sweep_of(
    "npd_tau",
    "How far teacher and student may be apart on an answer that is kept",
    "tau = 0.8",
    "tau",
    (
        Row("tau = 0.1", {"arm": "npd_tau_0.1"}),
        Row("tau = 0.2", {"arm": "npd_tau_0.2"}),
        Row("tau = 0.4", {"arm": "npd_tau_0.4"}),
        Row("tau = 0.8", {"arm": "npd"}),
    ),
)
REFRESH = _sweep_of(
    "npd_refresh",
    "How often the prompts are answered anew in ten epochs",
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
MATH = PaperTable(
    name="npd_math",
    paper=PAPER,
    title="Controlled experiment on mathematics: how much of the gap to the teacher is closed",
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
        Row(
            "on-policy",
            {"arm": "npd_on_policy"},
            note="the same loss on answers of the moment; the paper's baseline is DistiLLM-2",
        ),
        Row(
            "DistiLLM-2, GKD", None, note="compared in the paper; their numbers were not recovered"
        ),
        Row("NPD", {"arm": "npd"}, numbers(_BOTH, (82.87, 76.6), "N")),
        Row(
            "teacher",
            {"arm": "teacher"},
            numbers(_BOTH, (89.31, 80.0), "N"),
            "its scores as a student before any update",
            "before",
        ),
    ),
    claims=(
        PaperClaim(
            "NPD closes 46 to 81 % of the gap to its teacher",
            "gap",
            "NPD",
            "teacher",
            "1.5B MATH500",
            0.46,
            "N",
            "student before",
        ),
        PaperClaim("NPD is better than SFT", "more", "NPD", "SFT", "1.5B MATH500", mark="N"),
        PaperClaim(
            "NPD is better than offline distillation",
            "more",
            "NPD",
            "offline KD",
            "1.5B MATH500",
            mark="N",
        ),
        PaperClaim(
            "NPD is better than the on-policy baseline",
            "more",
            "NPD",
            "on-policy",
            "1.5B MATH500",
            mark="N",
        ),
    ),
    notes=("Of the gap at least 46 %, its smaller share, is asked in every column.",),
)

_SPEED = tuple(
    PaperColumn(f"{name} {what}", read, labels, 1, unit)
    for name, labels in (("1.5B", _PAIR), ("mini pair", {"pair": "mini"}))
    for what, read, unit in (
        ("learner", "median:perf/tokens_per_second", "tokens/s"),
        ("whole run", "seconds", "s"),
    )
)
SPEED = PaperTable(
    name="npd_speed",
    paper=PAPER,
    title="Speed beside the on-policy baseline: of the learner alone, and of the whole run with generation charged",
    settings=_MATH,
    columns=_SPEED,
    rows=(
        Row("NPD", {"arm": "npd"}),
        Row(
            "on-policy",
            {"arm": "npd_on_policy"},
            note="the same loss; the paper's baseline is DistiLLM-2",
        ),
        Row("SFT", {"arm": "npd_sft"}),
    ),
    claims=(
        PaperClaim(
            "the learner is 8.1 times as fast as on-policy",
            "ratio",
            "NPD",
            "on-policy",
            _SPEED[0].label,
            8.1,
            mark="B",
        ),
    ),
    notes=(
        "The median step of a refreshed schedule draws nothing, that of the on-policy one does; the whole run charges both.",
        "How the paper charges its 300 of 366 hours of generation was not recovered.",
    ),
)

TABLES = (COMPONENTS, LAMBDA, K, TAU, REFRESH, MATH, SPEED)
