"""Write the results of all benchmarks into the README files beside this one: python tests/bench/report.py"""

import json
from pathlib import Path

from harness import RESULTS, table

START, END = "<!-- results -->", "<!-- end of results -->"


def tables():
    """Return all results as Markdown."""
    races = [json.loads(path.read_text(encoding="utf-8")).items() for path in sorted(RESULTS.glob("*.json"))]
    return "\n".join(table(title, **race) for kind in races for title, race in kind)


def with_tables(text):
    """Return a README's text with the tables in their place."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for name in ("README.md", "README.en.md"):
        path = Path(__file__).parent / name
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
