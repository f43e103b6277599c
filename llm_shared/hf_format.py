"""ch05 · transformers' folders: a GPT-2 from the hub becomes a GPTModel, and a GPTModel such a folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm_shared.checkpoint import build_model, read_safetensors
from llm_shared.gpt import GPTConfig
from llm_shared.resources import fetch, replacing
from llm_shared.tokenizer import END_OF_TEXT, VISIBLE, BPETokenizer, gpt2_tokenizer
from llm_shared.weights import GPT2_NAMES, from_gpt2, transposed_in_gpt2

HF_CONFIG = {  # transformers' name: ours
    "vocab_size": "vocab_size", "n_positions": "context_length", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer",
}  # fmt: skip
HF_FIXED = {  # what GPTModel does, and the only values of these settings that it can follow
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
}  # fmt: skip


def load_hf(folder, device="cpu", dtype=torch.float32):
    """Return the GPTModel of a folder that transformers wrote, or that was downloaded from a hub: a GPT-2 of any size.

    A folder without config.json and *.safetensors (pickles are not opened), another architecture, and weights that do
    not fit are a ValueError.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json and *.safetensors; pickles (.bin, .pt, .pth) are not opened")
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = GPTConfig(**{our: theirs[name] for name, our in HF_CONFIG.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe a GPT-2: {error}") from None
    other = {name: theirs[name] for name, value in HF_FIXED.items() if theirs.get(name, value) != value}
    if other:
        raise ValueError(f"{folder} is another architecture than GPTModel: {other}")
    weights = {name: weight for file in files for name, weight in read_safetensors(file, device).items()}
    return build_model(config, from_gpt2(weights), folder, dtype)


def to_gpt2(weights):
    """Return a GPTModel's weights under OpenAI's names, the inverse of `from_gpt2`; a missing QKV bias becomes zeros."""
    theirs = {}
    for name, weight in weights.items():
        for their, our in GPT2_NAMES.items():
            name = name.replace(our, their)
        theirs[name] = weight.T if transposed_in_gpt2(name) else weight
    for name in list(theirs):
        if name.endswith(".c_attn.weight"):
            bias = name.replace("weight", "bias")
            theirs.setdefault(bias, theirs[name].new_zeros(theirs[name].shape[1]))
    return theirs


def bpe_of(tokenizer, model):
    """Return the tokenizer as a BPETokenizer: None stands for GPT-2's, a tiktoken.Encoding is GPT-2's with more special tokens."""
    tokenizer = tokenizer or gpt2_tokenizer()
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}")
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer
    special_tokens = sorted(tokenizer.special_tokens_set, key=tokenizer.encode_single_token)
    return BPETokenizer(BPETokenizer.load(fetch("gpt2/vocab.bpe")).merges, special_tokens)


def visible_tokens(bpe):
    """Return (tokens, merges) as files write them: each byte as one visible character, special tokens as they are."""
    tokens = ["".join(VISIBLE[byte] for byte in token) for token in bpe.token_bytes]
    merges = [f"{tokens[left]} {tokens[right]}" for left, right in bpe.merges]
    return tokens[: bpe.n_vocab - len(bpe.special_ids)] + list(bpe.special_ids), merges


def tokenizer_json(bpe):
    """Return the content of transformers' tokenizer.json for a BPETokenizer."""
    tokens, merges = visible_tokens(bpe)
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token} | flags for token, i in bpe.special_ids.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }


def export_hf(model, folder, tokenizer=None):
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer open; tokenizer: GPT-2's unless given.

    A folder that holds something, or a tokenizer of another size, is a ValueError.
    """
    folder, c, bpe = Path(folder), model.config, bpe_of(tokenizer, model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already: choose another folder")
    config = HF_FIXED | {name: getattr(c, our) for name, our in HF_CONFIG.items()}
    config |= {"architectures": ["GPT2LMHeadModel"], "torch_dtype": str(model.tok_emb.weight.dtype)[len("torch.") :]}
    config |= dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], c.dropout)
    config |= dict.fromkeys(["bos_token_id", "eos_token_id"], bpe.eot_token)
    ends = dict.fromkeys(["bos_token", "eos_token"], None if bpe.eot_token is None else END_OF_TEXT)
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.context_length} | ends
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer_json(bpe),
        "tokenizer_config.json": tokenizer_config,
    }
    with replacing(folder) as temporary:
        temporary.mkdir()
        weights = {f"transformer.{name}": weight.contiguous() for name, weight in to_gpt2(model.state_dict()).items()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
