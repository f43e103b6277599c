"""Turn a folder of books (.txt, .txt.gz) into one text to pretrain on; the end of each book is kept for validation."""

import argparse
import gzip
import hashlib
import re
import zlib
from pathlib import Path

from llm_shared.cli import run
from llm_shared.resources import replacing

HELD_OUT = 0.02  # share of each book, at its end
END = "<|endoftext|>"
# Such a line, perhaps broken in two, ends the notice before a book, or begins the one behind it.
MARKER = r"\*\*\*\s*{}\s+OF\s+TH(?:E|IS)\s+PROJECT\s+GUTENBERG(?:(?!\n\s*\n).)*?(?:\*\*\*|(?=\n\s*\n)|\Z)"
START = MARKER.format("START")
STOP = r"(?:\n\s*End\s+of\s+(?:the\s+)?Project\s+Gutenberg(?:(?!\n\s*\n).)*\n\s*)?" + MARKER.format("END")


def read_book(path):
    """Return the text of a book without Project Gutenberg's notices, each paragraph on one line, a blank line between."""
    open_text = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged archive ({error}): get it again") from None
    text = re.sub(r"\n\s*\n", "\n\n", text)  # else many blank lines would be searched again and again
    text = re.sub(rf"(?si)\A.*?{START}", "", text)
    text = re.sub(rf"(?si){STOP}.*?(?:{START}|\Z)", "\n\n", text)  # another book may follow in the same file
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    text = "\n\n".join(filter(None, paragraphs))
    if not text or "\0" in text:
        raise ValueError(f"{path} holds no text: leave it out")
    return text


def split_book(text):
    """Return (beginning, end) of a book, cut at a paragraph, about HELD_OUT of it in the end."""
    cut = text.rfind("\n\n", 0, int(len(text) * (1 - HELD_OUT)))
    return (text[:cut], text[cut:].strip()) if cut > 0 else (text, "")


def find_books(folder, out):
    """Return the paths of the books in a folder; out must lie elsewhere, or its books.txt would be a book next time."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: --books takes a folder of .txt or .txt.gz files")
    paths = [path for path in folder.rglob("*") if path.name.lower().endswith((".txt", ".txt.gz")) and path.is_file()]
    if not paths:
        raise ValueError(f"{folder} holds no .txt or .txt.gz file")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {out} lies in the folder of the books: choose one outside")
    return sorted(paths)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--books", type=Path, default=Path(__file__).parent / "books", help="folder of books")
    parser.add_argument("--out", type=Path, default=Path("runs/books"), help="folder for books.txt and held-out.txt")
    args = parser.parse_args()
    books, held_out = args.out / "books.txt", args.out / "held-out.txt"
    paths, seen, ends, n = find_books(args.books, args.out), {}, [], 0
    with replacing(books) as new_books, replacing(held_out) as new_held_out:
        with open(new_books, "w", encoding="utf-8", newline="\n") as file:
            for path in paths:  # one book in memory at a time, and the ends
                text = read_book(path)
                twin = seen.setdefault(hashlib.sha256(text.encode("utf-8")).digest(), path)
                if twin != path:
                    raise ValueError(f"{path} holds the same text as {twin}: leave one of them out")
                beginning, end = split_book(text)
                if not end:
                    raise ValueError(f"{path} is one paragraph, too short to hold back its end: add it to another book")
                n += file.write(beginning + END)
                ends.append(end)
            end_text = END.join([*ends, ""])
            n += file.write(end_text)
        new_held_out.write_text(end_text, encoding="utf-8", newline="\n")
    print(f"{len(paths)} books → {books}; its last {len(end_text) / n:.2%} are also in {held_out}")


if __name__ == "__main__":
    run(main)
