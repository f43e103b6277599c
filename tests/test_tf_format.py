"""OpenAI's format, on a checkpoint that TensorFlow 2.21 itself wrote (make_checkpoint.py beside it says how)."""

import json
import runpy
import shutil
import struct

import numpy as np
import pytest
import torch
from parity import hf_model
from samples import ROOT

from llm_shared.gpt import GPTConfig
from llm_shared.tf_format import load_tf, name_from_tf, read_message, read_tf_checkpoint, read_varint

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
        ({"n_embd": None}, "n_embd must be a whole number"),
    ],
)  # fmt: skip
def test_hparams_that_do_not_fit(folder, hparams, message):
    path = folder / "hparams.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | hparams))
    refused(folder, message)
    path.write_text("{}")
    refused(folder, "has no hparams.json of a GPT-2")
    path.unlink()
    refused(folder, "has no hparams.json of a GPT-2")


def test_what_is_no_table(folder):
    (folder / "model.ckpt.index").write_bytes(b"\0" * 100)
    refused(folder, "does not end as an index does")
    (folder / "model.ckpt.index").write_bytes(b"\xff" * 92 + struct.pack("<Q", 0xDB4775248B80FB57))
    refused(folder, "is damaged or no checkpoint")
