"""The promises of the book, and the state of its shelves."""

import ast
import re
import subprocess
import sys
import unicodedata

import pytest
from conftest import ROOT

import llm_shared

PACKAGE = ROOT / "llm_shared"
ORDER = ["setup", "ch02", "ch03", "ch04", "ch05", "ch06", "ch07", "appendix-D", "appendix-E"]
READMES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "node_modules"} & set(path.parts))


def imports(module):
    """Yield the llm_shared modules that a module imports, at its top or within a function."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_shared."):
            yield node.module.removeprefix("llm_shared.")
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module == "llm_shared"):
            pytest.fail(f"{module}: import from llm_shared.<module>, by name")


def test_the_map_names_every_module():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert set(llm_shared.CHAPTERS) == files
    chapters = list(llm_shared.CHAPTERS.values())
    assert chapters == sorted(chapters, key=ORDER.index)


@pytest.mark.parametrize("module", llm_shared.CHAPTERS)
def test_each_module_names_its_chapter(module):
    docstring = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))
    assert docstring.startswith(f"{llm_shared.CHAPTERS[module]} · ")


@pytest.mark.parametrize("module", llm_shared.CHAPTERS)
def test_no_module_leans_on_a_later_one(module):
    order = list(llm_shared.CHAPTERS)
    for other in imports(module):
        assert order.index(other) < order.index(module), f"{module} imports {other}"


def test_the_package_can_be_read_in_an_hour():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.glob("*.py")}
    assert sum(lines.values()) <= 1600
    assert max(lines.values()) <= 220, lines


def test_public_things_have_docstrings():
    for module in llm_shared.CHAPTERS:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}.{node.name}"


def test_importing_costs_little_over_torch():
    program = "import time, torch; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    modules = ", ".join(f"llm_shared.{module}" for module in llm_shared.CHAPTERS)
    command = [sys.executable, "-c", program.format(modules)]
    times = [float(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(3)]
    assert min(times) < 0.25  # all modules at once, with numpy's, regex's and safetensors' own import
    heavy = "import sys, {}; print([m for m in ('matplotlib', 'pandas', 'transformers', 'tiktoken', 'pooch') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", heavy.format(modules)], capture_output=True, check=True, text=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), target
    assert not re.search(r"!\[[^\]]*\]\(https?:", text), "a picture from a web address"
    assert unicodedata.is_normalized("NFC", text)


def test_readmes_come_in_pairs():
    vi, en = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.en.md"))

    def skeleton(text):
        commands = re.findall(r"^(?:python3|py) -m venv .*$", text, flags=re.M)
        return re.findall(r"^#+ ", text, flags=re.M), commands, re.findall(r"^\| .* \| .*`(.+?)`", text, flags=re.M)

    assert skeleton(vi) == skeleton(en)
    assert len(skeleton(vi)[1]) == 4


def test_contents_are_marked_honestly():
    """A row of the table of contents is a link if, and only if, it is there."""
    for row in re.findall(r"^\| .* \| (.*) \| .*$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M):
        if path := re.search(r"`((?:setup|ch0|appendix).+?)`", row):
            assert (ROOT / path[1]).exists() == row.startswith("["), path[1]


def banned_words():
    glossary = (ROOT / "GLOSSARY.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| .*$", glossary, flags=re.M):
        yield from re.findall(r"\*\*(.+?)\*\*", row.split("|")[3])


@pytest.mark.parametrize(
    "path", [p for p in READMES if not p.name.endswith(".en.md") and p.name != "GLOSSARY.md"], ids=str
)
def test_prose_follows_the_glossary(path):
    text = path.read_text(encoding="utf-8").lower()
    prose = re.sub(r"```.*?```|`[^`]*`", " ", text, flags=re.S)
    words = list(banned_words())
    assert len(words) > 70
    found = [word for word in words if re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", prose)]
    assert not found


def test_scripts_are_callers():
    for path in ROOT.glob("ch0*/01_main-chapter-code/*.py"):
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 62, path
        assert not re.search(r"^class |^    for .*range\(", source, flags=re.M), path
