"""GGUF files, with llama.cpp's own server and PyPI's gguf on the other side."""

import json
import os
import random
import re
import struct
import urllib.request
from dataclasses import replace

from llm_shared import gguf_format
from llm_shared.generate import generate
from llm_shared.gguf_format import export_gguf, load_gguf, read_gguf
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
from llm_shared.weights import load_pretrained
import gguf
import numpy as np
import pytest
import torch
from samples import MIXED_TEXT, files_of_at_most
from torch import nn

SMALL = GPTConfig(vocab_size=257, context_length=16, n_embd=32, n_head=2, n_layer=2)
PROMPTS = ["Call me", "It is a truth universally", "Fellow citizens of the", "The sea was", "My dear friend, I"]


@pytest.fixture(scope="module")
def mini_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "mini.gguf"
    export_gguf(load_pretrained("mini"), path)
    return path


@pytest.fixture(scope="module")
def llama_cpp(mini_file):
    """Ask llama.cpp's server, on loopback, which has opened mini: ask(path, **body) → answer."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp comes with the extra `weights`")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = str(mini_file), 256, 1, 0
    params.warmup, params.fit_params, params.verbosity = False, False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(path, **body):
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return json.load(urllib.request.urlopen(request))

    return ask


@pytest.mark.parametrize("text", [MIXED_TEXT, "Trăm năm trong cõi người ta", "x = [1,  2]\n\n\tend", "don't 's", "🇻🇳½"])
def test_llama_cpp_cuts_text_as_tiktoken_does(llama_cpp, text):
    assert llama_cpp("/tokenize", content=text)["tokens"] == gpt2_tokenizer().encode_ordinary(text)


def test_llama_cpp_goes_on_with_the_same_tokens(llama_cpp):
    model = load_pretrained("mini")
    for prompt in PROMPTS:
        ids = gpt2_tokenizer().encode_ordinary(prompt)
        answer = llama_cpp(
            "/completion",
            prompt=ids,
            n_predict=50,
            temperature=0,
            return_tokens=True,
            cache_prompt=False,
            ignore_eos=True,
        )
        assert answer["tokens"] == generate(model, [ids], 50)[0][-50:], prompt


def test_round_trip_is_bit_exact(mini_file):
    model, tokenizer = load_gguf(mini_file)
    mini = load_pretrained("mini")
    assert model.config == mini.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mini.parameters(), strict=True))
    assert tokenizer.encode(MIXED_TEXT) == gpt2_tokenizer().encode(MIXED_TEXT)


def test_other_types_and_the_readers_own_tokenizer(tmp_path):
    tokenizer = BPETokenizer.train(MIXED_TEXT, 300, ["<|endoftext|>", "<|hết|>"])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = GPTModel(replace(SMALL, vocab_size=300, qkv_bias=False)).to(dtype)
        export_gguf(model, tmp_path / "x.gguf", tokenizer)
        again, its_tokenizer = load_gguf(tmp_path / "x.gguf", dtype=dtype)
        assert torch.equal(again.blocks[0].ffn.up.weight, model.blocks[0].ffn.up.weight)
        assert torch.equal(again.pos_emb.weight, model.pos_emb.weight) and not again.blocks[0].attn.qkv.bias.any()
        assert its_tokenizer.special_ids == tokenizer.special_ids and its_tokenizer.merges == tokenizer.merges


def test_quantised_files_are_read(tmp_path):
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "other")
    packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields, weights = read_gguf(tmp_path / "q.gguf")
    assert fields["general.architecture"] == "other" and weights["w"].shape == (4, 64)
    assert np.abs(weights["w"].numpy() - weight).max() < 0.02
    with pytest.raises(ValueError, match="holds the architecture 'other', not gpt2"):
        load_gguf(tmp_path / "q.gguf")


def test_a_file_cut_short_is_refused_with_one_line(tmp_path):
    export_gguf(GPTModel(SMALL), tmp_path / "whole.gguf", BPETokenizer([]))
    content = (tmp_path / "whole.gguf").read_bytes()
    for length in [*range(0, len(content), 997), len(content) // 2, len(content) - 1]:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is damaged or no GGUF file") as caught:
            load_gguf(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value), length


def test_other_content_is_refused_with_one_line(tmp_path):
    rng = np.random.default_rng(0)
    for i, start in enumerate([b"", b"GGUF", b"GGUF\x03\0\0\0", b"GGUF\x03\0\0\0" + b"\xff" * 16]):
        (tmp_path / f"{i}.gguf").write_bytes(start + rng.bytes(5000))
        with pytest.raises(ValueError, match="is damaged or no GGUF file") as caught:
            load_gguf(tmp_path / f"{i}.gguf")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is damaged or no GGUF file"):
        load_gguf(tmp_path / "missing.gguf")


@pytest.fixture(scope="module")
def tiny():
    """A small model and its tokenizer."""
    torch.manual_seed(0)
    bpe = BPETokenizer([(0, 1), (256, 2)])
    return GPTModel(replace(SMALL, vocab_size=bpe.n_vocab)), bpe


@pytest.fixture
def tiny_file(tiny, tmp_path):
    export_gguf(tiny[0], tmp_path / "tiny.gguf", tiny[1])
    return tmp_path / "tiny.gguf"


@pytest.fixture
def changed(tiny_file, monkeypatch):
    """Load the small file as if it held other fields and weights."""
    fields, weights = read_gguf(tiny_file)

    def load(new_fields=(), new_weights=()):
        monkeypatch.setattr(
            gguf_format, "read_gguf", lambda file: (fields | dict(new_fields), weights | dict(new_weights))
        )
        return load_gguf(tiny_file)

    return load


def refused(load, message, *arguments):
    with pytest.raises(ValueError, match=message) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


LLAMA_CPP = {  # what its converter and its other tools write beside what export_gguf does
    "general.type": "model", "general.name": "gpt2", "general.file_type": 1, "general.quantization_version": 2,
    "general.size_label": "124M", "general.license": "mit", "general.tags": ["exbert"], "general.languages": ["en"],
    "gpt2.vocab_size": 259, "gpt2.attention.head_count_kv": 2, "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.unknown_token_id": 258, "tokenizer.ggml.padding_token_id": 258, "tokenizer.chat_template": "{{ x }}",
    "quantize.imatrix.file": "x.dat", "quantize.imatrix.entries_count": 3, "split.count": 0, "split.no": 0,
    "split.tensors.count": 0, "general.sampling.temp": 0.7,
}  # fmt: skip


def test_what_llama_cpp_writes_is_welcome(changed, tiny):
    model, bpe = changed(LLAMA_CPP)
    assert model.config == tiny[0].config and bpe.merges == tiny[1].merges


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpt2.attention.layer_norm_epsilon", 1e-6), ("gpt2.attention.layer_norm_rms_epsilon", 1e-5),
        ("gpt2.attention.head_count_kv", 1), ("gpt2.attention.key_length", 8), ("gpt2.attention.causal", False),
        ("gpt2.feed_forward_length", 64), ("gpt2.vocab_size", 260), ("gpt2.rope.scaling.type", "yarn"),
        ("gpt2.rope.scaling.factor", 2.0), ("gpt2.rope.dimension_count", 16), ("gpt2.logit_scale", 0.5),
        ("split.count", 2), ("general.type", "adapter"), ("adapter.lora.alpha", 16.0), ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.pre", "llama-bpe"), ("tokenizer.ggml.pre", "default"), ("tokenizer.ggml.add_bos_token", True),
        ("tokenizer.ggml.add_eos_token", True), ("tokenizer.ggml.ignore_merges", True), ("x.y", list(range(1000))),
    ],
)  # fmt: skip
def test_what_changes_the_result_or_is_unknown_is_refused_by_name(changed, name, value):
    refused(changed, re.escape(f"{name!r}: {value!r:.60}"), {name: value})


TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpt2.block_count": 10_000}, "10000 layers are claimed"),
        ({"gpt2.block_count": 10**12}, "{'gpt2.block_count': 1000000000000}"),
        ({"gpt2.context_length": 2**40}, "{'gpt2.context_length': 1099511627776}"),
        ({"gpt2.embedding_length": -1}, "{'gpt2.embedding_length': -1}"),
        ({"gpt2.attention.head_count": [2, 2]}, re.escape("{'gpt2.attention.head_count': [2, 2]}")),
        ({"gpt2.attention.head_count": True}, "{'gpt2.attention.head_count': True}"),
        ({"gpt2.attention.head_count": "2"}, "{'gpt2.attention.head_count': '2'}"),
        ({"gpt2.attention.head_count": 5}, "n_embd=32 is not divisible by n_head=5"),
        ({TOKENS: ["a"]}, "numbered otherwise"),
        ({TOKENS: 3}, "does not hold a tokenizer like GPT-2's"),
        ({MERGES: [1, 2]}, "does not hold a tokenizer like GPT-2's"),
        ({MERGES: ["! #", "!# #"]}, "numbered otherwise"),
        ({MERGES: ['!"', '!" #']}, "does not hold a tokenizer like GPT-2's"),
        ({MERGES: ['! "', '!" #', '! " #']}, "numbered otherwise"),
    ],
)
def test_fields_that_describe_no_model(changed, change, message):
    refused(changed, message, change)


def test_a_tokenizer_that_would_fill_the_memory(changed, tiny_file):
    """Each merge doubles the token before it: a few lines of text, 2 ** 60 bytes."""
    fields = read_gguf(tiny_file)[0]
    tokens = fields[TOKENS][:256] + [f"t{i}" for i in range(60)]
    refused(changed, "numbered otherwise", {TOKENS: tokens, MERGES: ["! !"] + [f"t{i} t{i}" for i in range(59)]})


def test_a_head_of_its_own_and_two_names_for_one_tensor(changed, tiny):
    embedding = tiny[0].tok_emb.weight.detach()
    assert torch.equal(changed(new_weights={"output.weight": embedding.clone()})[0].tok_emb.weight, embedding)
    refused(changed, "the output head has weights of its own", {}, {"output.weight": embedding + 1})
    refused(changed, "'tok_emb.weight' comes twice", {}, {"tok_emb.weight": embedding})
    refused(changed, "blocks.0.ffn.up.scale and 1 in all", {}, {"blk.0.ffn_up.scale": torch.ones(1)})


HUGE = 2**60


def text(content):
    return struct.pack("<Q", len(content)) + content


def gguf_bytes(fields=b"", tensors=b"", n_fields=1, n_tensors=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + fields + tensors


LYING_FILES = {  # 24 to 150 bytes each, most of which promise 2 ** 60 of something
    "fields": gguf_bytes(n_fields=HUGE, n_tensors=0),
    "tensors": gguf_bytes(n_fields=0, n_tensors=HUGE),
    "both": gguf_bytes(n_fields=HUGE, n_tensors=HUGE) + bytes(61),
    "list of numbers": gguf_bytes(text(b"x") + struct.pack("<IIQ", 9, 4, HUGE)),
    "list of bytes": gguf_bytes(text(b"x") + struct.pack("<IIQ", 9, 0, HUGE) + bytes(50)),
    "list of texts": gguf_bytes(text(b"x") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(64)),
    "list of lists": gguf_bytes(text(b"x") + struct.pack("<IIQ", 9, 9, HUGE) + struct.pack("<IQ", 9, 1) * 5),
    "deep lists": gguf_bytes(text(b"x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000),
    "text": gguf_bytes(text(b"x") + struct.pack("<IQ", 8, HUGE) + b"abc"),
    "name": gguf_bytes(struct.pack("<Q", HUGE) + b"abc"),
    "type of field": gguf_bytes(text(b"x") + struct.pack("<II", 99, 0)),
    "dimensions": gguf_bytes(n_fields=0, n_tensors=1, tensors=text(b"w") + struct.pack("<IQ", 2**31, 4) + bytes(16)),
    "size": gguf_bytes(n_fields=0, n_tensors=1, tensors=text(b"w") + struct.pack("<IQIQ", 1, HUGE, 0, 0)),
    "size overflow": gguf_bytes(n_fields=0, n_tensors=1, tensors=text(b"w") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0)),
    "offset": gguf_bytes(n_fields=0, n_tensors=1, tensors=text(b"w") + struct.pack("<IQIQ", 1, 4, 0, 2**64 - 40) + bytes(99)),
    "type of tensor": gguf_bytes(n_fields=0, n_tensors=1, tensors=text(b"w") + struct.pack("<IQIQ", 1, 4, 77, 0) + bytes(99)),
    "whole numbers": gguf_bytes(n_fields=0, n_tensors=1, tensors=text(b"w") + struct.pack("<IQIQ", 1, 4, 24, 0) + bytes(99)),
    "alignment": gguf_bytes(text(b"general.alignment") + struct.pack("<II", 4, 0)),
    "version": gguf_bytes(n_fields=0, version=1),
    "name twice": gguf_bytes(2 * (text(b"x") + struct.pack("<IB", 0, 1)), n_fields=2),
    "no text": gguf_bytes(text(b"x") + struct.pack("<I", 8) + text(b"\xff\xfe")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", LYING_FILES)
def test_a_file_that_promises_more_than_it_holds(tmp_path, name):
    (tmp_path / "lie.gguf").write_bytes(LYING_FILES[name])
    refused(read_gguf, r"lie\.gguf is damaged or no GGUF file", tmp_path / "lie.gguf")


def test_big_endian_numbers_are_not_taken_for_others(tmp_path):
    """gguf reads such a file's header, and its dequantize takes the numbers for little-endian ones."""
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "gpt2", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("w", np.ones((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(read_gguf, "its numbers are big-endian", tmp_path / "big.gguf")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q6_K"])
def test_every_type_of_number_becomes_float32(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    size = gguf.quant_shape_to_byte_shape((4, 256), kind)
    packed = np.random.default_rng(0).integers(0, 60, size, dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "gpt2")
    writer.add_tensor("w", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weight = read_gguf(tmp_path / "q.gguf")[1]["w"]
    assert weight.dtype == torch.float32 and weight.shape == (4, 256)
    assert np.array_equal(weight.numpy(), gguf.dequantize(packed, kind), equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damage_is_refused_or_the_model_is_of_the_same_shape(tiny_file, tiny):
    """A byte changed, or some cut away, a few hundred times: a model or one line, and nothing else."""
    rng, content = random.Random(0), tiny_file.read_bytes()
    for _ in range(100):
        at, damaged = rng.randrange(9000), bytearray(content)
        damaged[at : at + rng.randrange(9)] = (
            rng.randbytes(8) if rng.random() < 0.3 else rng.randbytes(rng.randrange(3))
        )
        tiny_file.write_bytes(damaged)
        try:
            assert load_gguf(tiny_file)[0].state_dict().keys() == tiny[0].state_dict().keys()
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_failed_export_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("old")
    with pytest.raises(ValueError, match="the tokenizer has 50257 tokens, the model 257"):
        export_gguf(GPTModel(SMALL), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_only_a_models_own_weights_in_a_known_type_are_exported(tmp_path):
    wrapped = GPTModel(SMALL)
    wrapped.ln_f = nn.Sequential(wrapped.ln_f)
    with pytest.raises(ValueError, match="LoRA or is compiled"):
        export_gguf(wrapped, tmp_path / "x.gguf", BPETokenizer([]))
    with pytest.raises(ValueError, match="in one of F32, F16, BF16"):
        export_gguf(GPTModel(SMALL).double(), tmp_path / "x.gguf", BPETokenizer([]))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1000, 20_000])
def test_a_full_disk_keeps_the_old_file(tmp_path, size):
    path = tmp_path / "model.gguf"
    path.write_text("old")
    with files_of_at_most(size), pytest.raises(OSError) as caught:
        export_gguf(GPTModel(SMALL), path, BPETokenizer([]))
    assert "\n" not in str(caught.value) and path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
