"""Turn a folder of books (.txt, .txt.gz) into one text to pretrain on; the end of each book is kept for validation."""

import argparse
import gzip
import re
import zlib
from pathlib import Path

from llm_shared.cli import run
from llm_shared.resources import replacing

HELD_OUT = 0.02  # share of each book, at its end
END = "<|endoftext|>"


def read_book(path):
    """Return the text of a book without Project Gutenberg's notices, each paragraph on one line, a blank line between."""
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not UTF-8 text, or a damaged archive: {error}") from None
    text = re.sub(r"(?s)\A.*?\*\*\* ?START OF TH[^\n]*\*\*\*", "", text)
    text = re.sub(r"(?s)\*\*\* ?END OF TH[^\n]*\*\*\*.*\Z", "", text)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(filter(None, paragraphs))


def split_book(text):
    """Return (beginning, end) of a book, cut at a paragraph, about HELD_OUT of it in the end."""
    cut = text.rfind("\n\n", 0, int(len(text) * (1 - HELD_OUT)))
    return (text[:cut], text[cut:].strip()) if cut > 0 else (text, "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--books", type=Path, default=Path(__file__).parent / "books", help="folder of books")
    parser.add_argument("--out", type=Path, default=Path("runs/books"), help="folder for books.txt and held-out.txt")
    args = parser.parse_args()
    paths = sorted([*args.books.rglob("*.txt"), *args.books.rglob("*.txt.gz")])
    if not paths:
        raise ValueError(f"{args.books} holds no .txt or .txt.gz file")
    ends, n = [], 0
    with replacing(args.out / "books.txt") as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for path in paths:  # one book in memory at a time, and the ends
            beginning, end = split_book(read_book(path))
            n += file.write(beginning + END)
            ends.append(end)
        held_out = END.join([*filter(None, ends), ""])
        n += file.write(held_out)
    with replacing(args.out / "held-out.txt") as temporary:
        temporary.write_text(held_out, encoding="utf-8", newline="\n")
    print(
        f"{len(paths)} books → {args.out / 'books.txt'}; its last {len(held_out) / n:.2%} are also in {args.out / 'held-out.txt'}"
    )


if __name__ == "__main__":
    run(main)
