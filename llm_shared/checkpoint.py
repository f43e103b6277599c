"""ch05 · Checkpoints: a model on the disk, and a training run that can be stopped at any moment and goes on exactly."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.resources import remove_leftovers, replacing, write_safetensors
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.bpe"}
RUN_FILES = MODEL_FILES | {"run.pt"}
STEP = "step-" + "[0-9]" * 8  # how a checkpoint's folder is called, for glob and re
FREE = {"data", "tokenizer", "compile"}  # settings that may change: what comes of the first two is in "tokens"
CAUSES = {
    "dtype": "dtype={0} (add --dtype {0})",
    "steps": "steps={} (the learning rate depends on them: for more steps begin another run)",
    "tokens": "other tokens (the text or the tokenizer has changed)",
}
PROBE = "Don't stop: 12345 của chúng  ta's\n\n\t½ 日本 'S, ok? IT'S café IT'LL I'VE\n\n\n\nx"  # tokenizers cut it differently


def fingerprint(tokenizer):
    """Return a hash of the bytes of each id, and of how a tokenizer cuts one text: not of every cut it could make."""
    tokens = "".join(repr(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab))
    return hashlib.sha256(f"{tokenizer.encode_ordinary(PROBE)}{tokens}".encode()).hexdigest()[:16]


def save_model(folder, model, tokenizer):
    """Write config.json, model.safetensors and, but for GPT-2, tokenizer.bpe: all or nothing; misfits are a ValueError."""
    weights = own_weights(model)
    if not isinstance(tokenizer, BPETokenizer) and tokenizer is not gpt2_tokenizer():
        raise ValueError("only gpt2_tokenizer() or a BPETokenizer can be saved: make one with the same merges")
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}")
    described = Path(folder) / "config.json"
    if described.is_file() and '"context_length"' not in described.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{folder} holds the model of another program: choose another folder")
    with replacing(folder, MODEL_FILES) as temporary:
        write_safetensors(temporary / "model.safetensors", weights)
        config = asdict(model.config) | {"tokenizer": fingerprint(tokenizer)}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if isinstance(tokenizer, BPETokenizer):
            tokenizer.save(temporary / "tokenizer.bpe")


def read_safetensors(path, device="cpu"):
    """Return {name: tensor} of a safetensors file, on a CPU mapped: read when used; a bad file is a ValueError."""
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


class SkipInit(TorchFunctionMode):
    """Within it no random weights are drawn: of tensors without memory there is nothing to fill."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_model(config, weights, source):
    """Return a GPTModel without memory; weights {name: tensor} that do not fit it are a ValueError that names source."""
    if config.n_layer > len(weights):
        raise ValueError(f"{source}: {config.n_layer} layers are claimed, and there are {len(weights)} tensors")
    try:
        with torch.device("meta"), SkipInit():
            model = GPTModel(config)
    except (RuntimeError, TypeError):
        raise ValueError(f"{source}: there is no model as large as {config}") from None
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    wrong = sorted(name for name in shapes | weights if name not in weights or weights[name].shape != shapes.get(name))
    if wrong:
        raise ValueError(f"{source}: the weights do not fit the model: {', '.join(wrong[:3])} and {len(wrong)} in all")
    return model


def own_weights(model):
    """Return {name: tensor} of a GPTModel, as every writer takes them: those of its configuration and no other."""
    weights = model.state_dict()
    empty_model(model.config, weights, "a model that wears LoRA or is compiled must be unwrapped first")
    return weights


def build_model(config, weights, source, dtype=torch.float32):
    """Return a GPTModel whose weights are the given tensors, copied only for another dtype; misfits are a ValueError."""
    model = empty_model(config, weights, source)
    weights = {name: weight.to(dtype, memory_format=torch.contiguous_format) for name, weight in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model


def load_model(folder, device="cpu", dtype=torch.float32):
    """Return (model, tokenizer) of a folder of save_model, or of a run's newest checkpoint; else a ValueError."""
    folder = newest_checkpoint(folder) or Path(folder)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokens = settings.pop("tokenizer", None)  # older folders do not say it
        config = GPTConfig(**settings)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no checkpoint of this project, or a damaged one: {error}") from None
    model = build_model(config, read_safetensors(folder / "model.safetensors", device), folder, dtype)
    bpe = folder / "tokenizer.bpe"
    tokenizer = BPETokenizer.load(bpe) if bpe.is_file() else gpt2_tokenizer()
    if tokenizer.n_vocab != config.vocab_size or tokens not in (None, fingerprint(tokenizer)):
        raise ValueError(f"{folder}: tokenizer.bpe is missing, or is not the one that this model was trained with")
    return model, tokenizer


def newest_checkpoint(folder):
    """Return the folder of a run's newest whole checkpoint, or None; one that was copied in part does not count."""
    found = (path.parent for path in Path(folder).glob(f"{STEP}/run.pt"))
    return max((path for path in found if {"config.json", "model.safetensors"} <= {*os.listdir(path)}), default=None)


def drop_others(folder, kept):
    """Remove all checkpoints but one, and what killed writers left; folders that hold anything else are the reader's."""
    for path in filter(Path.is_dir, Path(folder).glob(STEP)):
        if path != kept and set(os.listdir(path)) <= RUN_FILES:
            shutil.rmtree(path, ignore_errors=True)
    remove_leftovers(folder, STEP)


def save_checkpoint(folder, model, tokenizer, optimizer, history, settings):
    """Write all that a run needs to go on to folder/step-…, then drop the checkpoints before it; or an OSError."""
    target = Path(folder) / f"step-{history[-1]['step']:08d}"
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        random_states["mps"] = torch.mps.get_rng_state()
    run = {"optimizer": optimizer.state_dict(), "random": random_states, "history": history, "settings": settings}
    try:
        with replacing(target, RUN_FILES) as temporary:
            save_model(temporary, model, tokenizer)
            torch.save(run, temporary / "run.pt")
    except (RuntimeError, OSError) as error:  # torch.save says RuntimeError when the disk is full
        reason = str(error).splitlines()[0]
        raise OSError(f"could not save the checkpoint {target}: {reason}; the one before it is untouched") from error
    drop_others(folder, target)


def load_checkpoint(folder, model, optimizer, settings):
    """Put a run back as its newest checkpoint has it; return its history. Other settings, or damage, are a ValueError."""
    if not (checkpoint := newest_checkpoint(folder)):
        raise ValueError(f"{folder} holds no checkpoint to resume: run once without --resume")
    try:
        run = torch.load(checkpoint / "run.pt", map_location="cpu", weights_only=True)
        moments, was, history, states = (run[key] for key in ("optimizer", "settings", "history", "random"))
    except Exception as error:
        raise ValueError(f"{checkpoint / 'run.pt'} is damaged or no run's: {error}".splitlines()[0]) from None
    both = sorted(was.keys() & settings.keys() - FREE)  # an older version may say less
    changed = [key for key in both if str(was[key]).removeprefix("torch.") != str(settings[key])]
    if changed:
        made = ", ".join(CAUSES.get(key, f"{key}={{}}").format(was.get(key)) for key in changed)
        raise ValueError(f"the run in {folder} was made with {made}: resume it with the same, or choose another folder")
    weights = load_model(checkpoint)[0].state_dict()
    empty_model(model.config, weights, checkpoint)
    try:
        optimizer.load_state_dict(moments)
        for weight, moment in optimizer.state.items():
            moment["exp_avg"].view_as(weight).add(moment["exp_avg_sq"].view_as(weight))  # else AdamW reads elsewhere
        torch.set_rng_state(states["cpu"])  # of the other devices, those that this machine has
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
        if "mps" in states and torch.backends.mps.is_available():
            torch.mps.set_rng_state(states["mps"])
        model.load_state_dict(weights)
        if history[-1]["step"] < 1:
            raise ValueError("it has made no step")
        return history
    except Exception as error:
        raise ValueError(f"{checkpoint / 'run.pt'} is damaged: {error}".splitlines()[0]) from None
