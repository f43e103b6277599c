import copy

from llm_shared.data import create_dataloader
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.loss import next_token_loss
from llm_shared.schedule import warmup_cosine
from llm_shared.training import endless, make_optimizer, train
import numpy as np
import pytest
import torch
import torch.nn.functional as F

CONFIG = GPTConfig(vocab_size=40, context_length=8, n_embd=16, n_head=2, n_layer=2)
TOKENS = np.tile(np.arange(40, dtype=np.uint16), 20)


def setup(seed=0, batch_size=4, config=CONFIG, lr=1e-2, dtype=torch.float32):
    torch.manual_seed(seed)
    model = GPTModel(config).to(dtype)
    loader = create_dataloader(TOKENS, batch_size, 8, 3, seed=seed)
    val_loader = create_dataloader(TOKENS[:100], batch_size, 8, 8, shuffle=False)
    return model, make_optimizer(model, lr), loader, val_loader


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns():
    model, optimizer, loader, val_loader = setup()
    history = train(model, optimizer, loader, val_loader, 80, eval_every=25)
    assert [now["step"] for now in history] == [25, 50, 75, 80]
    assert history[-1]["val_loss"] < 0.5 < 2 < history[0]["train_loss"]


def test_equals_a_plain_loop():
    model, optimizer, loader, val_loader = setup(dtype=torch.double)
    plain = copy.deepcopy(model)
    decayed = [w for w in plain.parameters() if w.ndim > 1]
    rest = [w for w in plain.parameters() if w.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    plain_optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False)
    rate = warmup_cosine(1e-2, 3, 20)
    batches = endless(loader)
    for step in range(20):
        x, y = next(batches)
        for group in plain_optimizer.param_groups:
            group["lr"] = rate(step)
        plain_optimizer.zero_grad()
        F.cross_entropy(plain(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()
    train(model, optimizer, loader, val_loader, 20, schedule=rate)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_looking_changes_nothing(dropout):
    config = GPTConfig(**{**CONFIG.__dict__, "dropout": dropout})
    models = []
    for eval_every in (1, 3, 100):
        model, optimizer, loader, val_loader = setup(config=config)
        train(model, optimizer, loader, val_loader, 12, eval_every=eval_every)
        models.append(model)
    assert same(models[0], models[1]) and same(models[1], models[2])


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulating_equals_one_large_batch(accumulate):
    small, optimizer, loader, val_loader = setup(batch_size=2, dtype=torch.double)
    large, large_optimizer, large_loader, _ = setup(batch_size=2 * accumulate, dtype=torch.double)
    train(small, optimizer, loader, val_loader, 5, accumulate=accumulate)
    train(large, large_optimizer, large_loader, val_loader, 5)
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_ragged_batches_are_weighed_by_tokens():
    model, _, _, _ = setup()
    x, y = torch.randint(40, (2, 3, 8))
    (next_token_loss(model, x, y) / y.numel()).backward()
    expected = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    class Loader(list):
        sampler = type("Sampler", (), {"epoch": 0})()

    grads = []
    optimizer.register_step_pre_hook(lambda *_: grads.extend(w.grad.clone() for w in model.parameters()))
    train(model, optimizer, Loader([(x[:2], y[:2]), (x[2:], y[2:])]), [(x, y)], 1, accumulate=2, clip=None)
    for ours, theirs in zip(grads, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_endless_goes_to_any_batch():
    _, _, loader, _ = setup()
    all_batches = endless(loader)
    first = [next(all_batches)[0] for _ in range(2 * len(loader) + 5)]
    for start in (0, 1, len(loader) - 1, len(loader), 2 * len(loader) + 3):
        assert torch.equal(next(endless(loader, start))[0], first[start])


def test_only_matrices_decay():
    model, optimizer, _, _ = setup()
    decayed, rest = optimizer.param_groups
    assert {w.ndim for w in decayed["params"]} == {2} and {w.ndim for w in rest["params"]} == {1}
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    model.tok_emb.weight.requires_grad_(False)
    assert len(make_optimizer(model, 1e-3).param_groups[0]["params"]) == len(decayed["params"]) - 1


def test_divergence_is_said():
    model, optimizer, loader, val_loader = setup(lr=1e30)
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        train(model, optimizer, loader, val_loader, 50, clip=None)


def test_weights_that_broke_are_not_saved():
    """The last step's loss was still a number; what it did to the weights shows at the evaluation only."""
    model, optimizer, loader, val_loader = setup(lr=1e38)
    seen = []
    with pytest.raises(
        FloatingPointError, match="validation loss became (nan|inf) at step 1: try a lower learning rate"
    ):
        train(model, optimizer, loader, val_loader, 1, on_eval=seen.append)
    assert seen == []


def test_bfloat16_trains_float32_weights():
    model, optimizer, loader, val_loader = setup()
    history = train(model, optimizer, loader, val_loader, 80, dtype=torch.bfloat16)
    assert history[-1]["val_loss"] < 0.5
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_training_goes_through_torch_compile():
    model, optimizer, loader, val_loader = setup()
    eager, eager_optimizer, _, _ = setup()
    torch._dynamo.reset()
    train(model, optimizer, loader, val_loader, 3, loss_fn=torch.compile(next_token_loss, backend="aot_eager"))
    train(eager, eager_optimizer, loader, val_loader, 3)
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
