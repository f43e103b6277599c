"""ch02 · A word as a string with one character per token: spelled from bytes, merged when long, remembered when short."""

from collections import defaultdict
from heapq import heappop, heappush
from operator import add

# GPT-2 numbers the 256 bytes in this order: first those with a visible character of their own, then the rest.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += [byte for byte in range(256) if byte not in BYTES]
# In files each byte is one visible character; the last 68 borrow the characters after 255 (a space becomes Ġ).
VISIBLE = {byte: chr(byte if i < 188 else 256 + i - 188) for i, byte in enumerate(BYTES)}
SYMBOLS = bytes(BYTES.index(byte) for byte in range(256))
LONG_WORD = 32  # bytes: a longer word is merged place by place; characters: a longer text is not remembered
MEMO_SIZE = 1 << 17  # texts that one Memo remembers


def to_symbols(word):
    """Spell a word's UTF-8 bytes as a string with one character per token: chr(token id)."""
    return word.encode("utf-8").translate(SYMBOLS).decode("latin-1")


class Memo(dict):
    """What a function of a text gave, by text: for short texts only, and not for ever more of them."""

    def __init__(self, function):
        self.function = function

    def __missing__(self, text):
        result = self.function(text)
        if len(text) <= LONG_WORD and len(self) < MEMO_SIZE:
            self[text] = result
        return result


def merge_places(symbols, merged, pairs):
    """Merge the symbols of a long word in O(n log n); merged {pair: symbol} and pairs {symbol: pair} are a BPETokenizer's."""
    places = defaultdict(list)  # symbol → where it may be born
    for i, born in enumerate(map(merged.get, map(add, symbols, symbols[1:]))):
        if born:
            places[born].append(i)
    heap = sorted(places)
    symbols, ends = [*symbols, ""], [*range(len(symbols)), -1]  # ends: a token's first place → its last one, and back
    while heap:
        new = heappop(heap)  # the merge learned first
        left, right = pairs[new]
        for i in sorted(places.pop(new)):
            if symbols[i] == left and symbols[j := ends[i] + 1] == right:  # else another merge took one of the two
                symbols[i], symbols[j] = new, ""
                ends[i] = last = ends[j]
                ends[last] = i
                for place in (ends[i - 1], i):
                    if born := merged.get(symbols[place] + symbols[ends[place] + 1]):
                        if born not in places:
                            heappush(heap, born)
                        places[born].append(place)
    return "".join(symbols)
