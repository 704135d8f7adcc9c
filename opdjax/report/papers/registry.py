"""All tables of papers, by name."""

from opdjax.report.papers import npd, ropd, rubricem, vopd
from opdjax.report.papers.tables import PaperTable

PAPER_TABLES: dict[str, PaperTable] = {
    table.name: table for table in (*vopd.TABLES, *npd.TABLES, *ropd.TABLES, *rubricem.TABLES)
}
