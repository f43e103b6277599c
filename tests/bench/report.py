"""Write the results of all benchmarks into the README files beside this one: python tests/bench/report.py"""

import json
from pathlib import Path

from llm_shared.results import write_results
from harness import RESULTS, lead, table

HEADS = ("| ours / fastest peer |", "| ta / đối thủ nhanh nhất |")


def all_races():
    """Return {title: {processor: race}} of everything that was measured."""
    races = {}
    for path in sorted(RESULTS.glob("*.json")):
        races |= json.loads(path.read_text(encoding="utf-8"))
    return races


def overview(races, language):
    """Return one line per race and one column per processor: ours / fastest peer."""
    processors = sorted({processor for found in races.values() for processor in found})
    lines = [HEADS[language] + "".join(f" {processor} |" for processor in processors)]
    lines += ["|---|" + "---:|" * len(processors)]
    for title, found in races.items():
        cells = [f"{lead(found[p]['seconds']):.2f}×" if p in found else "" for p in processors]
        lines.append(f"| {title} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines)


def tables(language=0):
    """Return the overview, then each race by itself, as Markdown."""
    races = all_races()
    return "\n\n".join([overview(races, language), *(table(*race).rstrip() for race in races.items())])


if __name__ == "__main__":
    write_results(Path(__file__).parent, tables)
