import json
import re
import unicodedata
from itertools import chain

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import MIXED_TEXT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llm_shared.resources import fetch
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
