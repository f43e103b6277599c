"""The classifiers: counted words, our GPT, and an encoder; each gives its probabilities for the test set."""

import os

from llm_shared.classify import (
    GPTClassifier,
    classification_loss,
    create_message_loader,
    encode_messages,
    predict,
    scores,
)
from llm_shared.gpt import GPTModel
from llm_shared.hardware import pick_dtype
from llm_shared.schedule import warmup_cosine
from llm_shared.training import make_optimizer, train
from llm_shared.weights import open_model
import torch
from torch import nn


def fit_words(model, train_set, val_set, test_set):
    """Count words and pairs of words, fit a classifier on them; return its probabilities for the test set."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = (TfidfVectorizer if model == "tfidf" else CountVectorizer)(ngram_range=(1, 2))
    x, x_val, x_test = (
        vectorizer.fit_transform(train_set.text),
        *map(vectorizer.transform, (val_set.text, test_set.text)),
    )
    fits = [LogisticRegression(C=c, max_iter=1000) for c in (0.1, 1, 10, 100)]  # 1 / C: how much weights are held back
    fits = [DummyClassifier(strategy="prior")] if model == "dummy" else fits
    best = max((fit.fit(x, train_set.label) for fit in fits), key=lambda fit: fit.score(x_val, val_set.label))
    return torch.tensor(best.predict_proba(x_test))


class EncoderClassifier(nn.Module):
    """A classifier of transformers, called as GPTClassifier is: ids (B, T), lengths (B) → logits (B, 2)."""

    def __init__(self, name):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

        super().__init__()
        logging.set_verbosity_error()
        offline = os.environ.get("LLM_OFFLINE") == "1"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline)
            self.encoder = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=2, use_safetensors=True, dtype=torch.float32, local_files_only=offline
            )
        except (OSError, ValueError) as error:
            raise OSError(f"no encoder {name!r}: {str(error).strip().splitlines()[0]}") from None

    def encode(self, table, max_length):
        encoded = self.tokenizer(table.text.tolist(), truncation=True, max_length=max_length)["input_ids"]
        return list(zip(encoded, table.label.tolist(), strict=True))

    def forward(self, ids, lengths):
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        ids = ids.where(real, self.tokenizer.pad_token_id)
        return self.encoder(input_ids=ids, attention_mask=real.long()).logits


def build(args):
    """Return (model, table → list of (ids, label)), and check that the model can read so many tokens."""
    if args.model == "encoder":
        model = EncoderClassifier(args.encoder)
        context, encode = model.tokenizer.model_max_length, model.encode
    else:
        gpt, tokenizer = open_model(args.gpt)
        model = GPTClassifier(GPTModel(gpt.config) if args.random_weights else gpt)
        context = gpt.config.context_length

        def encode(table, max_length):
            return encode_messages(table, tokenizer, max_length)

    if args.max_length > context:
        raise ValueError(f"--max-length {args.max_length}: this model reads at most {context} tokens")
    return model, lambda table: encode(table, args.max_length)


def fine_tune(args, tables, seed, device):
    """Train all weights; of the epochs, the one with the best validation accuracy classifies the test set."""
    torch.manual_seed(seed)
    model, encode = build(args)
    model, dtype = model.to(device), pick_dtype(args.dtype, device)
    accuracies, best = [], {}
    loader, val_loader, test_loader = (
        create_message_loader(encode(table), args.batch_size, i == 0, seed) for i, table in enumerate(tables)
    )

    def keep_best(_):
        accuracies.append(scores(*predict(model, val_loader, dtype))["accuracy"])
        if accuracies[-1] == max(accuracies):
            best.update({name: weight.clone() for name, weight in model.state_dict().items()})

    steps = args.epochs * len(loader)
    train(
        model, make_optimizer(model, args.lr), loader, val_loader, steps, loss_fn=classification_loss, dtype=dtype,
        schedule=warmup_cosine(args.lr, steps // 10, steps), eval_every=len(loader), on_eval=keep_best,
    )  # fmt: skip
    model.load_state_dict(best)
    return predict(model, test_loader, dtype)[0]
