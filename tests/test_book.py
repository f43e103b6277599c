"""The three promises of the book, and what keeps the package small."""

import ast
import re
import subprocess
import sys
from pathlib import PurePath

import llm_shared
import pytest
from promises import (
    BONUS_NOTEBOOKS,
    code_cells,
    first_written_by_the_reader,
    notebook_definitions,
    notebook_of,
    one_name_one_meaning,
    package_definitions,
)
from samples import ROOT

PACKAGE = ROOT / "llm_shared"
ORDER = ["setup", "ch02", "ch03", "ch04", "ch05", "ch06", "ch07", "appendix-D", "appendix-E"]


ORDER_OF_MODULES = list(llm_shared.CHAPTERS)
BUILT = [module for module, chapter in llm_shared.CHAPTERS.items() if chapter != "setup"]
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in ROOT.glob("*[0-9A-Z]/*/*.ipynb") if not p.name.endswith(".en.ipynb"))
SCRIPTS = [p.relative_to(ROOT) for folder in ("*[0-9A-Z]/*", "tests/bench") for p in ROOT.glob(f"{folder}/**/*.py")]
SCRIPTS = sorted(set(SCRIPTS) - {PurePath("tests/bench/worker.py")})  # the harness tells worker.py how to wait


@pytest.fixture(scope="module")
def package():
    return package_definitions()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_a_shared_name_means_one_thing(package, path):
    assert one_name_one_meaning(notebook_definitions(ROOT / path), package) == []


@pytest.mark.parametrize("module", BUILT)
def test_everything_shared_was_first_written_by_the_reader(package, module):
    path = ROOT / notebook_of(module)
    if not path.exists():
        pytest.skip(f"{path.name} is being written")
    assert first_written_by_the_reader(notebook_definitions(path), package[module]) == []


@pytest.mark.parametrize("path", sorted({notebook_of(module) for module in BUILT}), ids=str)
def test_the_promises_can_be_broken(package, path):
    """Change, then remove, each shared definition in the notebook alone: the promises notice every time."""
    if not (ROOT / path).exists():
        pytest.skip(f"{path} is being written")
    notebook = notebook_definitions(ROOT / path)
    shared = {name for module in package.values() for name in module} & set(notebook)
    assert shared
    for name in shared:
        for changed in (notebook[name] + "  # one comment more", notebook[name].replace("return", "return not", 1)):
            if changed != notebook[name]:
                assert one_name_one_meaning(notebook | {name: changed}, package) == [name]
        module = next(module for module in package.values() if name in module)
        missing = first_written_by_the_reader({n: code for n, code in notebook.items() if n != name}, module)
        assert name in missing


def imports(module):
    """Yield the llm_shared modules that a module imports, at its top or within a function."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_shared."):
            yield node.module.removeprefix("llm_shared.")
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module == "llm_shared"):
            pytest.fail(f"{module}: import from llm_shared.<module>, by name")


def imported(source):
    """Yield the modules that a program imports, from its first line to its last."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        yield from [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def torch_comes_first(sources):
    """Say whether torch is imported, by itself or by a library, before anything of llm_shared is."""
    for name in (name for source in sources for name in imported(source)):
        package = name.split(".")[0]
        if package in ("llm_shared", "torch", "transformers", "peft") or name == "safetensors.torch":
            return package != "llm_shared"
    return False


@pytest.mark.parametrize("path", NOTEBOOKS + SCRIPTS, ids=str)
def test_llm_shared_is_imported_before_torch(path):
    """It tells OpenMP's threads how to wait, and torch listens only while it is imported."""
    path = ROOT / path
    assert not torch_comes_first(code_cells(path) if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")])


@pytest.mark.parametrize(
    "torch",
    [
        "import torch",
        "import os, torch.nn as nn",
        "if True:\n    from torch import nn",
        "def f():\n    import torch",
        "from safetensors.torch import load_file",
        "import transformers",
        "from peft import LoraConfig",
    ],
)
def test_torch_is_found_however_it_is_imported(torch):
    ours = "from llm_shared.data import TokenWindows"
    assert torch_comes_first([torch, ours]) and torch_comes_first([f"{torch}\n{ours}"])
    assert not torch_comes_first([ours, torch]) and not torch_comes_first([f"import math\n{ours}\n{torch}"])


def test_the_house_shows_every_module():
    shown = re.findall(r">([\w-]+)</text>", (ROOT / "figures/house.svg").read_text(encoding="utf-8"))
    assert set(shown) >= set(llm_shared.CHAPTERS) | set(llm_shared.CHAPTERS.values())


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
    for other in imports(module):
        assert ORDER_OF_MODULES.index(other) < ORDER_OF_MODULES.index(module), f"{module} imports {other}"


def test_the_package_can_be_read_in_an_hour():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.glob("*.py")}
    up_to_pretraining = [m for m in ORDER_OF_MODULES[: ORDER_OF_MODULES.index("classify")] if m not in BONUS_NOTEBOOKS]
    assert sum(lines[f"{module}.py"] for module in up_to_pretraining) <= 1750
    assert sum(lines.values()) <= 2550
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
    heavy = "import sys, {}; print([m for m in ('matplotlib', 'pandas', 'transformers', 'tiktoken', 'requests', 'gguf') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", heavy.format(modules)], capture_output=True, check=True, text=True)
    assert found.stdout.strip() == "[]"


def test_scripts_are_callers():
    for path in ROOT.glob("ch0*/01_main-chapter-code/*.py"):
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 85, path
        assert not re.search(r"^class |\.backward\(|optimizer\.step\(", source, flags=re.M), path
