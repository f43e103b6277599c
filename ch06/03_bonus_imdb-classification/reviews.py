"""Two sets of film reviews, each as (train, validation, test) tables with the columns text and label (1: positive)."""

import csv
import gzip
import re
import tarfile
import zlib
from pathlib import Path

from llm_shared.classify import split
from llm_shared.resources import DOWNLOADS, Download, fetch
import pandas as pd

SNIPPETS = Path(__file__).with_name("snippets.tsv.gz")
NEUTRAL = 0.5  # a mean rating nearer to 0, on the scale from -4 to 4, counts as neither
IMDB = "aclImdb_v1.tar.gz"
DOWNLOADS[IMDB] = Download(
    f"https://ai.stanford.edu/~amaas/data/sentiment/{IMDB}",
    "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
)
# Labelled reviews lie in these folders; a file name is number_stars.txt, with 1-4 stars or 7-10.
REVIEW = re.compile(r"aclImdb/(?:(train|test)/(?:(pos)/\d+_(?:7|8|9|10)|neg/\d+_[1-4])\.txt)")


def read_snippets():
    """Split the bundled sentences 70 : 10 : 20, always in the same way; the mean of the raters decides the label."""
    try:  # a sentence may be NA
        table = pd.read_csv(SNIPPETS, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False, dtype={"text": str})
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{SNIPPETS} could not be read: {str(error).strip()}; take it from the repository again"
        ) from None
    table = table[table.sentiment.abs() >= NEUTRAL].drop_duplicates("text")
    return split(table.assign(label=(table.sentiment > 0).astype(int))[["text", "label"]])


def read_archive(path):
    """Return {"train": table, "test": table} of an aclImdb archive, read where it is: nothing is unpacked.

    An archive that is damaged, or holds a link or a name that does not belong there, is a ValueError.
    """
    rows = {"train": [], "test": []}
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                parts = member.name.split("/")
                if parts[0] != "aclImdb" or ".." in parts or not (member.isfile() or member.isdir()):
                    raise ValueError(f"it holds {member.name!r}, which does not belong there")
                if member.isdir() or parts[2:3] not in (["pos"], ["neg"]):
                    continue  # lists, word counts, and the reviews without labels in train/unsup
                if not (match := REVIEW.fullmatch(member.name)):
                    raise ValueError(f"it holds {member.name!r}, which is no name of a review")
                text = archive.extractfile(member).read().decode("utf-8")
                rows[match[1]].append((text.replace("<br />", " "), int(match[2] == "pos")))
            while file.read(1 << 20):
                pass  # to the end, where gzip compares its checksum
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} could not be read: {error}; delete it to download it again") from None
    tables = {part: pd.DataFrame(found, columns=["text", "label"]) for part, found in rows.items()}
    if any(set(table.label) != {0, 1} for table in tables.values()):
        raise ValueError(f"{path} lacks positive or negative reviews for training or for testing")
    return tables


def read_imdb():
    """Keep the official test set; of the official training set, without repeats and without the test set's texts, 10 % validate."""
    tables = read_archive(fetch(IMDB))
    train = tables["train"].drop_duplicates("text")
    train, val, _ = split(train[~train.text.isin(tables["test"].text)], train=0.9, val=0.1)
    return train, val, tables["test"]


READERS = {"snippets": read_snippets, "imdb": read_imdb}
