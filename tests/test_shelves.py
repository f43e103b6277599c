"""The state of the shelves: READMEs, links, words, notebooks as they are saved."""

import json
import re
import unicodedata

import pytest
from samples import ROOT

MADE = {"build", "runs"}  # folders that a command leaves behind
READMES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in MADE for part in path.relative_to(ROOT).parts)
)
NOTEBOOKS = sorted(path for path in ROOT.glob("*[0-9A-Z]/*/*.ipynb") if ".ipynb_checkpoints" not in path.parts)
VIETNAMESE = [path for path in READMES + NOTEBOOKS if ".en." not in path.name and path.name != "GLOSSARY.md"]


def named(path):
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """Return a README's text, or that of a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return text


def without_code(text):
    return re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$", " ", text, flags=re.S)


@pytest.mark.parametrize("path", READMES + NOTEBOOKS, ids=named)
def test_links_lead_somewhere(path):
    text = prose(path)
    targets = re.findall(r"\]\(([^)#\s]+)", without_code(text)) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    for target in targets:
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), target
    assert not re.search(r"!\[[^\]]*\]\(https?:|<img[^>]+src=.?https?:", text), "a picture from a web address"
    assert not re.search(r"!\[\s*\]", text), "a picture without alt text"


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


@pytest.mark.parametrize("path", VIETNAMESE, ids=named)
def test_prose_follows_the_glossary(path):
    text = prose(path)
    words = list(banned_words())
    assert len(words) > 70
    read = without_code(text).lower()
    assert [word for word in words if re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", read)] == []
    if path.suffix == ".md":
        assert unicodedata.is_normalized("NFC", text)


@pytest.mark.parametrize("path", [path for path in READMES if path.name == "README.md"], ids=named)
def test_every_readme_has_an_english_edition(path):
    english = path.with_name("README.en.md").read_text(encoding="utf-8")
    headings = [re.findall(r"^#+ ", text, flags=re.M) for text in (path.read_text(encoding="utf-8"), english)]
    assert headings[0] == headings[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_notebooks_are_saved_as_they_ran(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["source"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(cell["outputs"] for cell in code)
    for cell in code:
        outputs = json.dumps(
            [{k: v for k, v in out.get("data", out).items() if "image" not in k} for out in cell["outputs"]]
        )
        assert not re.search(r"/(?:home|root|work|tmp|Users)/", outputs), cell["id"]
        crashed = any(out["output_type"] == "error" for out in cell["outputs"])
        assert crashed == ("raises-exception" in cell["metadata"].get("tags", [])), cell["id"]
