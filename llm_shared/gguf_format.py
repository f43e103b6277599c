"""ch05 · GGUF, the one file that llama.cpp and Ollama open: a GPTModel and its tokenizer written to it, and read from it."""

import torch

from llm_shared.checkpoint import build_model
from llm_shared.gpt import GPTConfig
from llm_shared.hf_format import bpe_of, visible_tokens
from llm_shared.resources import replacing
from llm_shared.tokenizer import BPETokenizer

GGUF_NAMES = {  # a piece of our name: the same piece of llama.cpp's
    "tok_emb.": "token_embd.", "pos_emb.": "position_embd.", "blocks.": "blk.", "ln_1.": "attn_norm.", "attn.qkv.": "attn_qkv.",
    "attn.out_proj.": "attn_output.", "ln_2.": "ffn_norm.", "ffn.up.": "ffn_up.", "ffn.down.": "ffn_down.", "ln_f.": "output_norm.",
}  # fmt: skip
GGUF_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NORMAL, CONTROL = 1, 3  # llama.cpp's kinds of tokens


def export_gguf(model, file, tokenizer=None):
    """Write a GGUF file with the model, in its own dtype, and the tokenizer: GPT-2's unless given.

    A tokenizer of another size is a ValueError.
    """
    import gguf

    c, bpe = model.config, bpe_of(tokenizer, model)
    tokens, merges = visible_tokens(bpe)
    with replacing(file) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        writer.add_context_length(c.context_length)
        writer.add_embedding_length(c.n_embd)
        writer.add_block_count(c.n_layer)
        writer.add_feed_forward_length(4 * c.n_embd)
        writer.add_head_count(c.n_head)
        writer.add_layer_norm_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([CONTROL if token in bpe.special_ids else NORMAL for token in tokens])
        writer.add_token_merges(merges)
        writer.add_add_bos_token(False)
        if bpe.eot_token is not None:
            writer.add_bos_token_id(bpe.eot_token)
            writer.add_eos_token_id(bpe.eot_token)
        weights = model.state_dict()
        if not c.qkv_bias:
            weights |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(3 * c.n_embd) for i in range(c.n_layer)}
        for name, weight in weights.items():
            dtype = torch.float32 if weight.ndim == 1 or name == "pos_emb.weight" else weight.dtype  # as llama.cpp asks
            kind = gguf.GGMLQuantizationType[GGUF_TYPES[dtype]]
            for our, their in GGUF_NAMES.items():
                name = name.replace(our, their)
            array = gguf.quantize(weight.float().contiguous().cpu().numpy(), kind)
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf(file):
    """Return (fields, weights) of a GGUF file, both {name: …}; weights in float32, whatever type they are stored in.

    A file that is cut short, damaged or no GGUF is a ValueError.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(file, "c")  # mapped; changes stay in memory
        fields = {name: field.contents() for name, field in reader.fields.items()}
        shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
        arrays = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        weights = {name: torch.from_numpy(array.reshape(shapes[name])) for name, array in arrays.items()}
    except (OSError, LookupError, ValueError, OverflowError, TypeError) as error:
        raise ValueError(f"{file} is damaged or no GGUF file: {error}") from None
    return fields, weights


def load_gguf(file, device="cpu", dtype=torch.float32):
    """Return (model, tokenizer) of a GGUF file of the gpt2 architecture, the inverse of `export_gguf`.

    Another architecture, or what does not fit, is a ValueError.
    """
    fields, theirs = read_gguf(file)
    if fields.get("general.architecture") != "gpt2":
        raise ValueError(f"{file} holds the architecture {fields.get('general.architecture')!r}, not gpt2")
    try:
        tokens = fields["tokenizer.ggml.tokens"]
        config = GPTConfig(
            vocab_size=len(tokens), context_length=fields["gpt2.context_length"], n_embd=fields["gpt2.embedding_length"],
            n_head=fields["gpt2.attention.head_count"], n_layer=fields["gpt2.block_count"],
        )  # fmt: skip
        ids = {token: i for i, token in enumerate(tokens)}
        merges = [tuple(ids[token] for token in merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise ValueError(f"{file} does not say {error}") from None
    tokenizer = BPETokenizer(merges, tokens[256 + len(merges) :])
    if visible_tokens(tokenizer)[0] != tokens:
        raise ValueError(f"{file} numbers its tokens otherwise than GPT-2 does")
    weights = {}
    for name, weight in theirs.items():
        for our, their in GGUF_NAMES.items():
            name = name.replace(their, our)
        weights[name] = weight.to(device)
    return build_model(config, weights, file, dtype), tokenizer
