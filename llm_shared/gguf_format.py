"""ch05 · GGUF, the one file that llama.cpp and Ollama open: a GPTModel and its tokenizer written to it, and read from it."""

from contextlib import closing

from llm_shared.checkpoint import build_model, own_weights
from llm_shared.hf_format import bpe_of, check_settings, config_from, visible_tokens
from llm_shared.resources import replacing
from llm_shared.tokenizer import BYTES, VISIBLE, BPETokenizer
from llm_shared.weights import tied, unique
import numpy as np
import torch

GGUF_NAMES = {  # a piece of our name: the same piece of llama.cpp's
    "tok_emb.": "token_embd.", "pos_emb.": "position_embd.", "blocks.": "blk.", "ln_1.": "attn_norm.", "attn.qkv.": "attn_qkv.",
    "attn.out_proj.": "attn_output.", "ln_2.": "ffn_norm.", "ffn.up.": "ffn_up.", "ffn.down.": "ffn_down.", "ln_f.": "output_norm.",
    "lm_head.": "output.",
}  # fmt: skip
GGUF_CONFIG = {  # llama.cpp's name: ours
    "gpt2.vocab_size": "vocab_size", "gpt2.context_length": "context_length", "gpt2.embedding_length": "n_embd",
    "gpt2.attention.head_count": "n_head", "gpt2.block_count": "n_layer",
}  # fmt: skip
GGUF_FIXED = {  # what GPTModel and BPETokenizer do; llama.cpp's numbers are float32
    "general.architecture": "gpt2", "general.type": "model", "split.count": 0, "gpt2.attention.causal": True,
    "gpt2.attention.layer_norm_epsilon": float(np.float32(1e-5)), "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.ignore_merges": False, "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": False,
}  # fmt: skip
GGUF_HARMLESS = [  # notes, and what is looked at elsewhere
    "GGUF.*", "general.*", "quantize.*", "split.*", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
    "tokenizer.ggml.scores", "tokenizer.ggml.*_token_id", "tokenizer.chat_template", "tokenizer.huggingface.json",
]  # fmt: skip
GGUF_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NORMAL, CONTROL = 1, 3  # llama.cpp's kinds of tokens


def export_gguf(model, file, tokenizer=None):
    """Write a GGUF file with the model, in its own dtype, and its tokenizer (GPT-2's unless given); else a ValueError."""
    import gguf

    c, bpe, weights = model.config, bpe_of(tokenizer, model), own_weights(model)
    tokens, merges = visible_tokens(bpe)
    if not {weight.dtype for weight in weights.values()} <= set(GGUF_TYPES):
        raise ValueError(f"the weights must be in one of {', '.join(GGUF_TYPES.values())}")
    with replacing(file) as temporary, closing(gguf.GGUFWriter(temporary, "gpt2")) as writer:
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


def read_gguf(file):
    """Return (fields, weights in float32) of a GGUF file, both {name: …}; a damaged or big-endian one is a ValueError."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, **order):  # all reading goes through it; gguf itself takes what there is
            found = super()._get(offset, dtype, count, **order)
            if len(found) != count:
                raise ValueError(f"there are no {count} numbers at byte {offset}")
            return found

    try:
        reader = Reader(file, "c")  # mapped; changes stay in memory
        if reader.byte_order != "I":
            raise ValueError("its numbers are big-endian")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if any(tensor.data_offset < reader.data_offset for tensor in reader.tensors):
            raise ValueError("a tensor lies in the head of the file")
        shapes = {tensor.name: tensor.shape[::-1].tolist() for tensor in reader.tensors}
        arrays = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        weights = {name: torch.from_numpy(array.reshape(shapes[name])) for name, array in arrays.items()}
    except (OSError, LookupError, ValueError, OverflowError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged or no GGUF file: {error}") from None
    return fields, weights


def load_gguf(file, device="cpu", dtype=torch.float32):
    """Return (model, tokenizer) of a GGUF file of a GPT-2; what GPTModel cannot follow is a ValueError that names it."""
    fields, theirs = read_gguf(file)
    if fields.get("general.architecture") != "gpt2":
        raise ValueError(f"{file} holds the architecture {fields.get('general.architecture')!r}, not gpt2")
    try:
        tokens, merges = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.merges", [])
        numbered = [*(VISIBLE[byte] for byte in BYTES), *(merge.replace(" ", "") for merge in merges)]
        if tokens[: len(numbered)] != numbered:
            raise ValueError("its tokens are numbered otherwise")
        ids = unique((token, i) for i, token in enumerate(tokens))
        pairs = [[ids[token] for token in merge.split(" ")] for merge in merges]
        tokenizer = BPETokenizer(pairs, tokens[len(numbered) :])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold a tokenizer like GPT-2's: {error}") from None
    c = config_from(fields | {"gpt2.vocab_size": len(tokens)}, GGUF_CONFIG, file)
    same = {
        "gpt2.vocab_size": len(tokens), "gpt2.feed_forward_length": 4 * c.n_embd, "gpt2.attention.head_count_kv": c.n_head,
        "gpt2.attention.key_length": c.n_embd // c.n_head, "gpt2.attention.value_length": c.n_embd // c.n_head,
    }  # fmt: skip
    check_settings(fields, GGUF_FIXED | same, [*GGUF_CONFIG, *GGUF_HARMLESS], file)
    weights = []
    for name, weight in theirs.items():
        for our, their in GGUF_NAMES.items():
            name = name.replace(their, our)
        weights.append((name, weight.to(device)))
    return build_model(c, tied(unique(weights)), file, dtype), tokenizer
