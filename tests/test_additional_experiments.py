"""Chapter 6's additional experiments: each flag changes what it says, sweeps resume, tables are those of the results."""

import importlib.util
import json
import sys

from llm_shared.checkpoint import save_model
from llm_shared.classify import GPTClassifier, classification_loss, pad_batch, predict
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.lora import LoRALinear
from llm_shared.loss import count_targets
from llm_shared.results import with_results
from llm_shared.tokenizer import gpt2_tokenizer
import pandas as pd
import pytest
import torch
from samples import ROOT

FOLDER = ROOT / "ch06/02_bonus_additional-experiments"
SCRIPT = FOLDER / "additional_experiments.py"
TABLE = pd.DataFrame({"text": [f"{'win cash' if i % 2 else 'see you'} {i} times" for i in range(60)]})
TABLE["label"] = [i % 2 for i in range(60)]
ITEMS = [([5, 6, 7], 0), ([8], 1), ([9, 10, 11, 12, 13], 1)]
SHORT = "--epochs 1 --lr 0.001 --max-length 8 --dtype float32 --device cpu".split()


@pytest.fixture(scope="module")
def experiments():
    spec = importlib.util.spec_from_file_location("additional_experiments", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["additional_experiments"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["additional_experiments"]


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    gpt = GPTModel(GPTConfig(vocab_size=50257, context_length=16, n_embd=16, n_head=2, n_layer=3))
    with torch.no_grad():
        for weight in gpt.parameters():
            weight += 0.1 * torch.randn_like(weight)  # louder than fresh weights, so that differences show
    return gpt


@pytest.fixture
def source(gpt, tmp_path):
    save_model(tmp_path / "small", gpt, gpt2_tokenizer())
    return str(tmp_path / "small")


def made(experiments, gpt, flags=""):
    torch.manual_seed(1)
    return experiments.build(gpt, experiments.row_args(1, flags.split())).eval()


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def changed_inputs(model):
    """Return the positions of the third item (real: 0 to 4, padding: 5 to 7) whose token the answer depends on."""
    ids, lengths, _ = pad_batch(ITEMS, width=8)
    found = set()
    for position in range(8):
        other = ids.clone()
        other[2, position] = 99
        if not torch.allclose(model(other, lengths)[2], model(ids, lengths)[2], atol=1e-6):
            found.add(position)
    return found


@torch.no_grad()
def test_read_chooses_the_position(experiments, gpt):
    ids, lengths, _ = pad_batch(ITEMS, width=8)
    hidden = gpt.hidden(ids)
    expected = {
        "last": hidden[[0, 1, 2], [2, 0, 4]],
        "first": hidden[:, 0],
        "end": hidden[:, 7],
        "mean": torch.stack([hidden[i, :n].mean(0) for i, n in enumerate((3, 1, 5))]),
        "max": torch.stack([hidden[i, :n].amax(0) for i, n in enumerate((3, 1, 5))]),
    }
    assert set(expected) == set(experiments.READ)
    for read, vectors in expected.items():
        model = made(experiments, gpt, f"--read {read}")
        assert torch.allclose(model(ids, lengths), model.head(vectors), atol=1e-5), read
    torch.manual_seed(1)
    assert torch.equal(made(experiments, gpt)(ids, lengths), seeded(gpt)(ids, lengths))
    seen = {read: changed_inputs(made(experiments, gpt, f"--read {read}")) for read in expected}
    assert seen["first"] == {0} and seen["end"] == set(range(8))
    assert seen["last"] == seen["mean"] == seen["max"] == set(range(5))


def seeded(gpt):
    torch.manual_seed(1)
    return GPTClassifier(gpt)


def test_layers_choose_what_trains(experiments, gpt):
    def starts(*layers):
        return {name for name, _ in seeded(gpt).named_parameters() if name.startswith(layers)}

    norm_head = ("gpt.ln_f.", "head.")
    assert trained(made(experiments, gpt)) == starts("gpt.blocks.2.", *norm_head)
    by_row = [trained(experiments.build(gpt, experiments.row_args(row))) for row in (6, 7, 8, 9)]
    expected = [starts("head."), starts(*norm_head), starts("gpt.blocks.1.", "gpt.blocks.2.", *norm_head), starts("")]
    assert by_row == expected and len({len(names) for names in expected}) == 4


@torch.no_grad()
def test_lora_rank_trains_narrow_matrices_and_the_head(experiments, gpt):
    for rank in (2, 4):
        model = made(experiments, GPTModel(gpt.config), f"--lora-rank {rank}")
        layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
        assert len(layers) == 3 * 4 and all(len(layer.A) == rank and layer.scale == 1 for layer in layers)
        names = trained(model)
        assert {name.rpartition(".")[2] for name in names if name.startswith("gpt.")} == {"A", "B"}
        assert {name for name in names if not name.startswith("gpt.")} == {"head.weight", "head.bias"}


@torch.no_grad()
def test_random_weights_are_not_the_pretrained_ones(experiments, gpt):
    kept, fresh = made(experiments, gpt), made(experiments, gpt, "--random-weights")
    assert kept.gpt is gpt and fresh.gpt.config == gpt.config
    pairs = zip(gpt.parameters(), fresh.gpt.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def test_pad_and_batch_size_change_the_width(experiments, gpt):
    def batches(flags=""):
        return list(experiments.make_loader(ITEMS, experiments.row_args(1, flags.split()), gpt, 50256))

    assert [ids.shape for ids, _, _ in batches()] == [(3, 5)]
    assert [ids.shape for ids, _, _ in batches("--pad context")] == [(3, 16)]
    alone = batches("--batch-size 1")
    assert sorted(ids.shape for ids, _, _ in alone) == [(1, 1), (1, 3), (1, 5)]
    assert not any((ids == 50256).any() for ids, _, _ in alone)
    answers = {}
    for read in ("last", "end"):
        model = made(experiments, gpt, f"--read {read}")
        answers[read] = [predict(model, batches(f"--pad {pad}"))[0] for pad in ("batch", "context")]
    assert torch.allclose(*answers["last"], atol=1e-5) and not torch.allclose(*answers["end"], atol=1e-3)


def test_accumulate_makes_one_step_of_many_batches(experiments, source, monkeypatch):
    asked = []
    original = experiments.train

    def train(*args, **options):
        asked.append((args[4], options["accumulate"]))
        return original(*args, **options)

    monkeypatch.setattr(experiments, "train", train)
    for row in (1, 15, 16):
        experiments.run_once(experiments.row_args(row, ["--model", source, *SHORT]), TABLE[:30], 0)
    assert asked == [(2, 1), (20, 1), (1, 16)]  # 20 messages


@torch.no_grad()
def test_without_the_causal_mask_attention_looks_right_but_not_at_padding(experiments, gpt):
    assert changed_inputs(made(experiments, gpt, "--read first")) == {0}
    assert changed_inputs(made(experiments, gpt, "--no-causal --read first")) == set(range(5))
    assert changed_inputs(made(experiments, gpt, "--no-causal")) == set(range(5))
    model = made(experiments, gpt, "--no-causal")
    alone = torch.cat([model(*pad_batch([item])[:2]) for item in ITEMS])
    assert torch.allclose(model(*pad_batch(ITEMS, width=16)[:2]), alone, atol=1e-5)


@torch.no_grad()
def test_filler_label_decides_which_targets_count(experiments, gpt):
    def batch(row):
        return next(iter(experiments.make_loader(ITEMS, experiments.row_args(row), gpt, 50256, seed=0)))

    model = made(experiments, gpt)
    base, ignored, counted = batch(1), batch(20), batch(21)
    assert [len(labels) for _, _, labels in (base, ignored, counted)] == [3, 19, 19]
    assert [count_targets(labels) for _, _, labels in (base, ignored, counted)] == [3, 3, 19]
    losses = [classification_loss(model, *one).item() for one in (base, ignored, counted)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] > losses[0] + 1
    assert len(next(iter(experiments.make_loader(ITEMS, experiments.row_args(21), gpt, 50256)))[2]) == 3  # when testing


def test_rows_differ_and_given_flags_win(experiments):
    rows = [vars(experiments.row_args(row)) for row in range(1, len(experiments.ROWS) + 1)]
    assert len({str(row) for row in rows}) == len(rows) >= 19
    base = vars(experiments.make_parser().parse_args([]))
    assert {name for name in base if rows[0][name] != base[name]} == {"device", "dtype"}
    assert experiments.row_args(6, ["--layers", "all"]).layers == ["all"]


def test_an_interrupted_sweep_resumes_and_runs_nothing_twice(experiments, tmp_path):
    done, path = [], tmp_path / "results.json"

    def pretend(args, table, seed):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((args.read, seed))
        return {"seconds": 1.0, "trained": 7, "train": 1.0, "val": 0.5, "test": len(done) / 10}

    def sweep(*flags):
        flags = [*SHORT, "--seeds", "2", "--out", str(path), *flags]
        return experiments.sweep({row: experiments.row_args(row, flags) for row in (1, 2)}, pretend)

    with pytest.raises(KeyboardInterrupt):
        sweep()
    assert [len(runs) for runs in json.loads(path.read_text())["rows"].values()] == [2, 1]
    assert list(tmp_path.iterdir()) == [path]
    done.append("the interruption is over")
    found = sweep()
    assert done == [("last", 0), ("first", 0), ("last", 1), "the interruption is over", ("first", 1)]
    assert json.loads(path.read_text()) == found == sweep() and len(done) == 5
    settings = {"model": "mini", "data": "bundled", "device": "cpu", "dtype": "torch.float32"}
    assert found["settings"] == settings | {"epochs": 1, "lr": 1e-3, "max_length": 8} and len(found["machines"]) == 1
    with pytest.raises(ValueError, match="was made with .*'epochs': 1.*not .*'epochs': 2"):
        sweep("--epochs", "2")


def test_a_real_sweep_from_the_command_line(experiments, script_here, source, tmp_path):
    TABLE.to_csv(tmp_path / "messages.csv", index=False)
    options = f"--sweep --row 1 2 --seeds 2 --epochs 8 --lr 0.02 --max-length 8 --model {source}".split()
    command = [SCRIPT, *options, "--data", tmp_path / "messages.csv", "--out", tmp_path / "out.json"]
    first = script_here(*command)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert first.stdout.count("seed") == 4 and experiments.results_table(found, 0) in first.stdout
    assert all(run["test"] > 0.9 for run in found["rows"]["1"].values())
    again = script_here(*command)
    assert again.returncode == 0 and "seed" not in again.stdout
    (tmp_path / "out.json").write_text("nonsense")
    assert "out.json is no file of a sweep" in script_here(*command).stderr


def test_the_tables_are_those_of_the_results(experiments):
    found = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert set(found["rows"]) == {str(row) for row in range(1, len(experiments.ROWS) + 1)}
    assert all(len(runs) >= 3 for runs in found["rows"].values())
    for language, name in enumerate(("README.en.md", "README.md")):
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert with_results(text, experiments.results_table(found, language)) == text


def test_the_text_says_what_the_results_say():
    rows = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["rows"]

    def apart(row, other):
        return [round(100 * (rows[row][seed]["test"] - rows[other][seed]["test"]), 1) for seed in "012"]

    assert all(-27 < points <= -7 for row in "267" for points in apart(row, "1"))
    assert apart("10", "9") == [-5.3, -2.6, -3.1] and apart("11", "9") == [-4.4, -1.8, -1.8]
    assert apart("12", "1") == [8.4, 3.5, 1.3] and apart("12", "9") == [3.1, 3.5, 0.4]
    same_sign = {row for row in rows if min(apart(row, "1")) > 0 or max(apart(row, "1")) < 0}
    assert same_sign == {"2", "6", "7", "12", "8", "15", "19"}
    assert apart("13", "1") == apart("20", "1") == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--row 99", "there is no row 99; there are 1 to"),
        ("--lora-rank 99", "rank must be from 1 to 16 for this layer, not 99"),
        ("--layers gpt.blocks.-9", "no layer is called 'gpt.blocks.-9'"),
        ("--layers nowhere head", "no layer is called 'nowhere'; there are all, gpt, gpt.tok_emb"),
        ("--sweep --read first", "a sweep runs the rows as they are"),
        ("--model nowhere", "nowhere holds no checkpoint"),
    ],
)
def test_bad_input_is_one_line(script_here, source, tmp_path, options, message):
    process = script_here(SCRIPT, "--model", source, "--out", tmp_path / "out.json", *options.split())
    assert process.returncode == 1 and message in process.stderr, process.stderr
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
