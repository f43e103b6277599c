"""ch02 · Byte-level BPE that trains, saves and loads; GPT-2's own tokenizer from its bundled merges."""

import json
import re
from collections import Counter, defaultdict
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import chain
from operator import add
from pathlib import Path

from llm_shared.resources import fetch, replacing
from llm_shared.symbols import BYTES, LONG_WORD, VISIBLE, Memo, merge_places, to_symbols
import regex

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same cut at whitespace alone, for the standard library's re, whose \s also holds the four separators \x1c–\x1f.
PIECE_PATTERN = re.compile(r" ?[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+(?![\S\x1c-\x1f])|[^\S\x1c-\x1f]+")
END_OF_TEXT = "<|endoftext|>"


def check_text(text):
    """Return text if it can be written as UTF-8; half a surrogate pair is a ValueError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is a lone surrogate ({text[error.start]!r}): not text") from None
    return text


def split_words(text):
    """Cut text into the words that no token crosses, by GPT-2's pattern; nothing is lost: the words join to the text."""
    return regex.findall(GPT2_PATTERN, check_text(text))


def split_pieces(text):
    """Cut text at whitespace only, faster than split_words and exact: no word goes on from a visible character to a space."""
    return PIECE_PATTERN.findall(check_text(text))


def split_special(text, special_tokens):
    """Cut text at the special tokens, which stand at the odd places of the result."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text) if special_tokens else [text]


class BPETokenizer:
    """Byte pair encoding over UTF-8 bytes (Sennrich et al. 2016; Radford et al. 2019, section 2.2).

    Ids: 0–255 the bytes in GPT-2's order, then one per merge, then the special tokens. Its methods follow
    tiktoken.Encoding, so either fits wherever a tokenizer is asked for. Inside, a word is a string with one
    character per token, chr(token id): to merge a pair is one str.replace.

    >>> tokenizer = BPETokenizer.train("low low low lower lowest", vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("slower, chậm hơn"))
    'slower, chậm hơn'
    """

    def __init__(self, merges, special_tokens=(END_OF_TEXT,)):
        """Take merges as (left id, right id) pairs in the order learned, and special tokens, all different."""
        if "" in special_tokens or len(set(special_tokens)) < len(special_tokens):
            raise ValueError(f"special tokens must be a list of different texts, none empty; not {special_tokens!r}")
        self.merges = [tuple(pair) for pair in merges]
        self.token_bytes = [bytes([byte]) for byte in BYTES]
        for left, right in self.merges:
            self.token_bytes.append(self.token_bytes[left] + self.token_bytes[right])
        self.merged = {chr(left) + chr(right): chr(256 + i) for i, (left, right) in enumerate(self.merges)}
        self.pairs = {symbol: pair for pair, symbol in self.merged.items()}
        self.special_tokens_set = set(special_tokens)
        self.special_ids = {token: len(self.token_bytes) + i for i, token in enumerate(special_tokens)}
        self.eot_token = self.special_ids.get(END_OF_TEXT)  # None where there is no such token
        self.token_bytes += [token.encode("utf-8") for token in special_tokens]
        self.n_vocab = len(self.token_bytes)
        self.encode_piece = Memo(self._encode_piece).__getitem__
        self.encode_word = Memo(self._encode_word).__getitem__

    def __reduce__(self):
        return type(self), (self.merges, list(self.special_ids))  # pickled and copied without what it remembers

    @classmethod
    def train(cls, text, vocab_size, special_tokens=(END_OF_TEXT,)):
        """Learn merges until there are vocab_size tokens: each time the most frequent pair, of equals that of lowest ids."""
        if vocab_size < 256 + len(special_tokens):
            raise ValueError(f"vocab_size must be at least 256 bytes + {len(special_tokens)} special tokens")
        counts = Counter(chain.from_iterable(map(split_words, split_special(text, special_tokens)[::2])))
        words, counts = [to_symbols(word) for word in counts], list(counts.values())

        pair_counts, where = Counter(), defaultdict(set)  # pair → its count; pair → words that may hold it
        for i, word in enumerate(words):
            for pair in map(add, word, word[1:]):
                pair_counts[pair] += counts[i]
                where[pair].add(i)
        heap = [(-count, pair) for pair, count in pair_counts.items()]  # may be stale: checked when popped
        heapify(heap)

        merges = []
        while heap and len(merges) < vocab_size - 256 - len(special_tokens):
            count, pair = heappop(heap)
            if -count != pair_counts[pair]:
                if pair_counts[pair] > 0:
                    heappush(heap, (-pair_counts[pair], pair))
                continue
            symbol = chr(256 + len(merges))
            merges.append((ord(pair[0]), ord(pair[1])))
            born = set()
            for i in where.pop(pair):
                parts, count = words[i].split(pair), counts[i]
                if len(parts) == 1:
                    continue
                words[i] = symbol.join(parts)
                parts = [part if len(part) < 3 else part[0] + part[-1] for part in parts]  # within, nothing changes
                old, new = pair.join(parts), symbol.join(parts)
                for gone in map(add, old, old[1:]):
                    pair_counts[gone] -= count
                for here in map(add, new, new[1:]):
                    pair_counts[here] += count
                    if symbol in here:
                        where[here].add(i)
                        born.add(here)
            for new_pair in born:
                heappush(heap, (-pair_counts[new_pair], new_pair))
        return cls(merges, special_tokens)

    def _encode_word(self, word):
        symbols = to_symbols(word)
        if len(symbols) > LONG_WORD:
            return tuple(map(ord, merge_places(symbols, self.merged, self.pairs)))
        while possible := list(filter(None, map(self.merged.get, map(add, symbols, symbols[1:])))):
            first = min(possible)  # the merge learned first
            symbols = symbols.replace(self.pairs[first], first)
        return tuple(map(ord, symbols))

    def _encode_piece(self, piece):
        return tuple(chain.from_iterable(map(self.encode_word, split_words(piece))))

    def encode_ordinary(self, text):
        """Return the token ids of text; special tokens written in it are ordinary text."""
        return list(chain.from_iterable(map(self.encode_piece, split_pieces(text))))

    def encode(self, text, allowed_special=()):
        """Return the token ids of text; of the special tokens those allowed become one id, the others an error."""
        allowed = set(self.special_ids) if allowed_special == "all" else set(allowed_special)
        ids = []
        for i, part in enumerate(split_special(text, self.special_ids)):
            if i % 2 == 0:
                ids += self.encode_ordinary(part)
            elif part in allowed:
                ids.append(self.special_ids[part])
            else:
                raise ValueError(f"the text holds the special token {part!r}: allow it, or use encode_ordinary")
        return ids

    def decode_bytes(self, ids):
        """Return the bytes that the ids stand for; a character may be split between two tokens."""
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < self.n_vocab]:
            raise ValueError(f"token ids run from 0 to {self.n_vocab - 1}; {wrong[0]} was given")
        return b"".join([self.token_bytes[i] for i in ids])

    def decode(self, ids):
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Write the merges as GPT-2's files do, one pair of visible tokens a line, special tokens in the head."""
        visible = ["".join(VISIBLE[byte] for byte in token) for token in self.token_bytes]
        lines = ["#version: 0.2", f"#special: {json.dumps(list(self.special_ids))}"]
        lines += [f"{visible[left]} {visible[right]}" for left, right in self.merges]
        with replacing(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path):
        """Read a tokenizer that `save` wrote, or GPT-2's own vocab.bpe."""
        special_tokens, merges = [END_OF_TEXT], []
        ids = {VISIBLE[byte]: i for i, byte in enumerate(BYTES)}  # visible token → id
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        if not text.startswith("#version:"):
            raise ValueError(f"{path} is not a BPE merges file: its first line is not '#version: …'")
        for number, line in enumerate(text.splitlines()[1:], start=2):
            left, _, right = line.partition(" ")
            if left == "#special:":
                special_tokens = json.loads(right)
                continue
            if left not in ids or right not in ids or left + right in ids:
                raise ValueError(f"{path}, line {number}: {line!r:.80} does not merge two known tokens into a new one")
            merges.append((ids[left], ids[right]))
            ids[left + right] = len(ids)
        if not isinstance(special_tokens, list) or not all(isinstance(token, str) for token in special_tokens):
            raise ValueError(f"{path}: {special_tokens!r:.80} is no list of special tokens")
        return cls(merges, special_tokens)


@cache
def gpt2_tokenizer():
    """Return GPT-2's tokenizer as a tiktoken.Encoding, rebuilt from the bundled merges: no network, no cache."""
    import tiktoken

    ours = BPETokenizer.load(fetch("gpt2/vocab.bpe"))
    ranks = {token: i for i, token in enumerate(ours.token_bytes[: -len(ours.special_ids)])}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=ours.special_ids)
