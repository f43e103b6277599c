"""What a notebook and the package define, in a form that can be compared: promises 1 and 2."""

import ast
import json
import subprocess
import sys

import llm_shared
from samples import ROOT

MAIN_NOTEBOOKS = {
    "ch02": "ch02/01_main-chapter-code/ch02.ipynb",
    "ch03": "ch03/01_main-chapter-code/ch03.ipynb",
    "ch04": "ch04/01_main-chapter-code/ch04.ipynb",
    "ch05": "ch05/01_main-chapter-code/ch05.ipynb",
    "ch06": "ch06/01_main-chapter-code/ch06.ipynb",
    "appendix-D": "appendix-D/01_main-chapter-code/appendix-D.ipynb",
    "appendix-E": "appendix-E/01_main-chapter-code/appendix-E.ipynb",
}
BONUS_NOTEBOOKS = {  # modules that a bonus notebook builds
    "hf_format": "ch05/02_alternative_weight_loading/weight-loading-hf-transformers.ipynb",
    "gguf_format": "ch05/02_alternative_weight_loading/weight-export-gguf.ipynb",
    "tf_format": "ch05/02_alternative_weight_loading/weight-loading-tensorflow.ipynb",
}
PLUMBING = {  # names of files, their cleaning, types that a file can hold: not the lesson, so the notebook imports them
    "checkpoints",
    "drop_others",
    "plain_values",
}


def notebook_of(module):
    """Return the path of the notebook in which the reader builds a module of the package."""
    return BONUS_NOTEBOOKS.get(module) or MAIN_NOTEBOOKS[llm_shared.CHAPTERS[module]]


def docstring_lines(tree):
    """Return the numbers of the lines that hold docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def definitions(source):
    """Return {name: code} of the public top-level functions and classes: formatted, without docstrings and blank lines."""
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--line-length", "120", "-"], input=source, capture_output=True, text=True, encoding="utf-8", check=True
    ).stdout  # fmt: skip
    tree, lines = ast.parse(formatted), formatted.splitlines()
    skipped = docstring_lines(tree)
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            numbers = [i for i in range(first, node.end_lineno + 1) if i not in skipped and lines[i - 1].strip()]
            found[node.name] = "\n".join(lines[i - 1] for i in numbers)
    return found


def code_cells(path):
    """Return the source of each code cell of a notebook, without lines that speak to IPython only."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return ["\n".join(line for line in source.split("\n") if line[:1] not in "%!") for source in sources if source]


def notebook_definitions(path):
    return definitions("\n\n\n".join(code_cells(path)))


def package_definitions():
    """Return {module: {name: code}} of the package."""
    sources = {module: (ROOT / "llm_shared" / f"{module}.py") for module in llm_shared.CHAPTERS}
    return {module: definitions(path.read_text(encoding="utf-8")) for module, path in sources.items()}


def one_name_one_meaning(notebook, package):
    """Promise 1: return the names that a notebook and the package define differently."""
    shared = {name: code for module in package.values() for name, code in module.items()}
    return sorted(name for name, code in notebook.items() if name in shared and shared[name] != code)


def first_written_by_the_reader(notebook, module):
    """Promise 2: return the names of a module that its notebook does not define, plumbing aside."""
    return sorted(set(module) - set(notebook) - PLUMBING)
