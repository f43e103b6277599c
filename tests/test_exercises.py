"""A reader who does only the exercises ends with classes that pass the package's own tests."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from promises import definitions, notebook_definitions
from samples import ROOT

FINISHED = {  # chapter → the modules that its closing exercise rebuilds, the names it must define, the tests to pass
    "ch02": (["symbols", "tokenizer", "data"], {"BPETokenizer", "TokenWindows"}, ["test_tokenizer.py", "test_data.py"]),
    "ch03": (["attention"], {"MultiHeadAttention", "KVCache"}, ["test_attention.py"]),
    "ch04": (["gpt"], {"GPTConfig", "GPTModel", "TransformerBlock", "LayerNorm"}, ["test_gpt.py"]),
}

SLOW = [  # thousands of strings, a whole book, Hugging Face's training, memory: the package's own run of them is enough
    "ids_equal_tiktoken", "whole_book", "equals_hf_tokenizers", "join_to_pieces", "on_anything", "long_words_equal", "naive_loop",
    "one_long_word", "another_process", "no_cut_changes", "constant_memory", "million_spaces", "wrong_byte",
]  # fmt: skip


def with_answers(source, answers):
    """Return a module's source in which the reader's definitions stand in place of the package's."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in answers:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines[first - 1 : node.end_lineno] = answers[node.name].split("\n")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("chapter", FINISHED)
def test_the_readers_classes_pass_the_tests(chapter, tmp_path):
    notebook = ROOT / chapter / "01_main-chapter-code" / "exercise-solutions.ipynb"
    if not notebook.exists():
        pytest.skip(f"{chapter} is being written")
    modules, names, tests = FINISHED[chapter]
    answers = notebook_definitions(notebook)
    assert names <= set(answers)
    taken = set()
    shutil.copytree(ROOT / "llm_shared", tmp_path / "llm_shared")
    for module in modules:
        path = tmp_path / "llm_shared" / f"{module}.py"
        source = with_answers(path.read_text(encoding="utf-8"), answers)
        taken |= set(answers) & set(definitions(source))
        path.write_text(source, encoding="utf-8")
    assert names <= taken
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    command += [ROOT / "tests" / name for name in tests]
    command += ["-k", f"not ({' or '.join(SLOW)})"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    # From tmp_path: python -m puts the folder it is called from before PYTHONPATH.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    seen = "import llm_shared; print(llm_shared.__file__)"
    where = subprocess.run([sys.executable, "-c", seen], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert where.stdout.startswith(str(tmp_path))


def test_answers_take_the_place_of_definitions():
    source = "import re\n\n\n@cache\ndef f(x):\n    return x\n\n\nclass A:\n    pass\n"
    assert with_answers(source, {"f": "def f(x):\n    return 2 * x"}) == (
        "import re\n\n\ndef f(x):\n    return 2 * x\n\n\nclass A:\n    pass\n"
    )
