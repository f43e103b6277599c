"""The contenders: ours and the peers as their authors ship them, all of one shape, each as a function to run once."""

from llm_shared.generate import generate
from llm_shared.gpt import CONFIGS, GPTModel
from llm_shared.loss import autocast, next_token_loss
from llm_shared.training import make_optimizer
import torch
import torch.nn.functional as F
from harness import TYPES
from torch.nn.utils import clip_grad_norm_

CPU = torch.device("cpu")
BATCH = {"mini": 8, "gpt2-small (124M)": 2}  # windows of 256 tokens a training step
NEW_TOKENS, PROMPT = 128, 32


def rasbt_config(size):
    c = CONFIGS[size]
    return {
        "vocab_size": c.vocab_size, "context_length": c.context_length, "emb_dim": c.n_embd, "n_heads": c.n_head,
        "n_layers": c.n_layer, "drop_rate": 0.0, "qkv_bias": True,
    }  # fmt: skip


def transformers_model(size):
    from transformers import GPT2Config, GPT2LMHeadModel

    c = CONFIGS[size]
    return GPT2LMHeadModel(
        GPT2Config(
            n_positions=c.context_length, n_embd=c.n_embd, n_head=c.n_head, n_layer=c.n_layer,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def litgpt_model(size):
    from litgpt import GPT, Config

    c = CONFIGS[size]
    return GPT(
        Config(
            name="gpt", block_size=c.context_length, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size,
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, parallel_residual=False, bias=True,
            norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", gelu_approximate="tanh",
            intermediate_size=4 * c.n_embd,
        )
    )  # fmt: skip


def training_step(model, optimizer, loss, dtype):
    def run():
        with autocast(CPU, TYPES[dtype]):
            value = loss()
        value.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def batch(size):
    return torch.randint(50257, (2, BATCH[size], 256))


def train_ours(size, dtype):
    model, (x, y) = GPTModel(CONFIGS[size]), batch(size)
    return training_step(model, make_optimizer(model, 1e-4), lambda: next_token_loss(model, x, y) / y.numel(), dtype)


def train_transformers(size, dtype):
    model, (x, _) = transformers_model(size), batch(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # its Trainer's default
    return training_step(model, optimizer, lambda: model(x, labels=x).loss, dtype)


def train_litgpt(size, dtype):
    from litgpt.utils import chunked_cross_entropy

    model, (x, y) = litgpt_model(size), batch(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # it fuses on CUDA only
    return training_step(model, optimizer, lambda: chunked_cross_entropy(model(x), y), dtype)


def train_rasbt(size, dtype, class_name="GPTModel", weights="float32"):
    from llms_from_scratch import ch04

    model, (x, y) = getattr(ch04, class_name)(rasbt_config(size)).to(TYPES[weights]), batch(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    return training_step(model, optimizer, loss, "float32" if weights == "bfloat16" else dtype)


def prompts(rows):
    return torch.randint(50257, (rows, PROMPT))


def generate_ours(size, dtype, rows):
    model, ids = GPTModel(CONFIGS[size]).to(TYPES[dtype]).eval(), prompts(rows).tolist()
    return lambda: generate(model, ids, NEW_TOKENS)


def generate_transformers(size, dtype, rows):
    model, ids = transformers_model(size).to(TYPES[dtype]).eval(), prompts(rows)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def generate_litgpt(size, dtype, rows):
    from litgpt.generate.base import batched_generate_fn, generate_fn

    model, ids = litgpt_model(size).to(TYPES[dtype]).eval(), prompts(rows)
    total = PROMPT + NEW_TOKENS
    model.max_seq_length = total
    model.set_kv_cache(batch_size=rows, device=CPU, dtype=TYPES[dtype])
    common = {"include_prompt": False, "include_eos": True}
    if rows == 1:
        return lambda: list(generate_fn(model, ids[0], total, temperature=0.0, top_k=1, **common))
    return lambda: list(batched_generate_fn(model, ids, total, sample_args={"temperature": 0.0, "top_k": 1}, **common))
