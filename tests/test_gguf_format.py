"""GGUF files, with llama.cpp's own server and PyPI's gguf on the other side."""

import json
import urllib.request
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from samples import MIXED_TEXT

from llm_shared.generate import generate
from llm_shared.gguf_format import export_gguf, load_gguf, read_gguf
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
from llm_shared.weights import load_pretrained

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


def test_a_failed_export_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("old")
    with pytest.raises(ValueError, match="the tokenizer has 50257 tokens, the model 257"):
        export_gguf(GPTModel(SMALL), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
