import tracemalloc

import llm_shared.data
from llm_shared.data import EpochOrder, TokenWindows, create_dataloader, load_tokens, read_blocks, write_tokens
from llm_shared.resources import fetch
from llm_shared.tokenizer import END_OF_TEXT, BPETokenizer, gpt2_tokenizer
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import MIXED_TEXT


def naive_batches(tokens, batch_size, context_length, stride):
    windows = []
    for start in range(0, len(tokens) - context_length, stride):
        window = tokens[start : start + context_length + 1]
        windows.append((window[:-1], window[1:]))
    for i in range(0, len(windows), batch_size):
        inputs, targets = zip(*windows[i : i + batch_size], strict=True)
        yield torch.tensor(inputs), torch.tensor(targets)


@pytest.mark.parametrize("n", [5, 20, 41])
@pytest.mark.parametrize("context_length", [1, 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_equal_a_naive_loop(n, context_length, stride, batch_size):
    tokens = list(range(100, 100 + n))
    expected = list(naive_batches(tokens, batch_size, context_length, stride))
    got = list(create_dataloader(np.array(tokens, np.uint16), batch_size, context_length, stride, shuffle=False))
    assert len(got) == len(expected)
    for (x, y), (x_naive, y_naive) in zip(got, expected, strict=True):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, x_naive) and torch.equal(y, y_naive)


def test_shuffling_is_a_permutation_fixed_by_seed_and_epoch():
    tokens = np.arange(1000, dtype=np.uint16)

    def order(loader):
        return [int(x[0, 0]) for x, _ in loader]

    loader = create_dataloader(tokens, 1, 10, 10, shuffle=True, seed=1)
    first, second = order(loader), order(loader)
    assert sorted(first) == sorted(second) == list(range(0, 990, 10))
    assert first != second
    assert order(create_dataloader(tokens, 1, 10, 10, shuffle=True, seed=1)) == first
    assert order(create_dataloader(tokens, 1, 10, 10, shuffle=True, seed=2)) != first
    loader.sampler.epoch = 1
    assert order(loader) == second
    assert list(EpochOrder(3, shuffle=False, seed=0)) == [0, 1, 2]


def test_windows_are_views():
    tokens = np.arange(1_000_000, dtype=np.uint16)
    windows = TokenWindows(tokens, 256, 1)
    assert len(windows) == 1_000_000 - 256
    assert np.shares_memory(windows.windows, tokens)


def test_token_file(tmp_path, moby_dick):
    tokenizer = gpt2_tokenizer()
    text_path = tmp_path / "book.txt"
    text_path.write_text(moby_dick + "<|endoftext|>" + MIXED_TEXT.replace("\x00", ""), encoding="utf-8", newline="")
    text = text_path.read_text(encoding="utf-8")  # line ends become \n
    path = write_tokens(text_path, tmp_path / "tokens", tokenizer)
    tokens = load_tokens(path)
    assert tokens.dtype == np.uint16 and path.stat().st_size == 2 * len(tokens)
    assert tokens.tolist() == tokenizer.encode(text, allowed_special="all")
    assert isinstance(tokens, np.memmap)


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = BPETokenizer.train("low lower", 260)
    tokenizer.n_vocab = (1 << 16) + 1
    (tmp_path / "text").write_text("lowest", encoding="utf-8")
    assert load_tokens(write_tokens(tmp_path / "text", tmp_path / "tokens", tokenizer)).dtype == np.uint32


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_blocks_change_no_token(tmp_path, monkeypatch, block):
    monkeypatch.setattr(llm_shared.data, "BLOCK", block)
    text = MIXED_TEXT.replace("\x00", "").replace("\r", "") * 2 + "   \n\n  end  \n"
    (tmp_path / "text").write_text(text, encoding="utf-8", newline="")
    path = write_tokens(tmp_path / "text", tmp_path / "tokens", gpt2_tokenizer())
    assert load_tokens(path).tolist() == gpt2_tokenizer().encode(text)


SPECIAL_TOKENS = [END_OF_TEXT, "<|người dùng|>", "a\nb", "<x>", "<x>>", "ll", "   "]
ATOMS = [
    "a",
    "it's",
    "'ll",
    "'l",
    "'",
    "''",
    "'re",
    "1",
    "12",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    ".",
    "--",
    "<|",
    *SPECIAL_TOKENS,
]
ATOMS += ["ng", "ơ", "e\u0323", "\ufeff", "\xa0", "\x1c", "永", "👋", "\u2028", "½", "\r\n", "\r"]
nasty = st.lists(st.sampled_from(ATOMS), max_size=40).map("".join)


@pytest.fixture(scope="module")
def many_special_tokens():
    return BPETokenizer(BPETokenizer.load(fetch("gpt2/vocab.bpe")).merges[:2000], SPECIAL_TOKENS)


@settings(
    max_examples=170, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=nasty, block=st.integers(1, 12))
def test_no_cut_changes_an_id(tmp_path, many_special_tokens, text, block):
    path = tmp_path / "text"
    path.write_text(text, encoding="utf-8", newline="")
    whole = path.read_text(encoding="utf-8-sig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_shared.data, "BLOCK", block)
        for tokenizer in (gpt2_tokenizer(), many_special_tokens):
            blocks = list(read_blocks(path, tokenizer.special_tokens_set))
            assert "".join(blocks) == whole
            ids = [i for block in blocks for i in tokenizer.encode(block, allowed_special="all")]
            assert ids == tokenizer.encode(whole, allowed_special="all")


WITHOUT_SPACES = [
    "a",
    "1",
    ".",
    "永",
    " ",
    "\n",
    "\r\n",
    "'s",
    "ab1.",
    "https://a.vn/b?c=1&",
    END_OF_TEXT,
    f"a{END_OF_TEXT}",
]


@pytest.mark.parametrize("part", WITHOUT_SPACES)
def test_any_text_comes_in_small_blocks(tmp_path, monkeypatch, part):
    monkeypatch.setattr(llm_shared.data, "BLOCK", 64)
    monkeypatch.setattr(llm_shared.data, "LONGEST_WORD", 128, raising=False)
    (tmp_path / "text").write_text(part * 2000, encoding="utf-8", newline="")
    whole = (tmp_path / "text").read_text(encoding="utf-8")
    blocks = list(read_blocks(tmp_path / "text", {END_OF_TEXT}))
    assert "".join(blocks) == whole
    assert max(map(len, blocks)) < 64 + 128 + len(END_OF_TEXT)
    ids = [i for block in blocks for i in gpt2_tokenizer().encode(block, allowed_special="all")]
    assert ids == gpt2_tokenizer().encode(
        whole, allowed_special="all"
    )  # 128 is a multiple of every token's length here


def peak_of_writing(path, tokenizer):
    tracemalloc.start()
    write_tokens(path, path.with_name("tokens"), tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("part", ["a", " ", "\n", "ab1.", "low lower ", END_OF_TEXT])
def test_writing_tokens_takes_constant_memory(tmp_path, monkeypatch, part):
    monkeypatch.setattr(llm_shared.data, "BLOCK", 1 << 11)
    monkeypatch.setattr(llm_shared.data, "LONGEST_WORD", 1 << 12, raising=False)
    tokenizer = BPETokenizer.train("low lower lowest", 262)
    peaks = []
    for size in (10_000, 10_000, 50_000):  # the first time, imports and caches are paid for
        (tmp_path / "text").write_text(part * (size // len(part)), encoding="utf-8", newline="")
        peaks.append(peak_of_writing(tmp_path / "text", tokenizer))
    assert peaks[2] < 1.3 * peaks[1]


def test_ever_new_words_take_constant_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(llm_shared.data, "BLOCK", 1 << 11)
    monkeypatch.setattr("llm_shared.symbols.MEMO_SIZE", 100, raising=False)
    for n in (3000, 9000):
        (tmp_path / "text").write_text(" ".join(f"từ{i}" for i in range(n)), encoding="utf-8")
        assert peak_of_writing(tmp_path / "text", BPETokenizer.train("low lower lowest", 262)) < 1_000_000


@pytest.mark.parametrize("space", [" ", "\n", "\t"])
def test_a_million_spaces_are_a_text(tmp_path, space):
    (tmp_path / "text").write_text("a" + space * 1_200_000 + "b", encoding="utf-8", newline="")
    tokens = load_tokens(write_tokens(tmp_path / "text", tmp_path / "tokens", gpt2_tokenizer()))
    assert gpt2_tokenizer().decode(tokens.tolist()) == "a" + space * 1_200_000 + "b"


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("before", [0, 1, 8191, 8192, 20_000, 600_000])
@pytest.mark.parametrize("wrong", [b"\xff", b"\xe1\xbb", b"\xc3("])
def test_the_wrong_byte_is_counted_from_the_start_of_the_file(tmp_path, start, before, wrong):
    (tmp_path / "text").write_bytes(start + b"a" * before + wrong)
    with pytest.raises(ValueError, match=f"at byte {len(start) + before}\\)"):
        list(read_blocks(tmp_path / "text"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc\xff\xfe", "not UTF-8 text"),
        (b"PK\x03\x04\x00\x00", "zero bytes"),
        (None, "No such file"),
    ],
)
def test_bad_text_leaves_nothing(tmp_path, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        write_tokens(tmp_path / "text", tmp_path / "out" / "tokens", gpt2_tokenizer())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_byte_order_mark_is_no_token(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffViệt".encode())
    path = write_tokens(tmp_path / "text", tmp_path / "tokens", gpt2_tokenizer())
    assert gpt2_tokenizer().decode(load_tokens(path).tolist()) == "Việt"


def test_bad_windows():
    with pytest.raises(ValueError, match="too few for one window"):
        TokenWindows(np.arange(4), 4, 1)
    for context_length, stride in ((0, 1), (1, 0), (2, -1)):
        with pytest.raises(ValueError, match="at least 1"):
            TokenWindows(np.arange(10), context_length, stride)


def test_names_with_dots_keep_them(tmp_path):
    (tmp_path / "text").write_text("abc", encoding="utf-8")
    for name in ("corpus.train", "corpus.val", "v1.0", "corpus", "again.uint16"):
        path = write_tokens(tmp_path / "text", tmp_path / "out" / name, gpt2_tokenizer())
        assert path.name == f"{name.removesuffix('.uint16')}.uint16" and load_tokens(path).tolist() == [39305]
    assert len(list((tmp_path / "out").iterdir())) == 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokens.uint16", b""),
        ("tokens.uint16", b"123"),
        ("tokens.uint32", b"123456"),
        ("tokens.txt", b"1234"),
        ("tokens", b"1234"),
        ("tokens.float32", b"12345678"),
        ("tokens.uint8", b"1234"),
        ("tokens.int64", b"12345678"),
    ],
)
def test_no_token_file_is_a_line_with_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} \({len(content)} bytes\) is no whole .uint16 or .uint32 file"):
        load_tokens(tmp_path / name)
    with pytest.raises(OSError, match="nowhere"):
        load_tokens(tmp_path / "nowhere.uint16")


@pytest.mark.parametrize(
    "tokens",
    [
        [1.0, 2.0, 3.0],
        np.array([1.5, 2.5, np.nan]),
        torch.rand(5),
        np.array([True, False, True]),
        np.array([1, -1, 2]),
        [5, 6, -100],
        ["1", "2", "3"],
        [1 << 70, 2, 3],
    ],
)
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(ValueError, match="tokens must be whole numbers from 0 on"):
        TokenWindows(tokens, 2, 1)


@pytest.mark.parametrize("kind", [list, torch.tensor, np.uint8, np.uint16, np.uint32, np.int32, np.int64])
def test_tokens_may_come_in_any_kind_of_whole_numbers(kind):
    tokens = kind([10, 11, 12, 13]) if kind in (list, torch.tensor) else np.array([10, 11, 12, 13], kind)
    x, y = TokenWindows(tokens, 2, 1)[1]
    assert x.tolist() == [11, 12] and y.tolist() == [12, 13] and x.dtype == torch.int64


def test_a_batch_of_nothing_is_refused():
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match="batch_size"):
            create_dataloader(np.arange(9), batch_size, 2, 1)
