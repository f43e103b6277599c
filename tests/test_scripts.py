import re

import pytest
import torch
from samples import one_line

from llm_shared.checkpoint import newest_checkpoint, save_model
from llm_shared.classify import load_classifier
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer

TRAIN = "ch05/01_main-chapter-code/gpt_train.py"
GENERATE = "ch05/01_main-chapter-code/gpt_generate.py"
CLASSIFY = "ch06/01_main-chapter-code/gpt_class_finetune.py"
GPT = "ch04/01_main-chapter-code/gpt.py"
VIETNAMESE = "Điều 1. Bộ luật này quy định quyền và nghĩa vụ của cá nhân trong các quan hệ dân sự.\n" * 40
TINY = "--context-length 16 --batch-size 2 --steps 3 --eval-every 2 --warmup-steps 1".split()


@pytest.fixture
def vietnamese(tmp_path):
    (tmp_path / "luật.txt").write_text(VIETNAMESE, encoding="utf-8")
    BPETokenizer.train(VIETNAMESE, 300).save(tmp_path / "luật.bpe")
    return ["--data", tmp_path / "luật.txt", "--tokenizer", tmp_path / "luật.bpe"]


def test_train_resume_and_generate_on_vietnamese(script, script_here, vietnamese, tmp_path):
    out = tmp_path / "thư mục chạy"
    done = script(TRAIN, *TINY, *vietnamese, "--out", out)
    assert done.returncode == 0, done.stderr
    for said in ("validation loss", "unigram entropy", "bits per byte", "step 2:", "step 3:"):
        assert said in done.stdout
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert newest_checkpoint(out).name == "step-00000003"

    one_line(script_here(TRAIN, *TINY, *vietnamese, "--out", out), "already holds a run")
    assert script(TRAIN, *TINY, *vietnamese, "--out", out, "--resume").returncode == 0
    other = script_here(TRAIN, *TINY, *vietnamese, "--out", out, "--resume", "--lr", "0.5")
    one_line(other, "was made with lr=0.002")
    assert newest_checkpoint(out).name == "step-00000003"

    write = [GENERATE, "--checkpoint", out, "--prompt", "Điều 2", "--max-new-tokens", 40, "--temperature", 1]
    first, again = script(*write), script_here(*write)
    assert first.returncode == 0 and first.stdout.startswith("Điều 2")
    assert first.stdout == again.stdout != script_here(*write, "--seed", 7).stdout
    assert script_here(*write, "--prompt", "").returncode == 0
    one_line(script_here(*write, "--top-k", 0), "top_k at least 1")


def test_training_gets_well_under_the_unigram_entropy(script_here, moby_dick, tmp_path):
    """The main job in small: less text, fewer tokens, fewer steps."""
    (tmp_path / "book.txt").write_text(moby_dick[:300_000], encoding="utf-8")
    BPETokenizer.train(moby_dick[:300_000], 1000).save(tmp_path / "book.bpe")
    paths = ["--data", tmp_path / "book.txt", "--tokenizer", tmp_path / "book.bpe", "--out", tmp_path / "out"]
    done = script_here(TRAIN, *paths, *"--context-length 64 --batch-size 8 --steps 120 --dtype float32".split())
    assert done.returncode == 0, done.stderr
    loss = float(re.search(r"validation loss ([\d.]+) nats", done.stdout)[1])
    entropy = float(re.search(r"at best ([\d.]+) nats", done.stdout)[1])
    assert 2 < loss < entropy - 0.4


def test_gpt_script(script):
    done = script(GPT, "--model", "mini", "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert "16,090,880 weights" in done.stdout


@pytest.mark.parametrize("path", [TRAIN, GENERATE, GPT])
def test_help_shows_defaults(script_here, path):
    done = script_here(path, "--help")
    assert done.returncode == 0 and "(default: " in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file is called"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text"),
        (b"GIF\x00\x01", "holds zero bytes"),
        (b"too short", "too few for one window of 16"),
    ],
)
def test_bad_data(script_here, tmp_path, content, message):
    data, out = tmp_path / "data.txt", tmp_path / "out"
    if content is not None:
        data.write_bytes(content)
    one_line(script_here(TRAIN, *TINY, "--data", data, "--out", out), message)
    assert newest_checkpoint(out) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "steps must be at least 1"),
        ("--batch-size -3", "batch_size must be at least 1"),
        ("--lr 0", "lr must be a number above 0"),
        ("--lr nan", "lr must be a number above 0"),
        ("--val-fraction 1", "val_fraction must lie between 0 and 1"),
        ("--dropout 1.5", "dropout must be"),
        ("--context-length -1", "context_length must be"),
        ("--warmup-steps -1", "warmup_steps must be at least 0"),
        ("--device abacus", "device 'abacus' is not on this machine"),
        ("--resume", "holds no checkpoint to resume"),
        ("--tokenizer nowhere.bpe", "nowhere.bpe"),
        ("--lr 1e30 --clip 1e30 --warmup-steps 0 --steps 50", "try a lower learning rate"),
    ],
)
def test_nonsense(script_here, vietnamese, tmp_path, options, message):
    one_line(script_here(TRAIN, *TINY, *vietnamese, *options.split(), "--out", tmp_path / "out"), message)


def test_unwritable_output(script_here, vietnamese, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(script_here(TRAIN, *TINY, *vietnamese, "--out", tmp_path / "file" / "out"), "file")


def test_generate_from_what_is_no_checkpoint(script_here, tmp_path):
    one_line(script_here(GENERATE, "--checkpoint", tmp_path), "holds no checkpoint")
    torch.manual_seed(0)
    save_model(
        tmp_path / "model", GPTModel(GPTConfig(vocab_size=50257, n_embd=8, n_head=1, n_layer=1)), gpt2_tokenizer()
    )
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    one_line(script_here(GENERATE, "--checkpoint", tmp_path / "model"), "damaged")
    weights.write_bytes(b"hello")
    one_line(script_here(GENERATE, "--checkpoint", tmp_path / "model"), "damaged")


def test_classifier_script(script, tmp_path, small_checkpoint):
    rows = [f'"{"Win cash" if i % 2 else "See you"}, {i}",{i % 2}' for i in range(60)]
    (tmp_path / "messages.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    out = tmp_path / "out" / "spam.safetensors"
    options = [
        "--model",
        small_checkpoint,
        "--data",
        tmp_path / "messages.csv",
        "--out",
        out,
        "--seeds",
        2,
        "--lr",
        0.003,
    ]
    process = script(CLASSIFY, *map(str, options), "--message", "Win cash, 99")
    assert process.returncode == 0, process.stderr
    assert (
        "mean test accuracy of 2 seeds: 100.0% (TF-IDF" in process.stdout
        and "'Win cash, 99': spam with" in process.stdout
    )
    assert load_classifier(out).head.out_features == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.csv"], "No such file"),
        (["--layers", "gpt.blocks.9"], "no layer is called 'gpt.blocks.9'; there are all, gpt.tok_emb"),
        (["--message", "spam " * 20_000], "tokens; from 1 to 32 can be read: shorten it"),
        (["--model", "nowhere"], "nowhere holds no checkpoint"),
        (["--device", "cuda:7"], "device 'cuda:7' is not on this machine"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_classifier_script_and_bad_input(script_here, tmp_path, small_checkpoint, options, message):
    out = tmp_path / "spam.safetensors"
    one_line(script_here(CLASSIFY, "--model", small_checkpoint, "--out", str(out), "--seeds", "1", *options), message)
    assert not out.exists()
