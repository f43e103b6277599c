"""The tables of the benchmarks say what their results say."""

import sys

from llm_shared.results import with_results
import pytest
from samples import ROOT

BENCH = ROOT / "tests" / "bench"


@pytest.mark.parametrize("name", ["README.md", "README.en.md"])
def test_tables_are_those_of_the_results(monkeypatch, name):
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    text = (BENCH / name).read_text(encoding="utf-8")
    assert with_results(text, report.tables(int(name == "README.md"))) == text
    assert "ours / fastest peer" in text
    sys.modules.pop("report")
