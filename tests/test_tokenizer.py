import copy
import json
import multiprocessing
import pickle
import re
import time
import unicodedata
from collections import Counter
from itertools import chain, pairwise
from random import Random

import llm_shared.symbols
from llm_shared.resources import fetch
from llm_shared.symbols import LONG_WORD, to_symbols
from llm_shared.tokenizer import (
    END_OF_TEXT,
    PIECE_PATTERN,
    VISIBLE,
    BPETokenizer,
    gpt2_tokenizer,
    split_pieces,
    split_special,
    split_words,
)
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import MIXED_TEXT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SHIPPED_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
VIETNAMESE = "aăâbcdđeêghiklmnoôơpqrstuưvxy àảãáạằẳẵắặầẩẫấậèẻẽéẹềểễếệìỉĩíịòỏõóọồổỗốộờởỡớợùủũúụừửữứựỳỷỹýỵ"
CODE = "(){}[]<>=+-*/%&|^~!?.,:;'\"\\`#@$_ \t\n0123456789abcdefxyzABC"


@pytest.fixture(scope="module")
def tiktoken_gpt2():
    """tiktoken's own GPT-2: its pattern, and ranks read from vocab.bpe by its own loader."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext import openai_public

    encoder = {}  # data_gym wants encoder.json too; what it must say follows from the merges
    for token, i in gpt2_tokenizer()._mergeable_ranks.items():
        encoder["".join(VISIBLE[byte] for byte in token)] = i
    path = fetch("gpt2/vocab.bpe").with_name("encoder.json")
    import tiktoken.load

    read = tiktoken.load.read_file_cached
    tiktoken.load.read_file_cached = lambda name, _hash=None: (
        json.dumps(encoder).encode() if name == str(path) else fetch("gpt2/vocab.bpe").read_bytes()
    )
    try:
        ranks = data_gym_to_mergeable_bpe_ranks("vocab.bpe", str(path))
    finally:
        tiktoken.load.read_file_cached = read
    pattern = openai_public.r50k_pat_str
    assert pattern == SHIPPED_PATTERN
    return tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})


@pytest.fixture(scope="module")
def ours():
    return BPETokenizer.load(fetch("gpt2/vocab.bpe"))


text = st.one_of(
    st.text(),
    st.text(VIETNAMESE),
    st.text(VIETNAMESE).map(lambda s: unicodedata.normalize("NFD", s)),
    st.text(CODE),
    st.text(st.characters(categories=["Cc", "Zs", "Zl", "Zp"])),
    st.text(st.characters(min_codepoint=0x1F000, max_codepoint=0x1FAFF) | st.sampled_from("\u200d\ufe0f ")),
    st.lists(st.sampled_from(MIXED_TEXT.split(" ")), max_size=20).map(" ".join),
)


@settings(max_examples=10_000, deadline=None, derandomize=True)
@given(text)
def test_ids_equal_tiktoken(tiktoken_gpt2, ours, text):
    expected = tiktoken_gpt2.encode_ordinary(text)
    assert ours.encode_ordinary(text) == expected
    assert gpt2_tokenizer().encode_ordinary(text) == expected
    assert ours.decode(expected) == text
    assert ours.decode_bytes(expected) == text.encode("utf-8")


def test_whole_book_equals_tiktoken(tiktoken_gpt2, ours, moby_dick):
    assert ours.encode_ordinary(moby_dick) == tiktoken_gpt2.encode_ordinary(moby_dick)


def test_special_tokens_equal_tiktoken(tiktoken_gpt2, ours):
    document = f"one{END_OF_TEXT}two {END_OF_TEXT}\n"
    assert ours.encode(document, allowed_special="all") == tiktoken_gpt2.encode(document, allowed_special="all")
    assert ours.encode_ordinary(document) == tiktoken_gpt2.encode_ordinary(document)
    for tokenizer in (ours, tiktoken_gpt2):
        with pytest.raises(ValueError, match="special token"):
            tokenizer.encode(document)
    assert (ours.n_vocab, ours.eot_token) == (tiktoken_gpt2.n_vocab, tiktoken_gpt2.eot_token) == (50257, 50256)


@pytest.mark.parametrize("lone", ["\ud800", "a\udfff b"])
def test_lone_surrogates_are_rejected(ours, lone):
    for use in (ours.encode, ours.encode_ordinary, lambda s: BPETokenizer.train(s, 300)):
        with pytest.raises(ValueError, match="lone surrogate"):
            use(lone)


def test_piece_pattern_knows_every_space():
    everything = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    assert re.findall(r"[^\S\x1c-\x1f]", everything) == regex.findall(r"\s", everything)


@settings(max_examples=1000, deadline=None)
@given(text)
def test_words_join_to_pieces_join_to_text(text):
    pieces = split_pieces(text)
    assert "".join(pieces) == text
    assert list(chain.from_iterable(map(split_words, pieces))) == split_words(text)
    assert PIECE_PATTERN.findall(text) == pieces


def test_split_special_prefers_the_longest():
    assert split_special("a<x><x>>b", ["<x>", "<x>>"]) == ["a", "<x>", "", "<x>>", "b"]
    assert split_special("a", []) == ["a"]


def hf_merges(text, vocab_size):
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    hf.train_from_iterator([text], trainer)
    return [tuple(pair) for pair in json.loads(hf.to_str())["model"]["merges"]]


def visible_merges(tokenizer):
    visible = ["".join(VISIBLE[byte] for byte in token) for token in tokenizer.token_bytes]
    return [(visible[left], visible[right]) for left, right in tokenizer.merges]


@pytest.mark.parametrize("vocab_size", [300, 1000, 3000])
def test_training_equals_hf_tokenizers(moby_dick, vocab_size):
    ours = BPETokenizer.train(moby_dick, vocab_size, special_tokens=())
    assert visible_merges(ours) == hf_merges(moby_dick, vocab_size)
    assert ours.n_vocab == vocab_size


def test_training_on_vietnamese(tmp_path):
    sentence = "Xin chào, tôi là một mô hình ngôn ngữ nhỏ viết tiếng Việt. "
    tokenizer = BPETokenizer.train(sentence * 3, 400)
    assert len(tokenizer.encode(sentence)) < len(sentence) / 2 < len(gpt2_tokenizer().encode(sentence))
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, "Đà Nẵng, Huế 👋 chưa từng thấy")
        assert tokenizer.decode(tokenizer.encode(other)) == other


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200), st.integers(0, 60))
def test_training_on_anything(sample, n_merges):
    tokenizer = BPETokenizer.train(sample, 257 + n_merges)
    assert tokenizer.decode(tokenizer.encode_ordinary(sample)) == sample
    assert len(tokenizer.merges) <= n_merges


def test_special_tokens_do_not_teach_merges():
    assert BPETokenizer.train(f"{END_OF_TEXT}{END_OF_TEXT}", 300).merges == []


@pytest.mark.parametrize("special_tokens", [(), (END_OF_TEXT,), (END_OF_TEXT, "<|người dùng|>", "a\nb")])
def test_save_and_load(tmp_path, special_tokens):
    tokenizer = BPETokenizer.train(MIXED_TEXT * 3, 400, special_tokens)
    tokenizer.save(tmp_path / "tokenizer.bpe")
    again = BPETokenizer.load(tmp_path / "tokenizer.bpe")
    assert (again.merges, again.special_ids) == (tokenizer.merges, tokenizer.special_ids)
    assert again.encode(MIXED_TEXT) == tokenizer.encode(MIXED_TEXT)


def test_bad_input(tmp_path, ours):
    with pytest.raises(ValueError, match="vocab_size must be at least"):
        BPETokenizer.train("text", 200)
    with pytest.raises(ValueError, match="0 to 50256; 60000"):
        ours.decode([1, 60000])
    with pytest.raises(ValueError, match="0 to 50256; -1"):
        ours.decode([-1])
    (tmp_path / "bad").write_text("not merges", encoding="utf-8")
    with pytest.raises(ValueError, match="not a BPE merges file"):
        BPETokenizer.load(tmp_path / "bad")
    (tmp_path / "cut").write_text("#version: 0.2\nĠ t\nĠt he\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3"):
        BPETokenizer.load(tmp_path / "cut")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a BPE merges file"):
        BPETokenizer.load(tmp_path / "binary")


def test_long_words_stay_fast(ours):
    assert ours.decode(ours.encode("a" * 200_000 + "ăâ" * 50_000)) == "a" * 200_000 + "ăâ" * 50_000


ALPHABETS = [
    "a",
    "ab",
    "etaoin",
    "0123456789",
    "=-_.",
    "việtăâ",
    "👋🏽\u200d",
    "永和九年",
    "\u0302\u0323e",
    " ",
    "\n ",
    "the ng1.",
]
long_word = st.one_of(
    st.sampled_from(ALPHABETS).flatmap(lambda alphabet: st.text(alphabet, min_size=20, max_size=400)),
    st.builds(lambda part, n: (part * n)[:2000], st.text(min_size=1, max_size=8), st.integers(10, 300)),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(long_word)
def test_long_words_equal_tiktoken(tiktoken_gpt2, ours, word):
    assert ours.encode_ordinary(word) == tiktoken_gpt2.encode_ordinary(word)


@pytest.mark.parametrize("size", [LONG_WORD - 1, LONG_WORD, LONG_WORD + 1, 3000])
@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_words_around_the_limit_equal_tiktoken(tiktoken_gpt2, ours, alphabet, size):
    word = "".join(Random(size).choices(alphabet, k=size))
    assert ours.encode_ordinary(word) == tiktoken_gpt2.encode_ordinary(word)


class CountedLooks(dict):
    looks = 0

    def get(self, pair):
        self.looks += 1
        return super().get(pair)


@pytest.mark.parametrize("alphabet", ["a", "ab", "abcdefghijklmnopqrstuvwxyz", "0123456789", "ăâêôơư"])
def test_the_work_grows_as_the_word_does(ours, alphabet):
    tokenizer = copy.copy(ours)
    for size in (1000, 8000):
        word = "".join(Random(0).choices(alphabet, k=size))
        tokenizer.merged = CountedLooks(ours.merged)
        tokenizer._encode_word(word)
        assert tokenizer.merged.looks < 3 * len(to_symbols(word))


@pytest.mark.parametrize("alphabet", ["abcdefghij", "ăâêôơư"])
def test_training_on_one_long_word_takes_seconds(alphabet):
    word = "".join(Random(0).choices(alphabet, k=30_000))
    started = time.process_time()
    BPETokenizer.train(word, 400)
    assert time.process_time() - started < 0.5  # counting the whole word again after each merge takes 0.9


def naive_merges(words, n_merges):
    words, merges = [list(map(ord, to_symbols(word))) for word in words], []
    while len(merges) < n_merges and (counts := Counter(chain.from_iterable(map(pairwise, words)))):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for ids in words:
            i = 0
            while i < len(ids):
                if tuple(ids[i : i + 2]) == best:
                    ids[i : i + 2] = [256 + len(merges)]
                i += 1
        merges.append(best)
    return merges


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab", max_size=60) | st.text("abc ", max_size=60), max_size=4).map(" ".join))
def test_training_on_long_words_equals_a_naive_loop(sample):
    merges = BPETokenizer.train(sample, 256 + 12, special_tokens=()).merges
    assert merges == naive_merges(split_words(sample), 12)[: len(merges)]


def test_what_is_remembered_is_bounded(monkeypatch, ours):
    monkeypatch.setattr(llm_shared.symbols, "MEMO_SIZE", 100)
    tokenizer = BPETokenizer(ours.merges)
    text = " ".join(f"word{i} {'x' * LONG_WORD}{i}" for i in range(300))
    assert tokenizer.encode(text) == tokenizer.encode(text) == ours.encode(text)
    for memo in (tokenizer.encode_piece.__self__, tokenizer.encode_word.__self__):
        assert len(memo) == 100 and max(map(len, memo)) <= LONG_WORD


def test_what_is_remembered_cannot_be_changed(ours):
    for remembered in (ours.encode_word, ours.encode_piece):
        expected = list(remembered(" remembered"))
        with pytest.raises(AttributeError):
            remembered(" remembered").append(0)
        assert list(remembered(" remembered")) == expected
    ids = ours.encode(" remembered")
    ids.append(0)
    assert ours.encode(" remembered") == ids[:-1]


def in_another_process(tokenizer):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(copy.copy, [tokenizer])


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), in_another_process]
)
def test_a_copy_encodes_alike_and_remembers_nothing(copied):
    tokenizer = BPETokenizer.train(MIXED_TEXT * 3, 400, [END_OF_TEXT, "<|hết|>"])
    size = len(pickle.dumps(tokenizer))
    ids = tokenizer.encode(f"{MIXED_TEXT}<|hết|>", allowed_special="all")
    again = copied(tokenizer)
    assert not again.encode_word.__self__ and len(pickle.dumps(tokenizer)) == size
    assert again.encode(f"{MIXED_TEXT}<|hết|>", allowed_special="all") == ids
    assert (again.merges, again.special_ids, again.n_vocab) == (
        tokenizer.merges,
        tokenizer.special_ids,
        tokenizer.n_vocab,
    )


@pytest.mark.parametrize("special_tokens", [[""], ["<a>", "<b>", "<a>"], "<|hết|>", ("<a>", "")])
def test_special_tokens_must_differ_and_not_be_empty(special_tokens):
    with pytest.raises(ValueError, match="special tokens must be"):
        BPETokenizer([], special_tokens)


@pytest.mark.parametrize(
    "given_as", [list, tuple, iter, np.array, lambda ids: np.array(ids, np.uint16), lambda ids: (i for i in ids)]
)
def test_ids_may_come_in_any_form(ours, given_as):
    assert ours.decode(given_as([15496, 11, 995, 0])) == "Hello, world!"
    with pytest.raises(ValueError, match="0 to 50256; 50257"):
        ours.decode(given_as([15496, 50257]))


def test_line_ends_of_windows_change_no_merge(tmp_path, ours):
    (tmp_path / "crlf.bpe").write_bytes(fetch("gpt2/vocab.bpe").read_bytes().replace(b"\n", b"\r\n"))
    assert BPETokenizer.load(tmp_path / "crlf.bpe").merges == ours.merges


@pytest.mark.parametrize("special", ["5", "[1]", "null", '{"a": 1}', '"text"'])
def test_special_tokens_of_another_kind(tmp_path, special):
    (tmp_path / "odd.bpe").write_text(f"#version: 0.2\n#special: {special}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"odd\.bpe: .* is no list of special tokens"):
        BPETokenizer.load(tmp_path / "odd.bpe")


def test_two_merges_of_one_text_are_refused(tmp_path):
    """Their ids would be counted once, so that all later ones would shift."""
    (tmp_path / "twice.bpe").write_text("#version: 0.2\na b\nb c\nab c\na bc\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 5: 'a bc' does not merge two known tokens into a new one"):
        BPETokenizer.load(tmp_path / "twice.bpe")
