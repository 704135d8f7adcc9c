"""Tables of "Rubric-based On-policy Distillation" (arXiv 2605.07396): a teacher that is known by
its text, judged by rubrics.
"""

from opdjax.report.papers.tables import PaperClaim, PaperColumn, PaperTable, Row, numbers

PAPER = "ROPD, arXiv 2605.07396"
_BLACK_BOX = "Qwen3-4B, {}, from GPT-5.2-chat-latest as teacher, rubricator and verifier; DAPO-Math-17K, 531 steps of 32 x 8, lr 1e-6, 8 A100"
_WHITE_BOX = "Qwen3-4B, non-thinking, from Qwen3-30B-A3B as teacher, rubricator and verifier; DAPO-Math-17K, 531 steps of 32 x 8, lr 1e-6, 8 A100"
_MINI = PaperColumn("mini pair, avg@8", labels={"pair": "mini"})
_OTHERS = "not one of the recipes here"
_MATH = ("AIME24", "AIME25", "HMMT25 Feb", "HMMT25 Nov")
_UNGRADED = tuple(PaperColumn(name, "", {}, 1, "%") for name in ("HealthBench", "IFEval"))
_UNGRADED_NOTE = "HealthBench is scored by a model and IFEval by programs of its own: no grader here can, so that they have the paper's numbers alone."


def _columns(
    pair: str, names: tuple[str, ...] = _MATH, prefix: str = ""
) -> tuple[PaperColumn, ...]:
    return tuple(
        PaperColumn(f"{prefix}{name}", f"avg@k:{name}", {"pair": pair}, 100, "%") for name in names
    )


def _black_box(
    name: str, mode: str, pair: str, science: str, student: tuple, judged: dict[str, tuple]
) -> PaperTable:
    """Table 1 in one of its two modes."""
    columns = (*_columns(pair), *_columns(science, ("GPQA-Diamond",)), *_UNGRADED)
    teacher = (80.83, 67.08, 43.75, 57.50, 78.66, 92.82, 94.37)
    return PaperTable(
        name=name,
        paper=PAPER,
        title=f"A black box as the teacher, {mode}",
        settings=_BLACK_BOX.format(mode),
        columns=(*columns, _MINI) if mode == "non-thinking" else columns,
        rows=(
            Row("teacher", None, numbers(columns, teacher), note="known by its text alone"),
            Row(
                "Qwen3-4B",
                {"arm": "ropd"},
                numbers(columns, student),
                "the student before training",
                "before",
            ),
            Row(
                "SFT",
                {"arm": "ropd_sft"},
                note="on the teacher's answers; its numbers were not recovered",
            ),
            Row(
                "T-Judge",
                {"arm": "ropd_tjudge"},
                numbers(columns, judged["T-Judge"]),
                note="one score by the verifier, no rubric",
            ),
            Row("OVD", None, numbers(columns, judged["OVD"]), note=_OTHERS),
            Row("GAD", None, numbers(columns, judged["GAD"]), note=_OTHERS),
            Row("ROPD", {"arm": "ropd"}, numbers(columns, judged["ROPD"])),
        ),
        claims=(
            PaperClaim("ROPD is better than a scalar judge", "more", "ROPD", "T-Judge", "AIME24"),
            PaperClaim("ROPD is better than its start", "more", "ROPD", "Qwen3-4B", "AIME24"),
        ),
        notes=(
            "pass@1 of the paper is the mean over 16 samples at temperature 1 and top-p 0.95.",
            "GPQA-Diamond is of students trained on RaR-Science-20k, HealthBench on RaR-Medical-20k.",
            _UNGRADED_NOTE,
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
    "Qwen3-30B-A3B is a mixture of experts, which the decoder here does not compute: behind a server it teaches and judges by its text, "
    "but LOPD, which reads its log-probs, and its own scores have no runs. With Qwen3-14B in its place all rows do."
)
_AVERAGE = PaperColumn("average", "avg@k:mean", {"pair": "qwen3_4b_30b"}, 100, "%")
_14B = PaperColumn("from Qwen3-14B, average", "avg@k:mean", {"pair": "qwen3_4b_14b"}, 100, "%")
_T2 = (*_columns("qwen3_4b_30b"), _AVERAGE)
TABLE2 = PaperTable(
    name="ropd_table2",
    paper=PAPER,
    title="A white box as the teacher: text alone beside log-probs",
    settings=_WHITE_BOX,
    columns=(*_T2, _14B, _MINI),
    rows=(
        Row(
            "teacher",
            {"arm": "teacher"},
            numbers(_T2, (76.25, 61.25, 33.33, 55.00, 56.46)),
            "as a student before any update",
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
            note="reads text",
        ),
        Row(
            "LOPD",
            {"arm": "lopd"},
            numbers(_T2, (47.92, 38.75, 20.42, 24.17, 32.82)),
            note="reads log-probs: plain OPD",
        ),
        Row(
            "ExOPD",
            None,
            numbers(_T2, (50.66, 41.25, 22.42, 26.68, 35.25)),
            note=f"reads log-probs; {_OTHERS}",
        ),
        Row(
            "ROPD",
            {"arm": "ropd"},
            numbers(_T2, (63.33, 55.93, 25.40, 38.80, 45.87)),
            note="reads text",
        ),
    ),
    claims=(
        PaperClaim(
            "ROPD, by text alone, is better than LOPD, by log-probs",
            "more",
            "ROPD",
            "LOPD",
            "average",
        ),
        PaperClaim("ROPD is better than SFT", "more", "ROPD", "SFT", "average"),
        PaperClaim("LOPD is better than SFT", "more", "LOPD", "SFT", "average"),
        PaperClaim(
            "ROPD closes 74.1 % of the gap to its teacher",
            "gap",
            "ROPD",
            "teacher",
            "average",
            0.741,
            "P",
            "student",
        ),
        PaperClaim(
            "LOPD closes 42.1 % of the gap to its teacher",
            "gap",
            "LOPD",
            "teacher",
            "average",
            0.421,
            "P",
            "student",
        ),
    ),
    notes=(_MOE_NOTE,),
)

_EFFICIENCY = {
    "paper": (
        PaperColumn(
            "prompts until LOPD's best",
            "avg@k:mean",
            {"pair": "qwen3_4b_30b"},
            1,
            "",
            "LOPD",
            "prompts",
        ),
        PaperColumn(
            "hours until LOPD's best",
            "avg@k:mean",
            {"pair": "qwen3_4b_30b"},
            1 / 3600,
            "h",
            "LOPD",
            "seconds",
        ),
    ),
    "14b": (
        PaperColumn(
            "from Qwen3-14B, prompts",
            "avg@k:mean",
            {"pair": "qwen3_4b_14b"},
            1,
            "",
            "LOPD",
            "prompts",
        ),
        PaperColumn(
            "from Qwen3-14B, hours",
            "avg@k:mean",
            {"pair": "qwen3_4b_14b"},
            1 / 3600,
            "h",
            "LOPD",
            "seconds",
        ),
    ),
    "mini": (
        PaperColumn("mini pair, prompts", "avg@k", {"pair": "mini"}, 1, "", "LOPD", "prompts"),
        PaperColumn("mini pair, seconds", "avg@k", {"pair": "mini"}, 1, "s", "LOPD", "seconds"),
    ),
}
EFFICIENCY = PaperTable(
    name="ropd_efficiency",
    paper=PAPER,
    title="Figure 3: what it takes to score as well as LOPD does at its best",
    settings=_WHITE_BOX,
    columns=tuple(column for pair in _EFFICIENCY.values() for column in pair),
    rows=(
        Row("ROPD", {"arm": "ropd"}, numbers(_EFFICIENCY["paper"], (1600, 5.5))),
        Row("LOPD", {"arm": "lopd"}, numbers(_EFFICIENCY["paper"], (15400, 34.4))),
    ),
    claims=(
        PaperClaim(
            "ROPD takes a tenth of LOPD's prompts (9.6 times fewer)",
            "ratio",
            "LOPD",
            "ROPD",
            "prompts until LOPD's best",
            9.6,
        ),
        PaperClaim(
            "ROPD takes fewer hours (6.3 times)",
            "ratio",
            "LOPD",
            "ROPD",
            "hours until LOPD's best",
            6.3,
            "D",
        ),
    ),
    notes=(
        "Read at a run's evaluations, so no finer than evaluation.every; the target is the best of LOPD's run of the same seed.",
        "The paper's hours are those until 48.3 % on AIME24, its samples are taken for prompts.",
        "Hours are of training steps, judges waited for and evaluations left out.",
        _MOE_NOTE,
    ),
)

_T3 = tuple(PaperColumn(f"Gemma3-4B-it {name}", "", {}, 100, "%") for name in (*_MATH, "average"))
_SMALLER = (
    *_columns("qwen3_1_7b_gpt", prefix="Qwen3-1.7B "),
    PaperColumn("Qwen3-1.7B average", "avg@k:mean", {"pair": "qwen3_1_7b_gpt"}, 100, "%"),
)
TABLE3 = PaperTable(
    name="ropd_table3",
    paper=PAPER,
    title="A student of another family",
    settings="Gemma3-4B-it from GPT-5.2-chat-latest; DAPO-Math-17K, 531 steps of 32 x 8, lr 1e-6, 8 A100",
    columns=(*_T3, *_SMALLER),
    rows=(
        Row(
            "student before",
            {"arm": "ropd"},
            numbers(_T3, (6.67, 12.92, 1.67, 6.25, 6.88)),
            when="before",
        ),
        Row("OVD", None, numbers(_T3, (7.38, 13.00, 2.05, 6.36, 7.20)), note=_OTHERS),
        Row("GAD", None, numbers(_T3, (6.92, 12.50, 1.83, 6.08, 6.83)), note=_OTHERS),
        Row("ROPD", {"arm": "ropd"}, numbers(_T3, (10.00, 13.72, 2.92, 6.88, 8.38))),
    ),
    claims=(
        PaperClaim(
            "ROPD is better than its start, whatever the student",
            "more",
            "ROPD",
            "student before",
            "Qwen3-1.7B average",
        ),
    ),
    notes=(
        "Gemma 3 is no family that the decoder here computes (Llama, Qwen2, Qwen3 are). What can be run in its place is one of a "
        "supported one, Qwen3-1.7B without thinking: columns of its own, with no number of the paper.",
    ),
)

_T6 = _columns("qwen3_4b_gpt", ("AIME24",))
TABLE6 = PaperTable(
    name="ropd_table6",
    paper=PAPER,
    title="Leave one out: references, the shared rubric, the blind pool",
    settings=_BLACK_BOX.format("non-thinking"),
    columns=(*_T6, _MINI),
    rows=(
        Row("student before", {"arm": "ropd"}, numbers(_T6, (24.17,)), when="before"),
        Row(
            "one reference",
            {"arm": "ropd_one_reference"},
            numbers(_T6, (47.08,)),
            note="m = 1 in place of 4",
        ),
        Row("a rubric for each rollout", {"arm": "ropd_per_student"}, numbers(_T6, (61.25,))),
        Row("a verifier that is not blind", {"arm": "ropd_not_blind"}, numbers(_T6, (61.75,))),
        Row("ROPD", {"arm": "ropd"}, numbers(_T6, (65.02,))),
    ),
    claims=tuple(
        PaperClaim(text, "more", "ROPD", row, "AIME24")
        for text, row in (
            ("four references are better than one", "one reference"),
            (
                "one rubric for a group is better than one for each rollout",
                "a rubric for each rollout",
            ),
            ("a blind verifier is better than one that knows", "a verifier that is not blind"),
        )
    ),
)

TABLES = (TABLE1, TABLE1_THINKING, TABLE2, EFFICIENCY, TABLE3, TABLE6)
