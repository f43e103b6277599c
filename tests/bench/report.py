"""Write the results of all benchmarks into the README files beside this one: python tests/bench/report.py"""

import json
from pathlib import Path

from harness import RESULTS, table

from llm_shared.results import write_results


def tables(language=0):
    """Return all results as Markdown, the same in both languages."""
    races = [json.loads(path.read_text(encoding="utf-8")).items() for path in sorted(RESULTS.glob("*.json"))]
    return "\n".join(table(title, **race) for kind in races for title, race in kind).rstrip()


if __name__ == "__main__":
    write_results(Path(__file__).parent, tables)
