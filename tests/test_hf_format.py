"""transformers' folders, in and out, with transformers itself on the other side."""

import json
import os
import random
import re
from dataclasses import replace

from llm_shared.gpt import CONFIGS, GPTConfig, GPTModel
from llm_shared.hf_format import export_hf, load_hf
from llm_shared.lora import add_lora
from llm_shared.resources import fetch
from llm_shared.tokenizer import GPT2_PATTERN, BPETokenizer, gpt2_tokenizer
from llm_shared.weights import load_pretrained
import pytest
import tiktoken
import torch
from parity import hf_model
from safetensors.torch import load_file, save_file
from samples import MIXED_TEXT, files_of_at_most
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

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
    refused(tmp_path / "shards", "No such file")


@pytest.fixture
def shards(folder):
    """The folder's weights in two files, a.safetensors and b.safetensors, with their index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(weights)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: weight for name, weight in weights.items() if places[name] == file}, folder / file)
    write_index(folder, places)
    return folder, weights, places


def write_index(folder, places):
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_only_the_files_of_the_model_are_read(shards):
    """What else lies in the folder, a copy of another training or an adapter, changes nothing: once the last name won."""
    folder, weights, places = shards
    wrong = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    save_file(wrong, folder / "z.safetensors")
    embedding = load_hf(folder).tok_emb.weight
    assert torch.equal(embedding, weights["transformer.wte.weight"])
    save_file(weights, folder / "model.safetensors")
    write_index(folder, dict.fromkeys(places, "z.safetensors"))  # transformers, too, takes model.safetensors first
    assert torch.equal(load_hf(folder).tok_emb.weight, embedding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places.popitem(), "do not agree on .* and 1 in all"),  # a tensor that the index does not know
        (lambda places: places.update(more="a.safetensors"), r"do not agree on \('more', 'a.safetensors'\)"),
        (lambda places: places.update(dict.fromkeys(places, "a.safetensors")), "do not agree on .* and 14 in all"),
        (lambda places: places.update(more="c.safetensors"), "c.safetensors is damaged or no safetensors file"),
        (lambda places: places.update(more="../hf/a.safetensors"), "does not name a file beside it"),
        (lambda places: places.update(more="/etc/passwd"), "does not name a file beside it"),
        (lambda places: places.update(more=".."), "is damaged or no safetensors file"),
        (lambda places: places.update(more="a\0"), "does not name a file beside it"),
        (lambda places: places.update(more=["a.safetensors"]), "does not name a file beside it"),
        (lambda places: places.update(more=5), "does not name a file beside it"),
        (lambda places: places.update(more=None), "does not name a file beside it"),
        (lambda places: places.clear(), "2 layers are claimed, and there are 0 tensors"),
    ],
)
def test_an_index_that_the_files_contradict(shards, change, message):
    folder, _, places = shards
    change(places)
    write_index(folder, places)
    refused(folder, message)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "", '{"weight_map": {"a": ']
)
def test_an_index_that_is_none(shards, content):
    (shards[0] / "model.safetensors.index.json").write_text(content)
    refused(shards[0], "does not name a file|cannot be read as a JSON object")


def test_a_tensor_in_two_files(shards):
    folder, weights, places = shards
    save_file(weights, folder / "b.safetensors")
    refused(folder, "do not agree on .* and 14 in all")


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
        ({"model_type": "llama"}, "cannot follow, or nobody here knows: 'model_type': 'llama'"),
        ({"activation_function": "relu"}, "relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_head": "3"}, "does not describe a GPT-2: {'n_head': '3'}"),
        ({"n_head": None}, "does not describe a GPT-2: {'n_head': None}"),
        ({"n_head": True}, "{'n_head': True}"),
        ({"n_head": 3.0}, "{'n_head': 3.0}"),
        ({"n_head": -3}, "{'n_head': -3}"),
        ({"n_layer": 10_000}, "10000 layers are claimed"),
        ({"n_layer": 10**12}, "{'n_layer': 1000000000000}"),
        ({"vocab_size": 2**62, "n_positions": 2**70}, "{'vocab_size': 4611686018427387904, 'n_positions'"),
        ({"n_embd": 3 * 2**40}, "{'n_embd': "),
        ({"vocab_size": 2**24 - 1, "n_positions": 2**24 - 1}, "pos_emb.weight, tok_emb.weight and 2 in all"),
    ],
)
def test_other_shapes_and_architectures_are_refused_by_name(folder, changes, message):
    change_config(folder, **changes)
    refused(folder, message)


HUB = {  # config.json of OpenAI's GPT-2 medium on the hub, but for the sizes
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 16, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 16, "n_special": 0, "predict_special_tokens": True,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 300, "_num_labels": 1, "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0}, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip


def everything():
    """All settings that transformers knows for a GPT-2, their defaults too."""
    sizes = {name: HUB[name] for name in ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")}
    return json.loads(GPT2Config(**sizes).to_json_string(use_diff=False))


@pytest.mark.parametrize(
    "settings", [HUB, everything(), everything() | {"n_ctx": 16, "n_inner": 96, "torch_dtype": "float16"}]
)
def test_what_changes_no_logit_is_welcome(folder, settings):
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_hf(folder).config == SMALL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}), ("layer_norm_epsilon", 1e-6),
        ("layer_norm_epsilon", float("nan")), ("n_inner", 48), ("n_ctx", 8), ("max_position_embeddings", 32),
        ("hidden_size", 48), ("num_attention_heads", 4), ("num_hidden_layers", 3), ("is_causal", False),
        ("add_cross_attention", True), ("is_encoder_decoder", True), ("scale_attn_weights", False),
        ("tie_word_embeddings", False), ("rope_scaling", {"type": "linear", "factor": 2}), ("attn_logit_softcapping", 30.0),
        ("model_type", "gpt_bigcode"), ("multi_query", True), ("a_setting_of_tomorrow", 1), ("line\nbreak", "a\nb"),
    ],
)  # fmt: skip
def test_what_changes_logits_or_is_unknown_is_refused_by_name(folder, name, value):
    change_config(folder, **{name: value})
    refused(folder, re.escape(f"{name!r}: {value!r:.60}"))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"3", b"null", b'"gpt2"', b"", b"\x00\xff", b"\xff\xfe\x00",
        b'{"n_head": 3, "n_head": 4}', b"{'n_head': 3}", b'{"n_head": ' + b"9" * 5000 + b"}", b"\x80\x04K\x01.",
    ],
)  # fmt: skip
def test_what_is_no_json_object(folder, content):
    for file in ("config.json", "tokenizer.json"):
        before = (folder / file).read_bytes() if file == "config.json" else None
        (folder / file).write_bytes(content)
        refused(folder, f"{file} cannot be read as a JSON object")
        (folder / file).write_bytes(before) if before else (folder / file).unlink()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_is_read_however_an_editor_saved_it(folder, encoding):
    (folder / "config.json").write_text(json.dumps(HUB), encoding=encoding)
    assert load_hf(folder).config == SMALL


CUTTERS = {  # as the hub's files and transformers have it, and three that cut otherwise
    "hub": ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}, True),
    "saved": ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}, True),
    "prefix": ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}, False),
    "llama": ({"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}, False),
    "words": ({"type": "Whitespace"}, False),
    "none": (None, False),
}


@pytest.mark.parametrize(("cutter", "fits"), CUTTERS.values(), ids=CUTTERS)
def test_a_tokenizer_that_cuts_text_otherwise(folder, cutter, fits):
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "pre_tokenizer": cutter}))
    assert load_hf(folder).config == SMALL if fits else not refused(folder, "tokenizer.json: GPTModel cannot follow")


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors")


WTE, FC = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.lm_head.weight"])
def test_a_head_of_its_own(folder, name):
    rewrite(folder, lambda weights: weights.update({name: weights[WTE]}))
    assert torch.equal(load_hf(folder).tok_emb.weight, load_file(folder / "model.safetensors")[WTE])
    rewrite(folder, lambda weights: weights.update({name: weights[WTE] + 1e-3}))
    refused(folder, "the output head has weights of its own")
    rewrite(folder, lambda weights: weights.update({name: weights[WTE][:-1]}))
    refused(folder, "the output head has weights of its own")
    rewrite(folder, lambda weights: weights.update({name: weights.pop(WTE)}))
    refused(folder, "do not fit the model: tok_emb.weight and 1 in all")


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("wte.weight", torch.zeros(300, 24), "the name 'tok_emb.weight' comes twice"),
        ("tok_emb.weight", torch.zeros(300, 24), "the name 'tok_emb.weight' comes twice"),
        ("blocks.0.attn.qkv.weight", torch.zeros(72, 24), "the name 'blocks.0.attn.qkv.weight' comes twice"),
        (WTE, torch.zeros(300, 24, dtype=torch.int8), "wte.weight holds torch.int8"),
        (WTE, torch.zeros(300, 24, dtype=torch.bool), "wte.weight holds torch.bool"),
        (FC, torch.zeros(24, 96, dtype=torch.uint8), "c_fc.weight holds torch.uint8"),
        (FC, torch.tensor(1.0), "do not fit the model: blocks.0.ffn.up.weight and 1 in all"),
        (FC, torch.zeros(0, 96), "do not fit the model: blocks.0.ffn.up.weight and 1 in all"),
        (FC, torch.zeros(1, 24, 96), "do not fit the model: blocks.0.ffn.up.weight and 1 in all"),
    ],
)
def test_surprising_tensors(folder, name, weight, message):
    rewrite(folder, lambda weights: weights.update({name: weight}))
    refused(folder, message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_other_floats_become_float32(folder, dtype):
    rewrite(folder, lambda weights: weights.update({WTE: weights[WTE].to(dtype)}))
    assert load_hf(folder).tok_emb.weight.dtype == torch.float32


def test_missing_files_and_pickles(folder, tmp_path):
    refused(tmp_path / "nowhere", "nowhere/config.json cannot be read")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder, "needs model.safetensors, or its index, and holds .*pytorch_model.bin; pickles are not opened")
    save_file(weights, folder / "adapter_model.safetensors")
    refused(folder, "and holds adapter_model.safetensors, config.json")
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, "cannot be read as a JSON object: .*No such file")
    (folder / "config.json").mkdir()
    refused(folder, "cannot be read as a JSON object: ")


def test_damage_is_refused_or_the_model_is_of_the_same_shape(shards):
    """A byte changed, or some cut away, a few hundred times: a model or one line, and nothing else."""
    folder, rng = shards[0], random.Random(0)
    for file in ("config.json", "model.safetensors.index.json", "a.safetensors"):
        content = (folder / file).read_bytes()
        for _ in range(100):
            at, damaged = rng.randrange(min(len(content), 2000)), bytearray(content)
            damaged[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3)) if rng.random() < 0.5 else b"9"
            (folder / file).write_bytes(damaged)
            try:
                assert load_hf(folder).config == SMALL
            except ValueError as error:
                assert "\n" not in str(error)
        (folder / file).write_bytes(content)
    assert load_hf(folder).config == SMALL


RANKS = {token: i for i, token in enumerate(BPETokenizer.load(fetch("gpt2/vocab.bpe")).token_bytes[:50256])}


def encoding(ranks=RANKS, pattern=GPT2_PATTERN, **special_tokens):
    special_tokens = {f"<|{name}|>": i for name, i in special_tokens.items()}
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


@pytest.mark.parametrize(
    "tokenizer",
    [
        encoding({token: RANKS[token] ^ 1 for token in RANKS}, endoftext=50256),  # the same tokens, in pairs exchanged
        encoding({bytes([i]): i for i in range(256)}, endoftext=256),
        encoding(pattern=r"\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]+", endoftext=50256),  # numbers cut as GPT-4 does
        encoding(endoftext=50260),  # ids that no token has
        encoding(endoftext=50256, user=50300),
    ],
    ids=["ranks", "bytes", "pattern", "gap", "gap between"],
)
def test_another_encoding_is_not_written_as_gpt2s(tmp_path, tokenizer):
    model = GPTModel(replace(SMALL, vocab_size=tokenizer.n_vocab, n_embd=3, n_head=1, n_layer=1))
    with pytest.raises(ValueError, match="of tiktoken's encodings only GPT-2's"):
        export_hf(model, tmp_path / "out", tokenizer)
    assert os.listdir(tmp_path) == []


def test_two_tokens_of_one_text_cannot_be_written(tmp_path):
    for bpe in (BPETokenizer([], ["a"]), BPETokenizer([(64, 64), (256, 64), (64, 256)], [])):
        with pytest.raises(ValueError, match="comes twice"):
            export_hf(GPTModel(replace(SMALL, vocab_size=bpe.n_vocab)), tmp_path / "out", bpe)
    assert os.listdir(tmp_path) == []


def test_only_a_models_own_weights_are_exported(tmp_path):
    wearing = GPTModel(replace(SMALL, vocab_size=257))
    add_lora(wearing, ["attn.qkv"], 2, 4)
    wrapped = GPTModel(replace(SMALL, vocab_size=257))
    wrapped.ln_f = nn.Sequential(wrapped.ln_f)
    for model in (wearing, wrapped):
        with pytest.raises(ValueError, match="LoRA or is compiled"):
            export_hf(model, tmp_path / "out", BPETokenizer([]))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    bpe = BPETokenizer([], [f"<|{i:0300}|>" for i in range(100)])  # tokenizer.json is larger than the weights
    model = GPTModel(replace(SMALL, vocab_size=bpe.n_vocab, n_layer=1))
    for size in (0, 1000, 50_000):  # bytes that fit: nothing, a part of the weights, a part of the tokenizer
        with files_of_at_most(size), pytest.raises(OSError) as caught:
            export_hf(model, tmp_path / "out", bpe)
        assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


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
