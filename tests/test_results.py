from llm_shared.results import END, START, with_results, write_results
import pytest

PAGE = f"before\n\n{START}\n\nold\n\n{END}\n\nafter\n"


def test_only_the_results_change():
    assert with_results(PAGE, "new") == PAGE.replace("old", "new")
    assert with_results(with_results(PAGE, "new"), "old") == PAGE


@pytest.mark.parametrize("text", ["", START, END, f"{END} {START}"])
def test_a_page_without_marks_is_an_error(text):
    with pytest.raises(ValueError, match="holds no"):
        with_results(text, "new")


def test_each_language_gets_its_own(tmp_path):
    for name in ("README.md", "README.en.md"):
        (tmp_path / name).write_text(PAGE, encoding="utf-8")
    write_results(tmp_path, ["English", "tiếng Việt"].__getitem__)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == PAGE.replace("old", "tiếng Việt")
    assert (tmp_path / "README.en.md").read_text(encoding="utf-8") == PAGE.replace("old", "English")
    assert len(list(tmp_path.iterdir())) == 2
