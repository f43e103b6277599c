"""transformers' folders, in and out, with transformers itself on the other side."""

import json
import os
from dataclasses import replace

import pytest
import tiktoken
import torch
from parity import hf_model
from safetensors.torch import load_file, save_file
from samples import MIXED_TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_shared.gpt import CONFIGS, GPTConfig, GPTModel
from llm_shared.hf_format import export_hf, load_hf
from llm_shared.resources import fetch
from llm_shared.tokenizer import GPT2_PATTERN, BPETokenizer, gpt2_tokenizer
from llm_shared.weights import load_pretrained

SMALL = GPTConfig(vocab_size=300, context_length=16, n_embd=24, n_head=3, n_layer=2)
ARCHITECTURES = {  # every size of GPT-2, thinner and shorter: layers and heads as they are, head_dim 4
    name: replace(config, vocab_size=301, context_length=32, n_embd=4 * config.n_head)
    for name, config in CONFIGS.items()
    if name != "mini"
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    hf_model(SMALL).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("config", [SMALL, *ARCHITECTURES.values()], ids=["small", *ARCHITECTURES])
def test_in_and_out_with_equal_logits(tmp_path, config):
    torch.manual_seed(1)
    theirs = hf_model(config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs").eval()
    assert model.config == config
    ids = torch.randint(config.vocab_size, (2, config.context_length))
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-5)
        tokenizer = BPETokenizer([], [f"<{i}>" for i in range(config.vocab_size - 256)])
        export_hf(model, tmp_path / "ours", tokenizer)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert torch.allclose(again(ids).logits, model(ids), atol=1e-5)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_sharded_files_are_one_model(folder, tmp_path):
    hf = AutoModelForCausalLM.from_pretrained(folder)
    hf.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, sharded = load_hf(folder), load_hf(tmp_path / "shards")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="do not fit the model: "):
        load_hf(tmp_path / "shards")


def test_mini_opens_in_transformers_with_its_tokenizer(tmp_path):
    export_hf(load_pretrained("mini"), tmp_path / "mini")
    ours = load_hf(tmp_path / "mini")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), load_pretrained("mini").parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mini")
    gpt2 = gpt2_tokenizer()
    for text in (MIXED_TEXT, "Tiếng Việt <|endoftext|> và 's", "", "  \n\n x"):
        ids = tokenizer(text)["input_ids"]
        assert ids == gpt2.encode(text, allowed_special="all")
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.model_max_length == 256 and tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"


def test_the_readers_own_tokenizers_go_along(tmp_path):
    bpe = BPETokenizer.train(MIXED_TEXT * 3, 300, ["<|endoftext|>", "<|hết|>"])
    model = GPTModel(replace(SMALL, vocab_size=bpe.n_vocab))
    export_hf(model, tmp_path / "bpe", bpe)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    assert theirs(MIXED_TEXT + "<|hết|>")["input_ids"] == bpe.encode(MIXED_TEXT + "<|hết|>", allowed_special="all")

    gpt2 = gpt2_tokenizer()
    ranks = {token: i for i, token in enumerate(BPETokenizer.load(fetch("gpt2/vocab.bpe")).token_bytes[:50256])}
    special = {"<|endoftext|>": 50256, "<|người_dùng|>": 50257}
    longer = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    export_hf(GPTModel(replace(SMALL, vocab_size=50258)), tmp_path / "longer", longer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "longer")
    assert theirs("Chào <|người_dùng|>")["input_ids"] == [*gpt2.encode("Chào "), 50257]


def test_bfloat16_and_a_missing_bias(tmp_path):
    model = GPTModel(replace(SMALL, vocab_size=257, qkv_bias=False)).bfloat16()
    export_hf(model, tmp_path / "out", BPETokenizer([]))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    assert not any(block.attn.c_attn.bias.any() for block in theirs.transformer.h)
    back = load_hf(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(back.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)


def test_wrong_heads(folder):
    change_config(folder, n_head=5)
    refused(folder, "n_embd=24 is not divisible by n_head=5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 3}, r"do not fit the model: blocks\.2\.attn\.out_proj\.bias, .* 12 in all"),
        ({"n_layer": 1}, r"blocks\.1\."),
        ({"n_embd": 36}, "and 28 in all"),
        ({"n_positions": 32}, "pos_emb.weight and 1 in all"),
        ({"vocab_size": 10}, "tok_emb.weight and 1 in all"),
        ({"model_type": "llama"}, "another architecture than GPTModel: .*llama"),
        ({"activation_function": "relu"}, "relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_head": "3"}, "n_head must be a whole number"),
    ],
)
def test_other_shapes_and_architectures_are_refused_by_name(folder, changes, message):
    change_config(folder, **changes)
    refused(folder, message)


def test_missing_files_and_pickles(folder, tmp_path):
    refused(tmp_path / "nowhere", "holds no config.json and")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder, r"pickles \(\.bin, \.pt, \.pth\) are not opened")
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    refused(folder, "does not describe a GPT-2")
    (folder / "config.json").write_text("[]")
    refused(folder, "does not describe a GPT-2")
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json and")


def test_export_touches_nothing_that_is_there(tmp_path):
    model = GPTModel(replace(SMALL, vocab_size=257))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for target in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(ValueError, match="choose another folder"):
            export_hf(model, target, BPETokenizer([]))
    with pytest.raises(ValueError, match="the tokenizer has 50257 tokens, the model 257"):
        export_hf(model, tmp_path / "new")
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == ["thesis.txt"]
