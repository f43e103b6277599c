"""ch05 · Checkpoints: a model on the disk, and a training run that can be stopped at any moment and goes on exactly."""

import hashlib
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.resources import remove_leftovers, replacing, write_safetensors
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.bpe"}
RUN_FILES = MODEL_FILES | {"run.pt"}
FREE = {"data", "tokenizer", "compile"}  # settings that may change: what comes of the first two is in "tokens"
CAUSES = {
    "dtype": "dtype={0} (add --dtype {0})",
    "steps": "steps={} (the learning rate depends on them: for more steps begin another run)",
    "tokens": "other tokens (the text or the tokenizer has changed)",
}
PROBE = "Don't stop: 12345 của chúng  ta's\n\n\t½ 日本 'S, ok? IT'S café IT'LL I'VE\n\n\n\nx"  # tokenizers cut it differently


def fingerprint(tokenizer):
    """Return a hash of what a tokenizer does: the bytes of each id, and how it cuts a text with everything in it."""
    digest = hashlib.sha256(str(tokenizer.encode_ordinary(PROBE)).encode())
    for i in range(tokenizer.n_vocab):
        digest.update(repr(tokenizer.decode_bytes([i])).encode())
    return digest.hexdigest()[:16]


def save_model(folder, model, tokenizer):
    """Write config.json, model.safetensors and, unless the tokenizer is GPT-2's, tokenizer.bpe: all of it, or nothing.

    It replaces what it wrote there before. A folder that holds something else, a tokenizer that does not fit or
    cannot be written, and a model whose weights have names of their own (LoRA, torch.compile) are a ValueError.
    """
    folder, weights = Path(folder), own_weights(model)
    if not isinstance(tokenizer, BPETokenizer) and (
        tokenizer.n_vocab != gpt2_tokenizer().n_vocab or fingerprint(tokenizer) != fingerprint(gpt2_tokenizer())
    ):
        raise ValueError("only GPT-2's own tokenizer or a BPETokenizer can be saved: make one with the same merges")
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}")
    with replacing(folder, MODEL_FILES) as temporary:
        write_safetensors(temporary / "model.safetensors", weights)
        config = asdict(model.config) | {"tokenizer": fingerprint(tokenizer)}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if isinstance(tokenizer, BPETokenizer):
            tokenizer.save(temporary / "tokenizer.bpe")


def read_safetensors(path, device="cpu"):
    """Return {name: tensor} of a safetensors file; on a CPU it is mapped: its bytes are read when they are used.

    A file that is missing, damaged, or lies about its content, is a ValueError.
    """
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


class SkipInit(TorchFunctionMode):
    """Within it no random weights are drawn: of tensors without memory there is nothing to fill."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return function(*args, **kwargs)


def empty_model(config, weights, source):
    """Return a GPTModel without memory, into which weights {name: tensor} fit.

    Missing names, others and other shapes are a ValueError that names source and them.
    """
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
    """Return a GPTModel whose weights are the given tensors themselves, copied only for another dtype; weights: {name: tensor}.

    Weights that do not fit the configuration are a ValueError that names source and them; nothing is loaded in part.
    """
    model = empty_model(config, weights, source)
    weights = {name: weight.to(dtype, memory_format=torch.contiguous_format) for name, weight in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model


def load_model(folder, device="cpu", dtype=torch.float32):
    """Return (model, tokenizer) from a folder that `save_model` wrote, or from the newest checkpoint in it.

    A folder that holds none, a damaged one, and one whose tokenizer is not the model's are a ValueError.
    """
    folder = newest_checkpoint(folder) or Path(folder)
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
        raise ValueError(f"{folder} holds no checkpoint: a folder with config.json and model.safetensors is asked for")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokens = settings.pop("tokenizer", None)  # older folders do not say it
        config = GPTConfig(**settings)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is damaged or not a checkpoint of this project: {error}") from None
    model = build_model(config, read_safetensors(folder / "model.safetensors", device), folder, dtype)
    bpe = folder / "tokenizer.bpe"
    tokenizer = BPETokenizer.load(bpe) if bpe.is_file() else gpt2_tokenizer()
    if tokenizer.n_vocab != config.vocab_size or tokens not in (None, fingerprint(tokenizer)):
        raise ValueError(f"{folder}: tokenizer.bpe is missing, or is not the one that this model was trained with")
    return model, tokenizer


def checkpoints(folder):
    """Return the folders in a run's folder that have a checkpoint's name, by step."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch("step-[0-9]{8,}", path.name)]
    return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(folder):
    """Return the folder of a run's newest whole checkpoint, or None; one that was copied in part does not count."""
    needed = ("config.json", "model.safetensors", "run.pt")
    whole = [path for path in checkpoints(folder) if all((path / name).is_file() for name in needed)]
    return whole[-1] if whole else None


def drop_others(folder, kept):
    """Remove all checkpoints but one, and what killed writers left; folders that hold anything else are the reader's."""
    for path in checkpoints(folder):
        if path != kept and {file.name for file in path.iterdir()} <= RUN_FILES:
            shutil.rmtree(path, ignore_errors=True)
    remove_leftovers(folder, "step-[0-9]{8,}")


def plain_values(value):
    """Return value with Python's own numbers for numpy's, and texts for paths: else run.pt could not be read back."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain_values, value))
    return value.item() if isinstance(value, np.generic) else str(value) if isinstance(value, Path) else value


def save_checkpoint(folder, model, tokenizer, optimizer, history, settings):
    """Write all that the run needs to go on to folder/step-…, then drop the checkpoints before it.

    The new one gets its name when it is whole: whatever happens, one whole checkpoint stays. Step, schedule and
    the loader's position all follow from the history's last step. A failed write is an OSError.
    """
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
            torch.save(plain_values(run), temporary / "run.pt")
    except (RuntimeError, OSError) as error:  # torch.save says RuntimeError when the disk is full
        reason = str(error).splitlines()[0]
        raise OSError(f"could not save the checkpoint {target}: {reason}; the one before it is untouched") from error
    drop_others(folder, target)


def load_checkpoint(folder, model, optimizer, settings, unsaid=None):
    """Put the run in folder back as it was when its newest checkpoint was written; return its history.

    ValueError if there is none, if it is damaged, or made with other settings; unsaid: those that it may not name.
    """
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{folder} holds no checkpoint to resume: run once without --resume")
    try:
        run = torch.load(checkpoint / "run.pt", map_location="cpu", weights_only=True)
        was, history, states = (unsaid or {}) | run["settings"], run["history"], run["random"]
        moments = run["optimizer"]
    except Exception as error:
        raise ValueError(f"{checkpoint / 'run.pt'} is damaged or no run's: {error}".splitlines()[0]) from None
    changed = [key for key in sorted((was | settings).keys() - FREE) if (was.get(key) or 0) != (settings.get(key) or 0)]
    made = [CAUSES.get(key, f"{key}={{}}").format(str(was.get(key)).removeprefix("torch.")) for key in changed]
    if made:
        made = ", ".join(made)
        raise ValueError(f"the run in {folder} was made with {made}: resume it with the same, or choose another folder")
    weights = load_model(checkpoint)[0].state_dict()
    empty_model(model.config, weights, checkpoint)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    torch.set_rng_state(states["cpu"])  # of the other devices, those that this machine has
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
    return history
