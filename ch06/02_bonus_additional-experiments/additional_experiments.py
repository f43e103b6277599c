"""Change one thing about the spam classifier at a time; each row is one question. Without arguments: the base row, 3 seeds."""

import argparse
import json
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

from llm_shared.classify import (
    GPTClassifier,
    balance,
    classification_loss,
    create_message_loader,
    encode_messages,
    pad_batch,
    predict,
    read_messages,
    scores,
    split,
    train_only,
)
from llm_shared.cli import natural, positive_float, positive_int, run
from llm_shared.gpt import GPTModel
from llm_shared.hardware import keep_freed_memory, pick_device, pick_dtype
from llm_shared.lora import adapter, add_lora
from llm_shared.loss import IGNORED
from llm_shared.resources import replacing
from llm_shared.results import write_results
from llm_shared.schedule import warmup_cosine
from llm_shared.training import make_optimizer, train
from llm_shared.weights import open_model
import torch

RESULTS = Path(__file__).with_name("results.json")
LORA_LAYERS = ("attn.qkv", "attn.out_proj", "ffn.up", "ffn.down")
ROWS = [  # the flags that make a row out of the base row, English, Vietnamese
    ("", "base: last real token read, last block trained", "gốc: đọc token thật cuối cùng, dạy khối cuối"),
    ("--read first", "first token", "token đầu tiên"),
    ("--read end", "last position, padding or not", "vị trí cuối, kể cả khi đó là token đệm"),
    ("--read mean", "mean of the real positions", "trung bình các vị trí thật"),
    ("--read max", "maximum over the real positions", "giá trị lớn nhất trên các vị trí thật"),
    ("--layers head", "only the head", "chỉ lớp phân loại"),
    ("--layers gpt.ln_f head", "last LayerNorm and head", "LayerNorm cuối và lớp phân loại"),
    ("--layers gpt.blocks.-2 gpt.blocks.-1 gpt.ln_f head", "last two blocks", "hai khối cuối"),
    ("--layers all", "all weights", "mọi trọng số"),
    ("--lora-rank 8", "LoRA, rank 8", "LoRA, hạng 8"),
    ("--lora-rank 16", "LoRA, rank 16", "LoRA, hạng 16"),
    ("--random-weights --layers all", "random weights, all trained", "trọng số ngẫu nhiên, dạy tất cả"),
    ("--pad context", "padded to the whole context", "đệm đến hết ngữ cảnh"),
    ("--pad context --read end", "the same, last position read", "như trên, đọc vị trí cuối"),
    ("--batch-size 1", "no padding: one message a step", "không đệm: mỗi bước một tin"),
    ("--batch-size 1 --accumulate 16", "no padding, 16 gradients a step", "không đệm, cộng dồn 16 gradient"),
    ("--no-causal", "no causal mask", "bỏ mặt nạ nhân quả"),
    ("--no-causal --read first", "no causal mask, first token", "bỏ mặt nạ nhân quả, token đầu tiên"),
    ("--no-causal --layers all", "no causal mask, all weights", "bỏ mặt nạ nhân quả, dạy mọi trọng số"),
    ("--filler 16", "16 filler rows a batch, ignored", "thêm 16 dòng lấp chỗ mỗi batch, không tính"),
    ("--filler 16 --filler-label 0", "the same, counted as no spam", "như trên, tính là tin thường"),
]
READ = {  # hidden (B, T, n_embd), real (B, T) → (B, n_embd)
    "last": lambda hidden, real: hidden[torch.arange(len(hidden)), real.sum(1) - 1],
    "first": lambda hidden, real: hidden[:, 0],
    "end": lambda hidden, real: hidden[:, -1],  # padding or not
    "mean": lambda hidden, real: (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True),
    "max": lambda hidden, real: hidden.masked_fill(~real[..., None], -torch.inf).amax(1),
}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--row", type=positive_int, nargs="+", help="rows of the README's table: their flags, then those given"
    )
    parser.add_argument("--sweep", action="store_true", help="run rows × seeds; each run goes to --out, or is there")
    flag = parser.add_argument_group("questions").add_argument
    flag("--read", choices=READ, default="last", help="the position that the head reads")
    flag("--layers", nargs="+", default=["gpt.blocks.-1", "gpt.ln_f", "head"], help="what trains; all is all")
    flag("--lora-rank", type=positive_int, help="train low-rank changes (alpha = rank) and the head instead")
    flag("--random-weights", action="store_true", help="start without pretraining")
    flag("--pad", choices=["batch", "context"], default="batch", help="to the batch's longest message, or the context")
    flag("--batch-size", type=positive_int, default=16, help="messages in a batch; with 1 nothing is padded")
    flag("--accumulate", type=positive_int, default=1, help="batches whose gradients make one step")
    flag("--no-causal", action="store_true", help="let attention look both ways")
    flag("--filler", type=natural, default=0, help="rows without a message at the end of each training batch")
    flag("--filler-label", type=int, choices=[IGNORED, 0, 1], default=IGNORED, help=f"{IGNORED} does not count")
    flag = parser.add_argument_group("the same for all rows").add_argument
    flag("--model", default="mini", help='such as "gpt2-small (124M)", or the folder of a checkpoint')
    flag("--data", default="bundled", help="bundled, uci, or a CSV file with the columns text and label")
    flag("--epochs", type=positive_int, default=3, help="passes over the training messages")
    flag("--lr", type=positive_float, default=5e-4, help="peak learning rate")
    flag("--max-length", type=positive_int, default=64, help="tokens read of a message")
    flag("--seeds", type=positive_int, default=3, help="runs of a row, each with its own split, order and head")
    flag("--device", default="auto", help="auto, cuda, mps or cpu")
    flag("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="type of the products")
    flag("--out", default=RESULTS, type=Path, help="where a sweep keeps its runs")
    return parser


def row_args(row, given=()):
    """Return the arguments of a row; flags given beside it come later, and win."""
    if not 1 <= row <= len(ROWS):
        raise ValueError(f"there is no row {row}; there are 1 to {len(ROWS)}")
    args = make_parser().parse_args([*ROWS[row - 1][0].split(), *given])
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    return args


class Variant(GPTClassifier):
    """A classifier that may read other positions than the last real one, and whose attention may look both ways."""

    def __init__(self, gpt, read, causal):
        super().__init__(gpt)
        self.read, self.causal = READ[read], causal

    def hidden(self, ids, real):
        if self.causal:
            return self.gpt.hidden(ids)
        x = self.gpt.dropout(self.gpt.tok_emb(ids) + self.gpt.pos_emb.weight[: ids.shape[1]])
        for block in self.gpt.blocks:
            x = block(x, mask=real[:, None, None, :])  # every position looks at all real ones
        return self.gpt.ln_f(x)

    def forward(self, ids, lengths):
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, T)
        return self.head(self.read(self.hidden(ids, real), real))


def build(gpt, args):
    """Return a row's classifier, in which only those weights ask for gradients that the row trains."""
    model = Variant(GPTModel(gpt.config) if args.random_weights else gpt, args.read, not args.no_causal)
    if args.lora_rank is None:
        from_the_end = {f"gpt.blocks.{i - len(gpt.blocks)}": f"gpt.blocks.{i}" for i in range(len(gpt.blocks))}
        train_only(model, [from_the_end.get(layer, layer) for layer in args.layers])
    else:
        add_lora(model, LORA_LAYERS, args.lora_rank, alpha=args.lora_rank)
        model.head.requires_grad_(True)
    return model


def make_loader(items, args, gpt, pad_id, seed=None):
    """Return a loader with a row's batches; with a seed it is the training one: shuffled, and with filler rows."""
    loader = create_message_loader(items, args.batch_size, seed is not None, seed or 0)
    width = gpt.config.context_length if args.pad == "context" else None
    filler = [([pad_id], args.filler_label)] * (args.filler if seed is not None else 0)
    loader.collate_fn = lambda rows: pad_batch(rows + filler, pad_id, width)
    return loader


def run_once(args, table, seed):
    """Train and test one row; return its accuracies, the processor's seconds in training, and the weights trained."""
    torch.manual_seed(seed)
    gpt, tokenizer = open_model(args.model)
    model = build(gpt, args).to(args.device)
    parts = [encode_messages(part, tokenizer, args.max_length) for part in split(balance(table, seed), seed)]
    loader = make_loader(parts[0], args, gpt, tokenizer.eot_token, seed)
    plain = [make_loader(part, args, gpt, tokenizer.eot_token) for part in parts]
    steps = max(1, args.epochs * len(loader) // args.accumulate)
    started = time.process_time()  # other programs do not count
    train(
        model, make_optimizer(model, args.lr), loader, plain[1], steps, loss_fn=classification_loss,
        schedule=warmup_cosine(args.lr, steps // 10, steps), accumulate=args.accumulate, dtype=args.dtype,
        eval_every=steps,
    )  # fmt: skip
    seconds = round(time.process_time() - started, 2)
    result = {"seconds": seconds, "trained": sum(weight.numel() for weight in adapter(model).values())}
    accuracies = [scores(*predict(model, loader, args.dtype))["accuracy"] for loader in plain]
    return result | dict(zip(("train", "val", "test"), accuracies, strict=True))


def sweep(rows, run_row=run_once):
    """Run what --out does not hold yet of {row: arguments} × seeds; write --out after each run, and return all of it."""
    args = next(iter(rows.values()))
    settings = {name: getattr(args, name) for name in ("model", "data", "epochs", "lr", "max_length")}
    settings |= {"device": str(args.device), "dtype": str(args.dtype)}
    found = {"settings": settings, "machines": [], "rows": {}}
    if args.out.exists():
        try:
            found = json.loads(args.out.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{args.out} is no file of a sweep: {error}") from None
        if found["settings"] != settings:
            raise ValueError(f"{args.out} was made with {found['settings']}, not {settings}: give another --out")
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    table = read_messages(args.data)
    for seed, row in [(seed, row) for seed in range(args.seeds) for row in rows]:
        runs = found["rows"].setdefault(str(row), {})
        if str(seed) in runs:
            continue
        runs[str(seed)] = run_row(rows[row], table, seed)
        found["machines"] = sorted({*found["machines"], machine})
        print(f"row {row}, {ROWS[row - 1][1]}, seed {seed}: {runs[str(seed)]}", flush=True)
        with replacing(args.out) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def percent(values, sign=""):
    return f"{100 * statistics.mean(values):{sign}.1f} ± {100 * statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def results_table(found, language):
    """Return the results as Markdown; language: 0 English, 1 Vietnamese."""
    titles = (
        "row | what changes | flags | weights trained | train % | validation % | test % | test − row 1 | time",
        "dòng | điều thay đổi | cờ | trọng số được dạy | huấn luyện % | kiểm định % | kiểm tra % | so với dòng 1 | thời gian",
    )
    lines = [f"| {titles[language]} |", "|---:|---|---|---:|---:|---:|---:|---:|---:|"]
    base = found["rows"].get("1", {})
    for row, runs in sorted(found["rows"].items(), key=lambda item: int(item[0])):
        flags, *names = ROWS[int(row) - 1]
        cells = [f"{next(iter(runs.values()))['trained']:,}"]
        cells += [percent([run[part] for run in runs.values()]) for part in ("train", "val", "test")]
        pairs = [(runs[seed], base[seed]) for seed in runs if seed in base]  # the same messages
        cells.append(percent([mine["test"] - its["test"] for mine, its in pairs], "+") if pairs and flags else "")
        cells.append(
            f"× {statistics.mean(mine['seconds'] / its['seconds'] for mine, its in pairs):.1f}" if pairs else ""
        )
        cells = [cell.translate(str.maketrans(",.", ".,")) if language else cell for cell in cells]
        lines.append(f"| {row} | {names[language]} | {flags and f'`{flags}`'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    keep_freed_memory()
    args, base = make_parser().parse_args(), make_parser().parse_args([])
    rows = args.row or (range(1, len(ROWS) + 1) if args.sweep else [1])
    rows = {row: row_args(row, sys.argv[1:]) for row in rows}
    if not args.sweep:
        table = read_messages(args.data)
        for row, options in rows.items():
            runs = []
            for seed in range(args.seeds):
                runs.append(run_once(options, table, seed))
                print(f"row {row}, seed {seed}: {runs[-1]}", flush=True)
            print(f"mean test accuracy of {args.seeds} seeds: {percent([result['test'] for result in runs])} %")
        return
    questions = "read layers lora_rank random_weights pad batch_size accumulate no_causal filler filler_label".split()
    if any(getattr(args, name) != getattr(base, name) for name in questions):
        raise ValueError("a sweep runs the rows as they are: leave out the flags of the questions")
    found = sweep(rows)
    print(results_table(found, 0))
    if args.out == RESULTS:
        write_results(RESULTS.parent, partial(results_table, found))


if __name__ == "__main__":
    run(main)
