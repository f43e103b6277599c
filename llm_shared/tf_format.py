"""ch05 · OpenAI's original GPT-2 files: a small reader of TensorFlow's checkpoint format, without TensorFlow."""

import math
import re
import struct
from pathlib import Path

from llm_shared.checkpoint import build_model
from llm_shared.hf_format import check_settings, config_from, read_settings
from llm_shared.weights import from_gpt2, unique
import numpy as np
import torch

TF_CONFIG = {  # OpenAI's name in hparams.json: ours
    "n_vocab": "vocab_size", "n_ctx": "context_length", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer",
}  # fmt: skip
TF_KINDS = {"w": "weight", "g": "weight", "b": "bias"}
TABLE_MAGIC = 0xDB4775248B80FB57  # the last eight bytes of every index file
FLOAT32 = 1  # TensorFlow's number of the type


def read_varint(data, at):
    """Return (number, where it ends): seven bits a byte, low ones first; the top bit says that more follow."""
    number = 0
    for shift in range(0, 64, 7):
        number |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return number, at
    raise ValueError("a number has more than 64 bits")


def read_message(data):
    """Return {field number: [values]} of a protocol-buffer message: numbers, or bytes for what is nested."""
    fields, at = {}, 0
    while at < len(data):
        key, at = read_varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = read_varint(data, at)
        elif kind == 2:
            size, at = read_varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind == 5:
            value, at = struct.unpack_from("<I", data, at)[0], at + 4
        else:
            raise ValueError(f"field type {kind} is not expected here")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def read_block(table, handle):
    """Yield (key, value) of one block of a sorted table; a key keeps the beginning that it shares with the one before it."""
    offset, at = read_varint(handle, 0)
    size, _ = read_varint(handle, at)
    block, (kind, checksum) = table[offset : offset + size], struct.unpack_from("<BI", table, offset + size)
    if kind != 0:
        raise ValueError("the index is compressed, which TensorFlow does not do")
    check_crc(block + bytes([kind]), checksum, "the index")
    restarts = struct.unpack_from("<I", block, size - 4)[0]
    key, at = b"", 0
    while at < size - 4 * (restarts + 1):
        shared, at = read_varint(block, at)
        rest, at = read_varint(block, at)
        length, at = read_varint(block, at)
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def check_crc(data, checksum, name):
    """ValueError unless the bytes have the checksum stored beside them: CRC-32C, rotated and shifted as TensorFlow does."""
    import google_crc32c

    crc = google_crc32c.value(bytes(data))
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != checksum:
        raise ValueError(f"the checksum of {name} is wrong")


def read_tf_checkpoint(prefix):
    """Return {name: float32 array} of prefix.index and prefix.data-…, mapped; a wrong size or checksum is a ValueError."""
    try:
        table = Path(f"{prefix}.index").read_bytes()
        if len(table) < 48 or struct.unpack("<Q", table[-8:])[0] != TABLE_MAGIC:
            raise ValueError("it does not end as an index does")
        _, at = read_varint(table[-48:], 0)  # the footer: where a table of statistics is (offset, size), then the index
        _, at = read_varint(table[-48:], at)
        handles = [handle for _, handle in read_block(table, table[-48 + at :])]
        entries = unique(entry for handle in handles for entry in read_block(table, handle))
        header = read_message(entries.pop(b""))
        if 2 in header:
            raise ValueError("its numbers are big-endian")
        shards, mapped, arrays = header.get(1, [1])[0], {}, {}
        for name, entry in entries.items():
            name, fields = name.decode(), {field: values[-1] for field, values in read_message(entry).items()}
            dimensions = read_message(fields.get(2, b"")).get(2, [])
            shape = [read_message(dimension).get(1, [0])[0] for dimension in dimensions]
            shard, offset, size = fields.get(3, 0), fields.get(4, 0), fields.get(5, 0)
            if shard not in mapped:
                mapped[shard] = np.memmap(
                    f"{prefix}.data-{shard:05d}-of-{shards:05d}", mode="c"
                )  # changes stay in memory
            data = mapped[shard][offset : offset + size]
            if fields.get(1) != FLOAT32 or 7 in fields or len(data) != size or size != 4 * math.prod(shape):
                raise ValueError(f"{name} is not a whole float32 array of shape {shape}")
            check_crc(data, fields[6], name)
            arrays[name] = data.view(np.float32).reshape(shape)
    except (OSError, LookupError, struct.error, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{prefix}.index is damaged or no checkpoint: {error}") from None
    return arrays


def name_from_tf(name):
    """Return the name that the hub's files give a tensor of OpenAI's checkpoint.

    >>> name_from_tf("model/h0/attn/c_attn/w"), name_from_tf("model/wte")
    ('h.0.attn.c_attn.weight', 'wte.weight')
    """
    name = re.sub(r"^h(\d+)\.", r"h.\1.", name.removeprefix("model/").replace("/", "."))
    layer, _, kind = name.rpartition(".")
    return f"{layer}.{TF_KINDS[kind]}" if kind in TF_KINDS else f"{name}.weight"


def load_tf(folder, device="cpu", dtype=torch.float32):
    """Return the GPTModel of OpenAI's files: hparams.json, model.ckpt.index, model.ckpt.data-…; else a ValueError."""
    folder, source = Path(folder), Path(folder) / "hparams.json"
    theirs = read_settings(source)
    config = config_from(theirs, TF_CONFIG, source)
    check_settings(theirs, {}, TF_CONFIG, source)
    weights = []
    for name, array in read_tf_checkpoint(folder / "model.ckpt").items():
        array = (
            array[0] if array.shape[:1] == (1,) and array.ndim == 3 else array
        )  # matrices are (1, d_in, d_out) there
        weights.append((name_from_tf(name), torch.from_numpy(array).to(device)))
    return build_model(config, from_gpt2(unique(weights)), folder, dtype)
