"""OpenAI's format, on a checkpoint that TensorFlow 2.21 itself wrote (make_checkpoint.py beside it says how)."""

import json
import random
import runpy
import shutil
import struct
from dataclasses import replace

from llm_shared import tf_format
from llm_shared.gpt import GPTConfig
from llm_shared.tf_format import load_tf, name_from_tf, read_message, read_tf_checkpoint, read_varint
import google_crc32c
import numpy as np
import pytest
import torch
from parity import hf_model
from samples import ROOT

WRITTEN_BY_TENSORFLOW = ROOT / "ch05/02_alternative_weight_loading/tensorflow-checkpoint"
CONFIG = GPTConfig(vocab_size=97, context_length=16, n_embd=24, n_head=3, n_layer=2)
DATA = "model.ckpt.data-00000-of-00001"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(WRITTEN_BY_TENSORFLOW, tmp_path / "124M")
    return tmp_path / "124M"


@pytest.fixture(scope="module")
def truth():
    return runpy.run_path(str(WRITTEN_BY_TENSORFLOW / "make_checkpoint.py"))["random_weights"]()


def test_every_tensor_bit_by_bit(truth):
    arrays = read_tf_checkpoint(WRITTEN_BY_TENSORFLOW / "model.ckpt")
    assert set(arrays) == set(truth)
    assert all(arrays[name].dtype == np.float32 and np.array_equal(arrays[name], truth[name]) for name in truth)


def test_the_model_equals_transformers(truth):
    theirs = hf_model(CONFIG)
    weights = {
        name_from_tf(name): torch.from_numpy(values.squeeze(0) if values.ndim == 3 else values)
        for name, values in truth.items()
    }
    theirs.transformer.load_state_dict(weights)
    model = load_tf(WRITTEN_BY_TENSORFLOW).eval()
    assert model.config == CONFIG
    ids = torch.randint(97, (3, 16))
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-5)


def test_a_changed_weight_does_not_change_the_file(folder):
    before = (folder / DATA).read_bytes()
    with torch.no_grad():
        load_tf(folder).tok_emb.weight.zero_()
    assert (folder / DATA).read_bytes() == before


def test_varints_and_messages():
    assert read_varint(b"\xac\x02", 0) == (300, 2) and read_varint(b"x\x01", 1) == (1, 2)
    assert read_message(b"\x08\x96\x01\x12\x02hi\x12\x00") == {1: [150], 2: [b"hi", b""]}
    with pytest.raises(IndexError):
        read_varint(b"\xff", 0)


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_tf(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", [0, 1000, 40_000, 68_831])
def test_one_flipped_bit_in_the_data(folder, at):
    data = bytearray((folder / DATA).read_bytes())
    data[at] ^= 1
    (folder / DATA).write_bytes(data)
    refused(folder, r"the checksum of model/\S+ is wrong")


def test_any_flipped_byte_of_the_index_is_noticed(folder):
    """All but the table of statistics, which says nothing of the weights, and the padding of the footer."""
    index, original = folder / "model.ckpt.index", (folder / "model.ckpt.index").read_bytes()
    unnoticed = []
    for at in range(len(original)):
        index.write_bytes(original[:at] + bytes([original[at] ^ 0x55]) + original[at + 1 :])
        try:
            load_tf(folder)
            unnoticed.append(at)
        except ValueError as error:
            assert "\n" not in str(error)
    index.write_bytes(original)
    footer = len(original) - 48
    assert len([at for at in unnoticed if at < footer]) <= 13  # the empty table of statistics with its checksum
    assert not [at for at in unnoticed if at >= len(original) - 8]


@pytest.mark.parametrize("size", [0, 10, 47, 500, 939])
def test_an_index_cut_short(folder, size):
    path = folder / "model.ckpt.index"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, r"model\.ckpt\.index is damaged or no checkpoint")


def test_data_cut_short_or_missing(folder):
    path = folder / DATA
    path.write_bytes(path.read_bytes()[:-4])
    refused(folder, "is not a whole float32 array")
    path.write_bytes(b"")
    refused(folder, "is damaged or no checkpoint")
    path.unlink()
    refused(folder, "No such file|cannot find")


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"n_layer": 3}, r"do not fit the model: blocks\.2\."), ({"n_head": 5}, "n_embd=24 is not divisible by n_head=5"),
        ({"n_ctx": 8}, "pos_emb.weight and 1 in all"), ({"n_vocab": 98}, "tok_emb.weight and 1 in all"),
        ({"n_embd": None}, "does not describe a GPT-2: {'n_embd': None}"), ({"n_head": True}, "{'n_head': True}"),
        ({"n_layer": 10**12}, "{'n_layer': 1000000000000}"), ({"n_layer": 10_000}, "10000 layers are claimed"),
        ({"n_vocab": 2**62}, "{'n_vocab': 4611686018427387904}"), ({"n_ctx": -16}, "{'n_ctx': -16}"),
        ({"n_embd": "24"}, "{'n_embd': '24'}"), ({"n_inner": 48}, "cannot follow, or nobody here knows: 'n_inner': 48"),
    ],
)  # fmt: skip
def test_hparams_that_do_not_fit(folder, hparams, message):
    path = folder / "hparams.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | hparams))
    refused(folder, message)
    path.write_text("{}")
    refused(folder, "hparams.json does not describe a GPT-2: {'n_vocab': None")
    for content in ("[]", "[" * 100_000, '{"n_head": 3, "n_head": 4}'):
        path.write_text(content)
        refused(folder, "hparams.json cannot be read as a JSON object")
    path.unlink()
    refused(folder, "hparams.json cannot be read as a JSON object: .*No such file")


def test_what_is_no_table(folder):
    (folder / "model.ckpt.index").write_bytes(b"\0" * 100)
    refused(folder, "does not end as an index does")
    (folder / "model.ckpt.index").write_bytes(b"\xff" * 92 + struct.pack("<Q", 0xDB4775248B80FB57))
    refused(folder, "is damaged or no checkpoint")


def varint(number):
    more, low = divmod(number, 128)
    return bytes([low | 128]) + varint(more) if more else bytes([low])


def message(fields):
    """A protocol-buffer message of (field number, whole number or bytes) pairs."""
    return b"".join(
        varint(8 * field) + varint(value)
        if isinstance(value, int)
        else varint(8 * field + 2) + varint(len(value)) + value
        for field, value in fields
    )


def block(entries):
    """A block of an index, each key written in full, with its checksum."""
    body = b"".join(varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in entries)
    body += struct.pack("<II", 0, 1) + b"\0"
    crc = google_crc32c.value(body)
    return body + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def index(entries):
    """A whole index whose checksums are right, whatever it says."""
    data = block(entries)
    table = block([(b"z", varint(0) + varint(len(data) - 5))])
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(table) - 5)
    return data + table + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


HEADER, HUGE = (b"", message([(1, 1)])), 2**60


def shape(*sizes):
    return message((2, message([(1, size)])) for size in sizes)


def entry(*fields, crc=b"\x35\0\0\0\0"):
    return b"w", message([(1, 1), *fields]) + crc


LIES = {
    "shards": [(b"", message([(1, HUGE)])), entry((2, shape(4)), (5, 16))],
    "a shard beyond them": [HEADER, entry((2, shape(4)), (3, 7), (5, 16))],
    "offset": [HEADER, entry((2, shape(4)), (4, 2**63), (5, 16))],
    "size": [HEADER, entry((2, shape(4)), (5, HUGE))],
    "shape": [HEADER, entry((2, shape(HUGE)), (5, 16))],
    "a shape that overflows": [HEADER, entry((2, shape(2**32, 2**32)), (5, 0))],
    "bytes for a number": [HEADER, entry((2, shape(4)), (4, b"abc"), (5, 16))],
    "a number for bytes": [HEADER, entry((2, 3), (5, 16))],
    "another type": [HEADER, (b"w", message([(1, 14), (2, shape(4)), (5, 16)]))],
    "no checksum": [HEADER, entry((2, shape(4)), (5, 16), crc=b"")],
    "a wrong checksum": [HEADER, entry((2, shape(4)), (5, 16))],
    "big-endian": [(b"", message([(1, 1), (2, 1)])), entry((2, shape(4)), (5, 16))],
    "a name twice": [HEADER, entry(), entry()],
    "no header": [entry((2, shape(4)), (5, 16))],
    "a number without end": [HEADER, (b"w", b"\xff" * 100_000)],
    "no text": [HEADER, (b"\xff", message([(1, 1)]))],
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_with_right_checksums(folder, lie):
    (folder / "model.ckpt.index").write_bytes(index(LIES[lie]))
    refused(folder, r"model\.ckpt\.index is damaged or no checkpoint")


@pytest.mark.parametrize("data", [b"\xff" * 10_000_000, b"\x80" * 9 + b"\xff\1"])
def test_a_number_without_end(data):
    with pytest.raises(ValueError, match="more than 64 bits"):
        read_varint(data, 0)
    assert read_varint(b"\xff" * 9 + b"\1", 0) == (2**64 - 1, 10)


@pytest.mark.parametrize("stack", [(2, 24, 72), (0, 24, 72), (1, 1, 24, 72)])
def test_only_a_stack_of_one_is_a_matrix(folder, monkeypatch, stack):
    """OpenAI's matrices are (1, d_in, d_out): of a stack of two the first would be taken, and the other lost."""
    arrays = read_tf_checkpoint(folder / "model.ckpt")
    arrays["model/h0/attn/c_attn/w"] = np.zeros(stack, np.float32)
    monkeypatch.setattr(tf_format, "read_tf_checkpoint", lambda prefix: arrays)
    refused(folder, r"do not fit the model: blocks\.0\.attn\.qkv\.weight and 1 in all")


def test_two_names_for_one_tensor(folder, monkeypatch):
    arrays = read_tf_checkpoint(folder / "model.ckpt")
    arrays["wte"] = arrays["model/wte"]
    monkeypatch.setattr(tf_format, "read_tf_checkpoint", lambda prefix: arrays)
    refused(folder, "the name 'wte.weight' comes twice")


def test_damaged_hparams_are_refused_or_the_model_is_of_the_same_shape(folder):
    rng, content = random.Random(0), (folder / "hparams.json").read_bytes()
    for _ in range(100):
        at, damaged = rng.randrange(len(content)), bytearray(content)
        damaged[at : at + rng.randrange(3)] = rng.choice([b"", b"9", b"-", b"}", rng.randbytes(2)])
        (folder / "hparams.json").write_bytes(damaged)
        try:
            assert replace(load_tf(folder).config, n_head=3) == CONFIG  # whose number no tensor tells
        except ValueError as error:
            assert "\n" not in str(error)
