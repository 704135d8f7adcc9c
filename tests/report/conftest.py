"""Pages whose words alone a test reads."""

import pytest


@pytest.fixture
def words_alone(monkeypatch):
    """Charts are laid out and not written as SVG, which takes most of the time of a page. Other
    tests read whole pages with every kind of chart.
    """
    empty = lambda _, out, **__: out.write("<svg></svg>")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", empty)
