"""What chapter 2 claims, again with other seeds and other lengths."""

import unicodedata
from collections import Counter
from itertools import pairwise

from llm_shared.data import TokenWindows, create_dataloader
from llm_shared.resources import fetch
from llm_shared.tokenizer import BYTES, BPETokenizer, gpt2_tokenizer, split_words
import numpy as np
import pytest
import torch
from samples import ROOT

SEEDS = [11, 12]


@pytest.fixture(scope="module")
def vietnamese():
    return (ROOT / "ch02/01_main-chapter-code/bo-luat-dan-su-trich.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def english():
    return fetch("moby-dick.txt").read_text(encoding="utf-8")


def passage(text, seed, length):
    start = int(np.random.default_rng(seed).integers(len(text) - length))
    return text[start : start + length]


def merge_in_word(word, pair, new):
    out = []
    for symbol in word:
        out.append(symbol)
        if tuple(out[-2:]) == pair:
            out[-2:] = [new]
    return tuple(out)


def recounted_merges(text, n_merges):
    """Train BPE the slow way: count every pair again after each merge."""
    words = Counter(tuple(BYTES.index(byte) for byte in word.encode("utf-8")) for word in split_words(text))
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = {merge_in_word(word, merges[-1], 255 + len(merges)): count for word, count in words.items()}
    return merges


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", [700, 4000])
def test_training_without_recounting_learns_the_same_merges(vietnamese, english, seed, length):
    text = passage(vietnamese, seed, length) + passage(english, seed, length)
    assert BPETokenizer.train(text, 457).merges == recounted_merges(text, 200)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", [1000, 20_000])
def test_vietnamese_costs_gpt2_more_than_twice_as_much_as_english(vietnamese, english, seed, length):
    costs = [len(gpt2_tokenizer().encode(passage(text, seed, length))) / length for text in (vietnamese, english)]
    assert costs[0] > 2 * costs[1], costs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("vocab_size", "factor"), [(600, 1.7), (2000, 2.5)])
def test_a_vocabulary_of_its_own_cuts_the_cost_of_vietnamese(vietnamese, seed, vocab_size, factor):
    middle = len(vietnamese) // 2
    seen, unseen = vietnamese[:middle], passage(vietnamese[middle:], seed, 5000)
    if seed % 2:
        seen, unseen = vietnamese[middle:], passage(vietnamese[:middle], seed, 5000)
    own = BPETokenizer.train(seen, vocab_size)
    assert len(gpt2_tokenizer().encode(unseen)) > factor * len(own.encode(unseen))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", [200, 5000])
def test_combining_marks_cost_more_and_normalizing_undoes_it(vietnamese, seed, length):
    nfc = unicodedata.normalize("NFC", passage(vietnamese, seed, length))
    nfd = unicodedata.normalize("NFD", nfc)
    own = BPETokenizer.train(vietnamese[:50_000], 1000)
    for tokenizer, factor in ((gpt2_tokenizer(), 1.1), (own, 2)):
        assert len(tokenizer.encode(nfd)) > factor * len(tokenizer.encode(nfc))
        assert tokenizer.encode(unicodedata.normalize("NFC", nfd)) == tokenizer.encode(nfc)
        assert tokenizer.decode(tokenizer.encode(nfd)) == nfd


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("context_length", "stride"), [(5, 3), (32, 32)])
def test_batches_equal_a_loop_and_copy_no_text(seed, context_length, stride):
    tokens = np.random.default_rng(seed).integers(50257, size=1000 + seed).astype(np.uint16)
    assert np.shares_memory(TokenWindows(tokens, context_length, stride).windows, tokens)
    starts = range(0, len(tokens) - context_length, stride)
    loader = create_dataloader(tokens, 4, context_length, stride, shuffle=False)
    assert len(loader.dataset) == len(starts)
    inputs, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert inputs.tolist() == [tokens[i : i + context_length].tolist() for i in starts]
    assert targets.tolist() == [tokens[i + 1 : i + 1 + context_length].tolist() for i in starts]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("vocab_size", "n_embd"), [(7, 3), (500, 64)])
def test_an_embedding_is_a_one_hot_product(seed, vocab_size, n_embd):
    torch.manual_seed(seed)
    embedding = torch.nn.Embedding(vocab_size, n_embd)
    ids = torch.randint(vocab_size, (2, 6))
    one_hot = torch.nn.functional.one_hot(ids, vocab_size).float()
    assert torch.equal(embedding(ids), one_hot @ embedding.weight)
