"""ch02 · From a text to batches: token files in memory-mapped form, windows over them, a loader."""

from itertools import chain
from pathlib import Path

from llm_shared.resources import replacing
import numpy as np
import regex
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

BLOCK = 1 << 18  # characters read at one time
LONGEST_WORD = 1 << 19  # characters; only a longer stretch without a border may be cut
# Two characters between which a word always ends: a visible one and one of another kind; not 's, which is one word.
BORDER = regex.compile(r"(?r)\p{L}\P{L}|\p{N}\P{N}|[^\s\p{L}\p{N}'][\s\p{L}\p{N}]")


def last_cut(text, special_tokens):
    """Return the last place where text may be cut so that no word and no special token crosses; 0: it has to grow."""
    end = max(0, len(text) - max(map(len, special_tokens), default=0))  # half a special token may stand at the end
    borders = (match.end() - 1 for match in BORDER.finditer(text, 0, end))
    anywhere = range(LONGEST_WORD, 0, -1) if end >= LONGEST_WORD else []
    for cut in chain(borders, anywhere):
        if not any(token in text[max(0, cut - len(token) + 1) : cut + len(token) - 1] for token in special_tokens):
            return cut
    return 0


def read_blocks(path, special_tokens=()):
    """Yield a UTF-8 text file in blocks whose ids are those of the whole text, but for LONGEST_WORD without a border."""
    rest = ""
    with open(path, encoding="utf-8-sig") as file:
        try:
            while block := file.read(BLOCK):
                if "\0" in block:
                    raise ValueError(f"{path} holds zero bytes: it is not a text file")
                text = rest + block
                cut = last_cut(text, special_tokens)
                rest = text[cut:]
                yield text[:cut]
        except UnicodeDecodeError as error:
            byte = file.buffer.tell() - len(error.object) + error.start  # error.start counts from the last bytes read
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {byte}): save it as UTF-8") from None
    yield rest


def write_tokens(text_path, tokens_path, tokenizer):
    """Tokenize a UTF-8 text file into a flat file of ids, 2 or 4 bytes each; return its path, suffix .uint16 or .uint32."""
    dtype = "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32"
    tokens_path = Path(f"{str(tokens_path).removesuffix(f'.{dtype}')}.{dtype}")  # corpus.train keeps its .train
    with replacing(tokens_path) as temporary, open(temporary, "wb") as file:
        for block in read_blocks(text_path, tokenizer.special_tokens_set):
            np.array(tokenizer.encode(block, allowed_special="all"), dtype).tofile(file)
        if not file.tell():
            raise ValueError(f"{text_path} is empty: there is nothing to learn from")
    return tokens_path


def load_tokens(path):
    """Return the ids of a token file as a memory-mapped array (N): read from the disk only where they are used."""
    dtype, size = Path(path).suffix.removeprefix("."), Path(path).stat().st_size
    if dtype not in ("uint16", "uint32") or not size or size % np.dtype(dtype).itemsize:
        raise ValueError(f"{path} ({size} bytes) is no whole .uint16 or .uint32 file, such as write_tokens makes")
    return np.memmap(path, dtype=dtype, mode="r")


class TokenWindows(Dataset):
    """Windows over tokens (N): item i is (input, target), two int64 tensors (context_length), target one token ahead.

    >>> TokenWindows([10, 11, 12, 13, 14], context_length=3, stride=1)[1]
    (tensor([11, 12, 13]), tensor([12, 13, 14]))
    """

    def __init__(self, tokens, context_length, stride):
        if context_length < 1 or stride < 1:
            raise ValueError(f"context_length and stride must be at least 1, not {context_length} and {stride}")
        if len(tokens) <= context_length:
            raise ValueError(f"{len(tokens)} tokens are too few for one window of {context_length}: take a longer text")
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu" or tokens.dtype.kind == "i" and tokens.min() < 0:
            raise ValueError(f"tokens must be whole numbers from 0 on; these {tokens.dtype} are not")
        windows = np.lib.stride_tricks.sliding_window_view(tokens, context_length + 1)  # a view, not a copy
        self.windows = windows[::stride]  # (number of windows, context_length + 1)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        window = torch.from_numpy(self.windows[i].astype(np.int64))
        return window[:-1], window[1:]


class EpochOrder(Sampler):
    """The order of n items in each epoch: a permutation that (seed, epoch) fixes, so that any place can be found again."""

    def __init__(self, n, shuffle, seed):
        self.n, self.shuffle, self.seed, self.epoch = n, shuffle, seed, 0

    def __len__(self):
        return self.n

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        yield from rng.permutation(self.n).tolist() if self.shuffle else range(self.n)


def create_dataloader(tokens, batch_size, context_length, stride, shuffle=True, seed=0):
    """Return a DataLoader of (inputs, targets), each int64 (batch_size, context_length); the last batch may be smaller."""
    windows = TokenWindows(tokens, context_length, stride)
    own = torch.Generator()  # else each pass draws from the global one, which dropout uses
    return DataLoader(windows, batch_size, sampler=EpochOrder(len(windows), shuffle, seed), generator=own)
