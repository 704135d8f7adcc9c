"""Tables of "Rubric-based On-policy Distillation" (arXiv 2605.07396): a teacher that provides text
only, and judges that grade by rubrics.
"""

from functools import partial

from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Row, numbers

PAPER = "ROPD, arXiv 2605.07396"
_TRAINING = "DAPO-Math-17K, 531 steps of 32 x 8, lr 1e-6, 8 A100"
_BLACK_BOX = (
    "Qwen3-4B, {}, from GPT-5.2-chat-latest as teacher, rubricator and verifier; " + _TRAINING
)
_WHITE_BOX = (
    "Qwen3-4B, non-thinking, from Qwen3-30B-A3B as teacher, rubricator and verifier; " + _TRAINING
)
_MINI = PaperColumn("mini pair, avg@8", labels={"pair": "mini"})
_OTHERS = "not implemented here"
_MATH = ("AIME24", "AIME25", "HMMT25 Feb", "HMMT25 Nov")
_UNGRADED = tuple(PaperColumn(name, "", {}, 1, "%") for name in ("HealthBench", "IFEval"))


def _columns(
    pair: str, names: tuple[str, ...] = _MATH, prefix: str = ""
) -> tuple[PaperColumn, ...]:
    return tuple(
        PaperColumn(f"{prefix}{name}", f"avg@k:{name}", {"pair": pair}, 100, "%") for name in names
    )


def _average(label: str, pair: str) -> PaperColumn:
    return PaperColumn(label, "avg@k:mean", {"pair": pair}, 100, "%")


def _black_box(
    name: str, mode: str, pair: str, science: str, student: tuple, judged: dict[str, tuple]
) -> PaperTable:
    """Table 1 in one of its two modes."""
    columns = (*_columns(pair), *_columns(science, ("GPQA-Diamond",)), *_UNGRADED)
    values = lambda row: numbers(columns, row)
    teacher = (80.83, 67.08, 43.75, 57.50, 78.66, 92.82, 94.37)
    return PaperTable(
        name=name,
        paper=PAPER,
        title=f"A black-box teacher, {mode}",
        settings=_BLACK_BOX.format(mode),
        columns=(*columns, _MINI) if mode == "non-thinking" else columns,
        rows=(
            Row("teacher", None, values(teacher), "provides text only"),
            Row("Qwen3-4B", {"arm": "ropd"}, values(student), "the untrained student", "before"),
            Row(
                "SFT",
                {"arm": "ropd_sft"},
                note="on the teacher's answers; the paper's numbers were not recovered",
            ),
            Row(
                "T-Judge",
                {"arm": "ropd_tjudge"},
                values(judged["T-Judge"]),
                "one score by the verifier, without a rubric",
            ),
            Row("OVD", None, values(judged["OVD"]), _OTHERS),
            Row("GAD", None, values(judged["GAD"]), _OTHERS),
            Row("ROPD", {"arm": "ropd"}, values(judged["ROPD"])),
        ),
        claims=(
            PaperClaim("more", "ROPD is better than a scalar judge", "ROPD", "T-Judge", "AIME24"),
            PaperClaim("more", "ROPD improves its student", "ROPD", "Qwen3-4B", "AIME24"),
        ),
        notes=(
            "The paper's pass@1 is the mean over 16 samples at temperature 1 and top-p 0.95.",
            "GPQA-Diamond scores students trained on RaR-Science-20k, HealthBench students trained "
            "on RaR-Medical-20k.",
            "HealthBench is graded by a model and IFEval by its own programs, which are not "
            "implemented here: these columns have only the paper's numbers.",
        ),
    )


TABLE1 = _black_box(
    "ropd_table1",
    "non-thinking",
    "qwen3_4b_gpt",
    "qwen3_4b_gpt_science",
    (24.17, 20.83, 10.42, 7.08, 35.66, 83.32, 85.21),
    {
        "T-Judge": (62.50, 56.64, 28.94, 38.75, 36.29, 84.52, 84.40),
        "OVD": (61.56, 55.71, 29.11, 37.92, 35.74, 83.68, 84.23),
        "GAD": (27.52, 23.34, 12.84, 14.11, 36.02, 83.57, 85.12),
        "ROPD": (65.02, 58.75, 31.69, 41.67, 36.50, 84.92, 85.28),
    },
)
TABLE1_THINKING = _black_box(
    "ropd_table1_thinking",
    "thinking",
    "qwen3_4b_gpt_thinking",
    "qwen3_4b_gpt_thinking_science",
    (70.42, 59.58, 33.33, 48.75, 53.59, 85.30, 86.46),
    {
        "T-Judge": (72.50, 65.48, 38.75, 51.25, 53.85, 85.58, 86.55),
        "OVD": (71.68, 65.83, 38.34, 50.42, 54.17, 85.98, 86.38),
        "GAD": (70.65, 61.28, 35.00, 49.58, 53.85, 85.70, 86.62),
        "ROPD": (75.41, 68.75, 39.16, 54.17, 55.05, 86.87, 86.95),
    },
)

_MOE_NOTE = (
    "Qwen3-30B-A3B is a mixture of experts, which the decoder does not support: behind a server it "
    "teaches and judges through text, but LOPD, which reads its log-probs, and its own scores have "
    "no runs. With Qwen3-14B in its place all rows have runs."
)
_AVERAGE = _average("average", "qwen3_4b_30b")
_T2 = (*_columns("qwen3_4b_30b"), _AVERAGE)
_more = partial(PaperClaim, "more", column=_AVERAGE.label)
_gap = partial(PaperClaim, "gap", right="teacher", column=_AVERAGE.label, base="student")
TABLE2 = PaperTable(
    name="ropd_table2",
    paper=PAPER,
    title="A white-box teacher: its text against its log-probs",
    settings=_WHITE_BOX,
    columns=(*_T2, _average("from Qwen3-14B, average", "qwen3_4b_14b"), _MINI),
    rows=(
        Row(
            "teacher",
            {"arm": "teacher"},
            numbers(_T2, (76.25, 61.25, 33.33, 55.00, 56.46)),
            "scored before any update",
            "before",
        ),
        Row(
            "student",
            {"arm": "ropd"},
            numbers(_T2, (24.17, 20.83, 10.42, 7.08, 15.63)),
            when="before",
        ),
        Row(
            "SFT",
            {"arm": "ropd_sft"},
            numbers(_T2, (26.69, 22.50, 11.62, 8.33, 17.29)),
            "reads text",
        ),
        Row(
            "LOPD",
            {"arm": "lopd"},
            numbers(_T2, (47.92, 38.75, 20.42, 24.17, 32.82)),
            "reads log-probs: plain OPD",
        ),
        Row(
            "ExOPD",
            None,
            numbers(_T2, (50.66, 41.25, 22.42, 26.68, 35.25)),
            f"reads log-probs; {_OTHERS}",
        ),
        Row(
            "ROPD", {"arm": "ropd"}, numbers(_T2, (63.33, 55.93, 25.40, 38.80, 45.87)), "reads text"
        ),
    ),
    claims=(
        _more("ROPD, from text, is better than LOPD, from log-probs", "ROPD", "LOPD"),
        _more("ROPD is better than SFT", "ROPD", "SFT"),
        _more("LOPD is better than SFT", "LOPD", "SFT"),
        _gap("ROPD closes 74.1 % of the gap to its teacher", "ROPD", margin=0.741),
        _gap("LOPD closes 42.1 % of the gap to its teacher", "LOPD", margin=0.421),
    ),
    notes=(_MOE_NOTE,),
)


def _until_lopd(prompts: str, time: str, read: str, pair: str, scale: float, unit: str) -> tuple:
    """Prompts and time until a run scores as well as LOPD's best evaluation."""
    labels = {"pair": pair}
    return (
        PaperColumn(prompts, read, labels, 1, "", "LOPD", "prompts"),
        PaperColumn(time, read, labels, scale, unit, "LOPD", "seconds"),
    )


_hours = partial(_until_lopd, read="avg@k:mean", scale=1 / 3600, unit="h")
_F3 = _hours("prompts until LOPD's best", "hours until LOPD's best", pair="qwen3_4b_30b")
EFFICIENCY = PaperTable(
    name="ropd_efficiency",
    paper=PAPER,
    title="Figure 3: the cost of reaching LOPD's best score",
    settings=_WHITE_BOX,
    columns=(
        *_F3,
        *_hours("from Qwen3-14B, prompts", "from Qwen3-14B, hours", pair="qwen3_4b_14b"),
        *_until_lopd("mini pair, prompts", "mini pair, seconds", "avg@k", "mini", 1, "s"),
    ),
    rows=(
        Row("ROPD", {"arm": "ropd"}, numbers(_F3, (1600, 5.5))),
        Row("LOPD", {"arm": "lopd"}, numbers(_F3, (15400, 34.4))),
    ),
    claims=(
        PaperClaim(
            "ratio",
            "ROPD takes a tenth of LOPD's prompts (9.6 times fewer)",
            "LOPD",
            "ROPD",
            _F3[0].label,
            9.6,
        ),
        PaperClaim(
            "ratio",
            "ROPD takes fewer hours (6.3 times)",
            "LOPD",
            "ROPD",
            _F3[1].label,
            6.3,
            "D",
        ),
    ),
    notes=(
        "Read at a run's evaluations, so to a precision of evaluation.every; the target is the "
        "best score of LOPD's run with the same seed.",
        "The paper's hours are those until 48.3 % on AIME24; its samples are read as prompts.",
        "Hours count training steps with the time spent waiting for judges, without evaluations.",
        _MOE_NOTE,
    ),
)

_T3 = tuple(PaperColumn(f"Gemma3-4B-it {name}", "", {}, 100, "%") for name in (*_MATH, "average"))
_SMALLER = (
    *_columns("qwen3_1_7b_gpt", prefix="Qwen3-1.7B "),
    _average("Qwen3-1.7B average", "qwen3_1_7b_gpt"),
)
TABLE3 = PaperTable(
    name="ropd_table3",
    paper=PAPER,
    title="A student of another family",
    settings=f"Gemma3-4B-it from GPT-5.2-chat-latest; {_TRAINING}",
    columns=(*_T3, *_SMALLER),
    rows=(
        Row(
            "student before",
            {"arm": "ropd"},
            numbers(_T3, (6.67, 12.92, 1.67, 6.25, 6.88)),
            when="before",
        ),
        Row("OVD", None, numbers(_T3, (7.38, 13.00, 2.05, 6.36, 7.20)), _OTHERS),
        Row("GAD", None, numbers(_T3, (6.92, 12.50, 1.83, 6.08, 6.83)), _OTHERS),
        Row("ROPD", {"arm": "ropd"}, numbers(_T3, (10.00, 13.72, 2.92, 6.88, 8.38))),
    ),
    claims=(
        PaperClaim(
            "more",
            "ROPD improves other students too",
            "ROPD",
            "student before",
            "Qwen3-1.7B average",
        ),
    ),
    notes=(
        "Gemma 3 is not a supported model family (Llama, Qwen2 and Qwen3 are). Qwen3-1.7B without "
        "thinking replaces it, in columns without numbers of the paper.",
    ),
)

_T6 = _columns("qwen3_4b_gpt", ("AIME24",))
TABLE6 = PaperTable(
    name="ropd_table6",
    paper=PAPER,
    title="Ablations: references, the shared rubric, the blind pool",
    settings=_BLACK_BOX.format("non-thinking"),
    columns=(*_T6, _MINI),
    rows=(
        Row("student before", {"arm": "ropd"}, numbers(_T6, (24.17,)), when="before"),
        Row(
            "one reference",
            {"arm": "ropd_one_reference"},
            numbers(_T6, (47.08,)),
            "m = 1 instead of 4",
        ),
        Row("a rubric for each rollout", {"arm": "ropd_per_student"}, numbers(_T6, (61.25,))),
        Row("a verifier that is not blind", {"arm": "ropd_not_blind"}, numbers(_T6, (61.75,))),
        Row("ROPD", {"arm": "ropd"}, numbers(_T6, (65.02,))),
    ),
    claims=tuple(
        PaperClaim("more", text, "ROPD", row, "AIME24")
        for text, row in (
            ("four references are better than one", "one reference"),
            ("one rubric per group is better than one per rollout", "a rubric for each rollout"),
            ("a blind verifier is better than an informed one", "a verifier that is not blind"),
        )
    ),
)

TABLES = (TABLE1, TABLE1_THINKING, TABLE2, EFFICIENCY, TABLE3, TABLE6)
