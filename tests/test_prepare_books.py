"""prepare_books.py: what the notices, damaged files and strange folders of Project Gutenberg do to a text."""

import gzip
import hashlib

import pytest
from samples import ROOT, one_line

SCRIPT = ROOT / "ch05/03_bonus_pretraining_on_gutenberg/prepare_books.py"
BODY = "\n\n".join(f"Paragraph {i}\nof a  book." for i in range(100))
WHOLE = "\n\n".join(f"Paragraph {i} of a book." for i in range(100))
START, END = (f"*** {word} OF THE PROJECT GUTENBERG EBOOK X ***" for word in ("START", "END"))


@pytest.fixture
def prepare(script_here, tmp_path):
    """prepare({name: bytes or text}): run the script on a folder with these files; the folder out is beside it."""

    def run(files, *options):
        for name, content in files.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return script_here(SCRIPT, *(options or ("--books", tmp_path / "in", "--out", tmp_path / "out")))

    return run


def text_of(folder):
    """Return what books.txt says, the ends back at their books."""
    text = (folder / "out/books.txt").read_text(encoding="utf-8")
    held_out = (folder / "out/held-out.txt").read_text(encoding="utf-8")
    assert text.endswith(held_out) and held_out.endswith("<|endoftext|>")
    beginnings, ends = (part.split("<|endoftext|>")[:-1] for part in (text.removesuffix(held_out), held_out))
    return [f"{beginning}\n\n{end}" for beginning, end in zip(beginnings, ends, strict=True)]


def test_minis_own_books_come_out_as_they_were(script_here, tmp_path):
    assert script_here(SCRIPT, "--out", tmp_path).returncode == 0
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert found == {
        "books.txt": "70e49ba214e71fc6ece61309394e5916e427615c31238b5184215e858b709cce",
        "held-out.txt": "3415601b9f6ae6717fefb6a6a6a9b58564fff840b3b7d8e9fc28e85b3c42e7f2",
    }


@pytest.mark.parametrize(
    "content",
    [
        BODY,
        f"licence\n{START}\n{BODY}\n{END}\nlicence",
        f"licence\n{START.replace('EBOOK X', f'EBOOK{chr(10)}X')}\n\n{BODY}\n\n{END.replace('THE ', f'THE{chr(10)}')}\nlicence",
        f"licence\n\n***START OF THIS PROJECT GUTENBERG EBOOK X***\n\n{BODY}\n\n***END OF THIS PROJECT GUTENBERG EBOOK X***\n",
        f"licence\n{START[:-4]}\n\n{BODY}\n\n{END[:-4]}\n\nlicence",
        f"licence\n{START}\n{BODY}\n\nEnd of the Project Gutenberg EBook of X,\nby Y\n\n{END}\nlicence",
        f"licence\n{START.title()}\n{BODY}\n{END.title()}\nlicence",
        f"\ufefflicence\n{START}\n{BODY}\n{END}\nlicence".replace("\n", "\r\n"),
        f"licence\n{START}\n{BODY}\n{END}\nlicence".replace("\n", "\r"),
    ],
)
def test_notices_go_and_the_book_stays(prepare, tmp_path, content):
    assert prepare({"a.txt": content}).returncode == 0
    assert text_of(tmp_path) == [WHOLE]


@pytest.mark.parametrize(
    "line", ["*** END OF THE FIRST PART ***", "*** END OF THIS STORY", "* * *", "*** START OF THE END ***"]
)
def test_a_line_with_stars_ends_no_book(prepare, tmp_path, line):
    assert prepare({"a.txt": f"licence\n{START}\n{BODY}\n\n{line}\n\n{BODY}\n{END}\nlicence"}).returncode == 0
    assert text_of(tmp_path) == [f"{WHOLE}\n\n{line}\n\n{WHOLE}"]


def test_books_behind_one_another_and_in_capitals_are_all_read(prepare, tmp_path):
    one = f"licence\n{START}\n{BODY}\n{END}\nlicence\n"
    assert prepare({"a.TXT": one + one, "deep/b.Txt.GZ": gzip.compress(f"{BODY}\n\nb".encode())}).returncode == 0
    assert text_of(tmp_path) == [f"{WHOLE}\n\n{WHOLE}", f"{WHOLE}\n\nb"]


PACKED = gzip.compress(BODY.encode())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt.gz": PACKED[:-20]}, "a.txt.gz is a damaged archive"),
        ({"a.txt.gz": PACKED[:20] + bytes(20) + PACKED[40:]}, "a.txt.gz is a damaged archive"),
        ({"a.txt.gz": PACKED[:-8] + bytes(8)}, "a.txt.gz is a damaged archive"),
        ({"a.txt.gz": BODY}, "a.txt.gz is a damaged archive"),
        ({"a.txt": "một cuốn sách cũ, café".encode("utf-16")}, "a.txt is not UTF-8 text"),
        ({"a.txt": f"{BODY} café".encode("latin-1")}, "a.txt is not UTF-8 text (unexpected end of data at byte"),
        ({"a.txt": BODY.encode("utf-16-le")}, "a.txt holds no text"),
        ({"a.txt": ""}, "a.txt holds no text"),
        ({"a.txt": f"licence\n{START}\n \n{END}\nlicence"}, "a.txt holds no text"),
        ({"a.txt": "one paragraph"}, "a.txt is one paragraph, too short"),
        ({"a.txt": BODY, "b.txt.gz": gzip.compress(WHOLE.encode())}, "b.txt.gz holds the same text as"),
        ({"a.md": BODY}, "holds no .txt or .txt.gz file"),
    ],
)
def test_a_book_that_cannot_be_read_is_one_line_and_no_output(prepare, tmp_path, files, message):
    one_line(prepare(files), message)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("books", "out", "message"),
    [
        ("in", "in", "lies in the folder of the books"),
        ("in", "in/deep/out", "lies in the folder of the books"),
        ("in/a.txt", "out", "a.txt is no folder"),
        ("nowhere", "out", "nowhere is no folder"),
        ("in", "file", "file"),
    ],
)
def test_strange_folders_are_one_line(prepare, tmp_path, books, out, message):
    (tmp_path / "file").write_text("x")
    one_line(prepare({"a.txt": BODY}, "--books", tmp_path / books, "--out", tmp_path / out), message)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.txt", "file"]


def test_an_error_keeps_the_texts_of_before(prepare, tmp_path):
    assert prepare({"a.txt": BODY}).returncode == 0
    one_line(prepare({"b.txt": ""}), "b.txt holds no text")
    assert text_of(tmp_path) == [WHOLE] and len(list((tmp_path / "out").iterdir())) == 2
