"""Is a film review positive? One command line for every model; each run joins results.json, --table prints it."""

import argparse
import json
import platform
import shlex
import statistics
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from llm_shared.classify import scores
from llm_shared.cli import positive_float, positive_int, run
from llm_shared.hardware import keep_freed_memory, pick_device
from llm_shared.resources import replacing
from llm_shared.results import write_results
import torch
from models import fine_tune, fit_words
from reviews import READERS

HERE = Path(__file__).parent
MODELS = {  # the name in the table: English, Vietnamese
    "dummy": ("most frequent label", "nhãn hay gặp nhất"),
    "bow": ("bag of words, logistic regression", "túi từ, hồi quy logistic"),
    "tfidf": ("TF-IDF, logistic regression", "TF-IDF, hồi quy logistic"),
    "gpt": ("our GPT", "GPT của ta"),
    "encoder": ("encoder", "bộ mã hóa"),
}
MAX_LENGTH = {"snippets": 64, "imdb": 256}
COMMANDS = [f"--data snippets --model {model}" for model in ("dummy", "bow", "tfidf", "gpt", "gpt --random-weights")]
COMMANDS += [f"--data imdb --model {model}" for model in ("dummy", "bow", "tfidf", "gpt")]
COMMANDS += [
    f"--data {data} --model {model}"
    for data in ("snippets", "imdb")
    for model in ('gpt --gpt "gpt2-small (124M)"', "encoder", "encoder --encoder roberta-base")
]


def parse_args(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="snippets", help="snippets (bundled) or imdb (84 MB, downloaded once)")
    parser.add_argument("--model", default="tfidf", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--gpt", default="mini", help="for --model gpt: a pretrained model, or a checkpoint's folder")
    parser.add_argument("--random-weights", action="store_true", help="the same GPT without its pretraining")
    parser.add_argument("--encoder", default="distilbert-base-uncased", help="for --model encoder: a name or a folder")
    parser.add_argument("--train-texts", type=positive_int, help="train on so many texts only; None: all")
    parser.add_argument(
        "--max-length", type=positive_int, help="tokens read of a text; None: 64 for snippets, 256 for imdb"
    )
    parser.add_argument(
        "--epochs", type=positive_int, default=2, help="passes over the training texts; the best one is kept"
    )
    parser.add_argument("--batch-size", type=positive_int, default=32, help="texts per step")
    parser.add_argument(
        "--lr", type=positive_float, help="peak learning rate; None: 5e-4 for mini, 5e-5 for larger models"
    )
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs, where training is random")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="type of the products")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", help="where each run is noted")
    parser.add_argument("--table", action="store_true", help="run nothing; write the table of both READMEs")
    args = parser.parse_args(words)
    for option, known in (("data", READERS), ("model", MODELS)):
        if getattr(args, option) not in known:
            raise ValueError(f"--{option} {getattr(args, option)}: there are {', '.join(known)}")
    args.max_length = MAX_LENGTH[args.data] if args.max_length is None else args.max_length
    args.lr = (5e-4 if args.model == "gpt" and args.gpt == "mini" else 5e-5) if args.lr is None else args.lr
    return args


def settings(args):
    """Return what decides the numbers of a run, apart from its seed."""
    names = ["data", "model", "train_texts"]
    if args.model in ("gpt", "encoder"):
        names += [args.model, "max_length", "epochs", "batch_size", "lr"] + ["random_weights"] * (args.model == "gpt")
    return {name: getattr(args, name) for name in names}


def read_results(path):
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def versions(args):
    packages = ["torch"] + {"gpt": [], "encoder": ["transformers"]}.get(args.model, ["scikit-learn"])
    return {"Python": platform.python_version()} | {name: version(name) for name in packages}


def measure(args):
    """Run what --seeds asks for and results.json lacks; note each run at once."""
    asked, device, random = settings(args), pick_device(args.device), args.model in ("gpt", "encoder")
    seeds = range(args.seeds if random else 1)
    done = {run["seed"]: run for run in read_results(args.results) if run["settings"] == asked}
    tables = READERS[args.data]() if set(seeds) - set(done) else None
    for seed in seeds:
        if seed not in done:
            started, parts = time.process_time(), [tables[0][: args.train_texts], *tables[1:]]
            probs = fine_tune(args, parts, seed, device) if random else fit_words(args.model, *parts)
            found = scores(probs, torch.tensor(tables[2].label.tolist()))
            done[seed] = {
                "settings": asked, "seed": seed, "texts": [len(part) for part in parts],
                "accuracy": found["accuracy"], "confusion": found["confusion"],
                "cpu_seconds": round(time.process_time() - started, 1), "threads": torch.get_num_threads(),
                "device": device.type, "versions": versions(args),
            }  # fmt: skip
            with replacing(args.results) as temporary:
                lines = ",\n".join(map(json.dumps, [*read_results(args.results), done[seed]]))
                temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(
            f"seed {seed}: test accuracy {done[seed]['accuracy']:.1%}, {done[seed]['cpu_seconds']:.0f} s of CPU time",
            flush=True,
        )


def table(runs, language):
    """Return the results as Markdown; language: 0 English, 1 Vietnamese. A row without a run shows no number."""
    head = (
        "| options of `sentiment.py` | model | test accuracy | CPU seconds per run |",
        "| đối số của `sentiment.py` | mô hình | độ chính xác, tập kiểm tra | số giây CPU mỗi lần chạy |",
    )
    lines = [head[language], "|---|---|---:|---:|"]
    for command in COMMANDS:
        args = parse_args(shlex.split(command))
        found = [run for run in runs if run["settings"] == settings(args)]
        accuracy, seconds = (("not measured here", "chưa đo ở đây")[language], "–")
        if found:
            numbers = [run["accuracy"] for run in found]
            accuracy = f"{statistics.mean(numbers):.1%}"
            accuracy += f" ± {statistics.stdev(numbers):.1%}" if len(numbers) > 1 else ""
            accuracy = accuracy.replace(".", ",") if language else accuracy
            seconds = f"{statistics.median(run['cpu_seconds'] for run in found):.0f}"
        lines.append(f"| `{command}` | {MODELS[args.model][language]} | {accuracy} | {seconds} |")
    machines = {
        f"{run['device']}, {run['threads']} thread(s), " + ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        for run in runs
    }
    return "\n".join([*lines, "", *(f"- {machine}" for machine in sorted(machines))])


def main():
    args = parse_args()
    if not args.table:
        keep_freed_memory()
        return measure(args)
    runs = read_results(args.results)
    write_results(HERE, partial(table, runs))
    print(table(runs, 0))


if __name__ == "__main__":
    run(main)
