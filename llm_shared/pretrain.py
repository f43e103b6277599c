"""ch05 · A pretraining run from a text file to a report: what gpt_train.py calls."""

import json
import math
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llm_shared.checkpoint import drop_others, load_checkpoint, newest_checkpoint, save_checkpoint
from llm_shared.data import BLOCK, create_dataloader, load_tokens, write_tokens
from llm_shared.generate import generate
from llm_shared.gpt import CONFIGS, GPTModel
from llm_shared.hardware import keep_freed_memory, pick_device, pick_dtype
from llm_shared.loss import bits_per_byte, next_token_loss, unigram_entropy
from llm_shared.resources import fetch, locked, replacing
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
from llm_shared.training import make_optimizer, train
import torch
from tqdm import tqdm


@dataclass(frozen=True)
class PretrainSettings:
    """What fixes a run: the same settings and seed give the same weights."""

    data: str = "moby-dick.txt"  # a UTF-8 text file, or the bundled one
    tokenizer: str = "gpt2"  # or a file that BPETokenizer.save wrote
    model: str = "mini"
    context_length: int | None = None  # None: the model's
    dropout: float = 0.0
    steps: int = 500
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 2e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    val_fraction: float = 0.05
    eval_every: int = 100
    seed: int = 0
    dtype: str = "auto"
    compile: bool = False

    def __post_init__(self):
        for name, least in {"steps": 1, "batch_size": 1, "accumulate": 1, "eval_every": 1, "seed": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**63:
                raise ValueError(f"{name} must be at least {least}, a whole number, not {value!r}")
        for name, most in {"lr": math.inf, "clip": math.inf, "val_fraction": 1}.items():
            if not 0 < getattr(self, name) < most:
                raise ValueError(f"{name} must lie between 0 and {most}, not {getattr(self, name)}")
        if self.model not in CONFIGS:
            raise ValueError(f"no model is called {self.model!r}; there are {', '.join(CONFIGS)}")


def pretrain(settings, out, schedule=None, device="auto", resume=False, **shape):
    """Train a GPT on a text as settings say; leave tokens, checkpoint and loss.png in the folder out; print a report.

    schedule(lr, total_steps=steps, **shape) → (step → learning rate), constant if None. With resume, out's run goes on.
    """
    if shape and schedule is None:
        raise ValueError(f"{', '.join(shape)} would do nothing without a schedule")
    rate = schedule and schedule(settings.lr, total_steps=settings.steps, **shape)
    out = Path(out)
    keep_freed_memory()
    device = pick_device(device)
    dtype = pick_dtype(settings.dtype, device)
    tokenizer = gpt2_tokenizer() if settings.tokenizer == "gpt2" else BPETokenizer.load(settings.tokenizer)
    text = Path(settings.data) if Path(settings.data).exists() else fetch(settings.data)
    base = CONFIGS[settings.model]
    length = base.context_length if settings.context_length is None else settings.context_length
    config = replace(base, vocab_size=tokenizer.n_vocab, context_length=length, dropout=settings.dropout)
    with locked(out):
        if not resume and newest_checkpoint(out):
            raise ValueError(f"{out} already holds a run: add --resume to go on with it, or choose another --out")
        drop_others(out, newest_checkpoint(out))
        tokens = load_tokens(write_tokens(text, out / "tokens", tokenizer))
        n_train = int(len(tokens) * (1 - settings.val_fraction))
        if (n_val := len(tokens) - n_train) <= length:
            raise ValueError(f"{n_val} tokens are too few to validate on: raise val_fraction, or take a longer text")
        loader = create_dataloader(tokens[:n_train], settings.batch_size, length, stride=length, seed=settings.seed)
        val_loader = create_dataloader(tokens[n_train:], settings.batch_size, length, stride=length, shuffle=False)

        torch.manual_seed(settings.seed)
        model = GPTModel(config).to(device)
        optimizer = make_optimizer(model, float(settings.lr), float(settings.weight_decay))  # not numpy's
        fixed = asdict(settings) | shape | {"schedule": getattr(schedule, "__name__", None)}
        fixed |= {"dtype": str(dtype).removeprefix("torch."), "tokens": zlib.crc32(tokens)}
        fixed = json.loads(json.dumps(fixed, default=str))  # plain values, so that run.pt can be read back
        history = load_checkpoint(out, model, optimizer, fixed) if resume else []
        n_weights = sum(weight.numel() for weight in model.parameters())
        print(f"{settings.model}: {n_weights:,} weights on {device} in {dtype}; {n_train:,} tokens of {text.name}")
        prompt = tokens[n_train : n_train + 8].tolist()

        def on_eval(history):
            save_checkpoint(out, model, tokenizer, optimizer, history, fixed)
            now = history[-1]
            tqdm.write(f"step {now['step']}: train loss {now['train_loss']:.3f}, validation loss {now['val_loss']:.3f}")
            tqdm.write("  " + write_sample(model, tokenizer, prompt, 30, settings.seed).replace("\n", " "))

        loss_fn = torch.compile(next_token_loss) if settings.compile else next_token_loss
        history = train(
            model, optimizer, loader, val_loader, settings.steps, loss_fn=loss_fn, schedule=rate, clip=settings.clip,
            accumulate=settings.accumulate, dtype=dtype, eval_every=settings.eval_every, history=history, on_eval=on_eval,
        )  # fmt: skip

        entropy, val_loss = unigram_entropy(tokens), history[-1]["val_loss"]
        parts = (tokens[i : i + BLOCK].tolist() for i in range(n_train, len(tokens), BLOCK))
        bits = bits_per_byte(val_loss, n_val, sum(len(tokenizer.decode_bytes(part)) for part in parts))
        perplexity = math.exp(min(val_loss, 700))
        print(f"\nvalidation loss {val_loss:.3f} nats per token, perplexity {perplexity:.1f}, {bits:.3f} bits per byte")
        print(f"to compare: without any context, at best {entropy:.3f} nats per token (unigram entropy)")
        print(f"\n{write_sample(model, tokenizer, prompt, 80, settings.seed)}\n")
        print(f"checkpoint {newest_checkpoint(out)}, loss curve {out / 'loss.png'}")
        plot_losses(history, entropy, out / "loss.png")  # last: should it fail, the result has been said


def write_sample(model, tokenizer, prompt, max_new_tokens, seed):
    """Return prompt and what the model writes after it, as text."""
    generator = torch.Generator(model.tok_emb.weight.device).manual_seed(seed)
    options = {"temperature": 0.8, "top_k": 50, "eot_id": tokenizer.eot_token, "generator": generator}
    return tokenizer.decode(generate(model, [prompt], max_new_tokens, **options)[0])


def plot_losses(history, entropy, path):
    """Draw the losses over the steps, and the unigram entropy as a line to get under, into a picture file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [now["step"] for now in history]
    axes.plot(steps, [now["train_loss"] for now in history], "o-", label="train")
    axes.plot(steps, [now["val_loss"] for now in history], "s-", label="validation")
    axes.axhline(entropy, color="gray", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
