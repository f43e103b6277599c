import importlib.util
import json
import math
import re
import runpy
import subprocess
import sys
from dataclasses import replace

from llm_shared import weights
from llm_shared.checkpoint import read_safetensors, save_model
from llm_shared.gpt import CONFIGS, GPTConfig, GPTModel
from llm_shared.hf_format import to_gpt2
from llm_shared.resources import fetch
from llm_shared.results import with_results
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
from llm_shared.training import make_optimizer
from llm_shared.weights import load_pretrained, unique, unpack_int8
import pytest
import torch
from parity import hf_model
from safetensors.torch import load_file, save_file
from samples import ROOT, files_of_at_most, one_line

BOOKS = ROOT / "ch05/03_bonus_pretraining_on_gutenberg"
SMALL = GPTConfig(vocab_size=97, context_length=16, n_embd=24, n_head=3, n_layer=2)


def script(name):
    """The module in the books' folder, imported."""
    spec = importlib.util.spec_from_file_location(name, BOOKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpt2_file(tmp_path, monkeypatch):
    """A small GPT-2 as transformers writes it, under a name of its own."""
    torch.manual_seed(0)
    hf = hf_model(SMALL)
    hf.save_pretrained(tmp_path)
    monkeypatch.setitem(CONFIGS, "small", SMALL)
    monkeypatch.setattr(weights, "fetch", lambda name: tmp_path / name.removeprefix("small/"))
    return hf, tmp_path / "model.safetensors"


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("prefix", [True, False])
def test_gpt2_equals_transformers(gpt2_file, prefix):
    hf, path = gpt2_file
    if not prefix:  # as OpenAI's file on the hub has it, causal masks included
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        save_file(tensors, path)
    ids = torch.randint(97, (3, 16))
    with torch.no_grad():
        assert torch.allclose(load_pretrained("small")(ids), hf(ids).logits, atol=1e-5)


def drop(tensors):
    del tensors["transformer.h.1.mlp.c_fc.weight"]


def add(tensors):
    tensors["transformer.h.2.ln_1.weight"] = torch.ones(24)


def cut(tensors):
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:8]


@pytest.mark.parametrize(
    ("change", "named"), [(drop, "blocks.1.ffn.up.weight"), (add, "blocks.2.ln_1.weight"), (cut, "pos_emb.weight")]
)
def test_what_does_not_fit_is_refused_by_name(gpt2_file, change, named):
    rewrite(gpt2_file[1], change)
    with pytest.raises(ValueError, match=re.escape(named)):
        load_pretrained("small")


def test_a_file_cut_short_is_refused(gpt2_file):
    path = gpt2_file[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_pretrained("small")


def test_a_lying_header_is_refused_with_one_line(gpt2_file):
    """The eight bytes before the header give its length; the header gives each tensor's type, shape and place."""
    path = gpt2_file[1]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = "transformer.wpe.weight"
    lies = [
        {"shape": [16, 25]},
        {"shape": [2**40, 2**40]},
        {"dtype": "F16"},
        {"dtype": "X9"},
        {"data_offsets": [0, 2**62]},
    ]
    lies += [
        {"data_offsets": [header[name]["data_offsets"][0] + 4, header[name]["data_offsets"][1] + 4]},
        {"shape": [-1]},
    ]
    files = [json.dumps(header | {name: header[name] | lie}).encode() for lie in lies]
    whole = [len(text).to_bytes(8, "little") + text + data for text in files]
    for lie in [
        *whole,
        b"\xff" * 8 + content[8:],
        (length + 10).to_bytes(8, "little") + content[8:],
        content[:8],
        b"",
        b"PK",
    ]:
        path.write_bytes(lie)
        with pytest.raises(ValueError, match="is damaged or no safetensors file") as caught:
            load_pretrained("small")
        assert "\n" not in str(caught.value)


def test_the_file_itself_is_the_model_and_stays_as_it_is(gpt2_file):
    """Float32 weights on a CPU are the mapped file: nothing is copied, training changes a private copy."""
    path = gpt2_file[1]
    before, model = path.read_bytes(), load_pretrained("small")
    weight = model.blocks[0].ffn.up.weight
    assert not weight.is_contiguous() and weight.T.is_contiguous()  # as the file has it
    optimizer = make_optimizer(model, 0.1)
    model(torch.arange(16)[None]).logsumexp(-1).sum().backward()
    optimizer.step()
    assert path.read_bytes() == before
    assert not torch.equal(weight, load_pretrained("small").blocks[0].ffn.up.weight)
    for dtype in (torch.bfloat16, torch.float16):
        assert all(weight.is_contiguous() for weight in load_pretrained("small", dtype=dtype).parameters())


def test_training_the_mapped_weights_equals_training_copies(gpt2_file):
    mapped, copied = load_pretrained("small"), GPTModel(SMALL)
    copied.load_state_dict(mapped.state_dict())
    loader = [(torch.randint(97, (2, 16)), torch.randint(97, (2, 16))) for _ in range(3)]
    for model in (mapped, copied):
        optimizer = make_optimizer(model, 1e-2)
        for inputs, targets in loader:
            loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(mapped.parameters(), copied.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_loading_draws_no_random_numbers(gpt2_file):
    state = torch.get_rng_state()
    load_pretrained("small")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_loading_takes_the_models_own_memory_and_no_more(tmp_path, monkeypatch):
    """124M in a fresh process, first token included; tests/bench/load.py measures 355M, against transformers."""
    config = CONFIGS["gpt2-small (124M)"]
    weights = to_gpt2({name: torch.zeros_like(weight) for name, weight in GPTModel(config).state_dict().items()})
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    monkeypatch.syspath_prepend(ROOT / "tests/bench")
    program = runpy.run_path(str(ROOT / "tests/bench/load.py"))
    imports, load = program["CONTENDERS"]["ours"]
    source = program["PROGRAM"].format(imports=imports, load=load)
    command = [sys.executable, "-c", source, tmp_path, "gpt2-small (124M)"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.95 < json.loads(result.stdout)[2] <= 1.05


def test_int8_rows_come_back_within_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(50, 32) * torch.logspace(-4, 2, 50)[:, None]
    weight[7] = 0
    packed, scale = script("pack_mini").pack_int8(weight)
    back = unpack_int8({"w": packed, "w.scale": scale, "b": weight[0]})
    assert set(back) == {"w", "b"} and torch.equal(back["b"], weight[0])
    assert ((back["w"] - weight).abs() <= 0.5001 * scale).all()


PACKED = {"w": torch.ones(5, 3, dtype=torch.int8), "w.scale": torch.ones(5, 1), "b": torch.ones(3)}


@pytest.mark.parametrize(
    "change",
    [
        {"w": None}, {"w.scale": None}, {"w.scale": torch.ones(1, 3)}, {"w.scale": torch.tensor(2.0)},
        {"w.scale": torch.ones(5)}, {"w.scale": torch.ones(4, 1)}, {"w.scale": torch.ones(5, 1, 1)}, {"w": torch.ones(5, 3)},
        {"b.scale": torch.ones(3, 1)}, {"more": torch.ones(2, 2, dtype=torch.int8)}, {"w": torch.tensor(1, dtype=torch.int8)},
    ],
)  # fmt: skip
def test_a_matrix_and_its_scale_belong_together(change):
    weights = {name: weight for name, weight in (PACKED | change).items() if weight is not None}
    with pytest.raises(ValueError, match="an int8 matrix and its scale"):
        unpack_int8(weights)
    assert torch.equal(unpack_int8(PACKED)["w"], torch.ones(5, 3))


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><title>502 Bad Gateway</title>", b"version https://git-lfs\n", None]
)
def test_a_foreign_file_in_the_cache_is_one_line(gpt2_file, content):
    gpt2_file[1].unlink()
    if content is not None:
        gpt2_file[1].write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is damaged or no safetensors file") as caught:
        load_pretrained("small")
    assert "\n" not in str(caught.value)


def test_a_name_that_comes_twice_is_not_lost():
    assert unique([("a", 1), ("b", 2)]) == {"a": 1, "b": 2} and unique([]) == {}
    with pytest.raises(ValueError, match="the name 'a' comes twice"):
        unique([("b", 1), ("a", 1), ("a", 1)])


OWN = BPETokenizer.train("the sea, the whale and the ship; the sea and the whale. " * 9, 280)
TEXT = "the ship and the whale, the sea. " * 200


@pytest.fixture
def own_run(tmp_path):
    """A model with a tokenizer of its own, as gpt_train.py leaves it, and a text."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=OWN.n_vocab, context_length=256, n_embd=8, n_head=2, n_layer=1))
    save_model(tmp_path / "run", model, OWN)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return model, tmp_path


def test_a_run_is_measured_with_its_own_tokenizer(own_run, script_here):
    """Once GPT-2's was taken: ids beyond the vocabulary, or, in a larger one, a perplexity of nothing."""
    model, folder = own_run
    done = script_here(BOOKS / "evaluate_mini.py", "--model", folder / "run", "--text", folder / "text.txt")
    assert done.returncode == 0, done.stderr
    tokens = OWN.encode_ordinary(TEXT)
    n = (len(tokens) - 1) // 256 * 256
    ids = torch.tensor(tokens[: n + 1])
    with torch.no_grad():
        logits = model(ids[:-1].view(-1, 256)).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[1:]).item()
    assert f"{len(tokens):,} tokens of text.txt" in done.stdout
    found = re.search(r"loss ([\d.]+) nats per token, perplexity ([\d.]+), ([\d.]+) bits per byte", done.stdout)
    right = (loss, math.exp(loss), loss / math.log(2) * len(tokens) / len(TEXT))
    assert [float(number) for number in found.groups()] == pytest.approx(right, rel=0.01)


def test_only_a_mini_is_packed_as_mini(own_run, script_here, monkeypatch):
    folder = own_run[1]
    monkeypatch.setitem(CONFIGS, "mini", replace(CONFIGS["mini"], n_embd=8, n_head=2, n_layer=1))
    (folder / "mini.safetensors").write_text("old")
    pack = BOOKS / "pack_mini.py", "--out", folder / "mini.safetensors", "--checkpoint"
    one_line(script_here(*pack, folder / "run"), "is no mini")
    merges = [*BPETokenizer.load(fetch("gpt2/vocab.bpe")).merges[:-1], (50000, 50001)]
    mini = GPTModel(CONFIGS["mini"])
    save_model(folder / "other", mini, BPETokenizer(merges))  # as many tokens as GPT-2's, one of them another
    one_line(script_here(*pack, folder / "other"), "is no mini")
    assert (folder / "mini.safetensors").read_text() == "old"
    save_model(folder / "good", mini, gpt2_tokenizer())
    with files_of_at_most(100_000):
        one_line(script_here(*pack, folder / "good"), "could not write")
    assert (folder / "mini.safetensors").read_text() == "old"
    assert script_here(*pack, folder / "good").returncode == 0
    assert unpack_int8(read_safetensors(folder / "mini.safetensors"))["tok_emb.weight"].shape == (50257, 8)


def test_mini_is_small_and_not_random():
    assert fetch("mini/model.safetensors").stat().st_size <= 25_000_000
    model = load_pretrained("mini", dtype=torch.bfloat16)
    assert model.config == CONFIGS["mini"] and model.tok_emb.weight.dtype == torch.bfloat16


def test_the_datasheets_perplexity_is_reproduced(tmp_path):
    prepare = [sys.executable, BOOKS / "prepare_books.py", "--out", tmp_path]
    subprocess.run(prepare, check=True, capture_output=True)
    stated = float(re.search(r"perplexity \*\*([\d.]+)\*\*", (BOOKS / "README.en.md").read_text(encoding="utf-8"))[1])
    measure = script("evaluate_mini").measure
    found = math.exp(measure(load_pretrained("mini"), gpt2_tokenizer(), tmp_path / "held-out.txt")[0])
    assert found == pytest.approx(stated, rel=0.01)


def test_books_are_cleaned_and_split(tmp_path):
    prepare = script("prepare_books")
    book = tmp_path / "a.txt"
    body = "\n\n".join(f"Paragraph {i}\nof a  book." for i in range(200))
    book.write_text(
        f"licence\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n{body}\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\nmore",
        encoding="utf-8",
    )
    text = prepare.read_book(book)
    assert text.startswith("Paragraph 0 of a book.\n\nParagraph 1") and text.endswith("Paragraph 199 of a book.")
    beginning, end = prepare.split_book(text)
    assert beginning + "\n\n" + end == text and 0.01 < len(end) / len(text) < 0.04
    book.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        prepare.read_book(book)


def test_no_books_is_said(tmp_path):
    command = [sys.executable, BOOKS / "prepare_books.py", "--books", tmp_path, "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "holds no .txt" in result.stderr and not (tmp_path / "out").exists()


def test_the_table_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(BOOKS)
    compare = script("compare_with_random")
    found = json.loads((BOOKS / "results.json").read_text(encoding="utf-8"))
    for language, name in enumerate(("README.en.md", "README.md")):
        text = (BOOKS / name).read_text(encoding="utf-8")
        assert with_results(text, compare.table(found, language)) == text
