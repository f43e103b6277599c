"""ch05 · transformers' folders: a GPT-2 from the hub becomes a GPTModel, and a GPTModel such a folder."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

from llm_shared.checkpoint import build_model, fingerprint, own_weights, read_safetensors
from llm_shared.gpt import GPTConfig
from llm_shared.resources import fetch, replacing, write_safetensors
from llm_shared.tokenizer import END_OF_TEXT, VISIBLE, BPETokenizer, gpt2_tokenizer
from llm_shared.weights import GPT2_NAMES, from_gpt2, transposed_in_gpt2, unique
import torch

HF_CONFIG = {  # transformers' name: ours
    "vocab_size": "vocab_size", "n_positions": "context_length", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer",
}  # fmt: skip
HF_FIXED = {  # what GPTModel does, and the only values of these settings that it can follow
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "is_causal": True, "is_encoder_decoder": False, "chunk_size_feed_forward": 0, "n_special": 0,
}  # fmt: skip
HF_HARMLESS = [  # what changes no logit: settings of the training, of the drawing of tokens, of other heads; notes
    "architectures", "*dtype", "transformers_version", "*_pdrop", "initializer_range", "gradient_checkpointing", "use_cache",
    "*_token_id", "task_specific_params", "reorder_and_upcast_attn", "summary_*", "problem_type", "*num_labels", "id2label",
    "label2id", "output_*", "return_dict", "torchscript", "is_decoder", "predict_special_tokens", "_name_or_path",
]  # fmt: skip
HF_CUT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # how tokenizer.json says GPT2_PATTERN


def read_settings(path):
    """Return the object in a JSON file, without what is null; a file that holds none, or a name twice, is a ValueError."""
    try:
        settings = json.loads(Path(path).read_bytes(), object_pairs_hook=unique)
        return {name: value for name, value in settings.items() if value is not None}
    except (OSError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a JSON object: {error}") from None


def check_settings(settings, fixed, harmless, source):
    """ValueError that names each setting of another value than in fixed, and each that is not known to be harmless."""
    known = {name for name in settings if name in fixed or any(fnmatchcase(name, pattern) for pattern in harmless)}
    other = [name for name, value in settings.items() if name not in known or value != fixed.get(name, value)]
    if other:
        other = ", ".join(f"{name!r:.60}: {settings[name]!r:.60}" for name in other[:5])
        raise ValueError(f"{source}: GPTModel cannot follow, or nobody here knows: {other}; remove what has no effect")


def config_from(settings, names, source):
    """Return the GPTConfig that settings describe; names: {their name: ours}. A ValueError names what is missing or no size."""
    sizes = {name: settings.get(name) for name in names}
    wrong = {name: size for name, size in sizes.items() if type(size) is not int or not 0 < size < 2**24}
    if wrong:
        raise ValueError(f"{source} does not describe a GPT-2: {wrong!r:.300}")
    return GPTConfig(**{our: sizes[name] for name, our in names.items()})


def read_folder(folder, device="cpu"):
    """Return {name: tensor} of model.safetensors, or of exactly the files that the folder's index names; else a ValueError."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return read_safetensors(whole, device)
    if not index.is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*"))[:9])
        raise ValueError(f"{folder} needs model.safetensors, or its index, and holds {found}; pickles are not opened")
    places = read_settings(index).get("weight_map")  # {name of a tensor: name of its file}
    if not isinstance(places, dict) or not all(re.fullmatch(r"'[\w.-]+'", repr(file)) for file in places.values()):
        raise ValueError(f"{index} does not name a file beside it for each tensor")
    shards = {file: read_safetensors(folder / file, device) for file in sorted(set(places.values()))}
    wrong = sorted(set(places.items()) ^ {(name, file) for file, shard in shards.items() for name in shard})
    if wrong:
        raise ValueError(f"{index} and its files do not agree on {wrong[0]} and {len(wrong)} in all")
    return {name: shards[file][name] for name, file in places.items()}


def load_hf(folder, device="cpu", dtype=torch.float32):
    """Return the GPTModel of a folder that transformers wrote; a ValueError names what GPTModel cannot follow."""
    source, cut = Path(folder) / "config.json", Path(folder) / "tokenizer.json"
    theirs = read_settings(source)
    config = config_from(theirs, HF_CONFIG, source)
    same = {"n_ctx": config.context_length, "n_inner": 4 * config.n_embd}
    check_settings(theirs, HF_FIXED | same, [*HF_CONFIG, *HF_HARMLESS], source)
    if cut.is_file():
        cutter = read_settings(cut).get("pre_tokenizer")
        check_settings(cutter if isinstance(cutter, dict) else {"type": cutter}, HF_CUT, ["trim_offsets"], cut)
    return build_model(config, from_gpt2(read_folder(Path(folder), device)), folder, dtype)


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
    bpe = BPETokenizer(BPETokenizer.load(fetch("gpt2/vocab.bpe")).merges, special_tokens)
    if bpe.n_vocab != tokenizer.n_vocab or fingerprint(bpe) != fingerprint(tokenizer):
        raise ValueError("of tiktoken's encodings only GPT-2's, with more special tokens, can be exported")
    return bpe


def visible_tokens(bpe):
    """Return (tokens, merges) as files write them: each byte as one visible character, special tokens as they are."""
    tokens = ["".join(VISIBLE[byte] for byte in token) for token in bpe.token_bytes]
    merges = [f"{tokens[left]} {tokens[right]}" for left, right in bpe.merges]
    tokens = tokens[: bpe.n_vocab - len(bpe.special_ids)] + list(bpe.special_ids)
    unique((token, None) for token in tokens)  # files find a token by its text
    return tokens, merges


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
    """Write a new folder that AutoModelForCausalLM and AutoTokenizer open; tokenizer: GPT-2's unless given."""
    folder, c, bpe = Path(folder), model.config, bpe_of(tokenizer, model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already: choose another folder")
    config = HF_FIXED | {name: getattr(c, our) for name, our in HF_CONFIG.items()}
    config |= {"architectures": ["GPT2LMHeadModel"], "torch_dtype": str(model.tok_emb.weight.dtype)[len("torch.") :]}
    config |= dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], c.dropout)
    config |= dict.fromkeys(["bos_token_id", "eos_token_id"], bpe.eot_token)
    ends = dict.fromkeys(["bos_token", "eos_token"], None if bpe.eot_token is None else END_OF_TEXT)
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.context_length} | ends
    files = {"config.json": config, "tokenizer.json": tokenizer_json(bpe), "tokenizer_config.json": tokenizer_config}
    weights = {f"transformer.{name}": weight for name, weight in to_gpt2(own_weights(model)).items()}
    with replacing(folder) as temporary:
        write_safetensors(temporary / "model.safetensors", weights, metadata={"format": "pt"})
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
