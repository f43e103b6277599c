"""What a GPU does otherwise, tested without one: fake CUDA tensors under CUDA's real autocast; its rules on a CPU; a GPU if there is one."""

from llm_shared.checkpoint import SkipInit, load_checkpoint, load_model, save_checkpoint
from llm_shared.classify import GPTClassifier, classification_loss, create_message_loader, predict
from llm_shared.data import create_dataloader
from llm_shared.generate import generate
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.lora import adapter, add_lora
from llm_shared.loss import HeadCrossEntropy, autocast, evaluate, next_token_loss
from llm_shared.tokenizer import BPETokenizer
from llm_shared.training import make_optimizer, train
import pytest
import torch
from samples import MIXED_TEXT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
CONFIG = GPTConfig(vocab_size=300, context_length=8, n_embd=16, n_head=2, n_layer=2, dropout=0.1)
DTYPES = [torch.float32, torch.bfloat16]
CUDA = torch.device("cuda")


class WithoutDriver(TorchFunctionMode):
    """What Python asks of a CUDA tensor through the driver, which is not there: x[…] by other operations, numbers as `answer`."""

    answer = 1

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor:
            return torch.zeros(len(args[0]), dtype=torch.long, **kwargs)
        if function is torch.Tensor.__getitem__:
            return part(*args)
        if function is torch.Tensor.__setitem__:
            x, index, value = args
            return aten.copy_(
                part(x, index), value if isinstance(value, torch.Tensor) else aten.full_like(part(x, index), value)
            )
        if function in (torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.item):
            return {torch.Tensor.__bool__: bool, torch.Tensor.__int__: int, torch.Tensor.item: float}[function](
                self.answer
            )
        if function is torch.Tensor.copy_:
            return aten.copy_(*args)
        if function is torch.Tensor.tolist:
            return [self.answer] * len(args[0])
        return function(*args, **kwargs)


def part(x, index):
    """x[index] for slices, numbers, None and tensors of places."""
    tensors, dim = [], 0
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, int):
            x = aten.select(x, dim, i)
            continue
        if isinstance(i, torch.Tensor):
            tensors.append(i)
        elif i is None:
            x = aten.unsqueeze(x, dim)
        else:
            x = aten.slice(x, dim, i.start, i.stop, i.step or 1)
        dim += 1
    return aten.index(x, tensors) if tensors else x


@pytest.fixture
def fake_gpu(monkeypatch):
    """Within it torch believes in a CUDA GPU; autograd's engine alone cannot be deceived, so gradients are off."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    with FakeTensorMode(), WithoutDriver() as mode, torch.no_grad():
        yield mode


def fake_model(dtype=torch.float32):
    torch.set_default_dtype(dtype)
    try:
        with CUDA, SkipInit():
            return GPTModel(CONFIG).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("some", [True, False])
def test_fake_head_cross_entropy(fake_gpu, dtype, some):
    model, fake_gpu.answer = fake_model(), some  # both ways at every "if any" or "if not all"
    hidden, targets = torch.empty(20, 16, device=CUDA), torch.zeros(20, dtype=torch.long, device=CUDA)

    class Context:
        needs_input_grad = (True, True, False)

        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    context = Context()
    with autocast(CUDA, dtype):
        assert torch.is_autocast_enabled("cuda") == (dtype == torch.bfloat16)
        total = HeadCrossEntropy.forward(context, hidden, model.tok_emb.weight, targets)
    grad_hidden, grad_weight, none = HeadCrossEntropy.backward(context, total)
    assert (total.device.type, total.shape, total.dtype, none) == ("cuda", (), torch.float32, None)
    for grad, of in ((grad_hidden, hidden), (grad_weight, model.tok_emb.weight)):
        assert (grad.device.type, grad.shape, grad.dtype) == ("cuda", of.shape, of.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_forward_evaluate_predict(fake_gpu, dtype):
    model = fake_model()
    loader = create_dataloader(list(range(100)), 2, 8, stride=8)
    with autocast(CUDA, dtype):
        assert next_token_loss(model, *(torch.zeros(2, 8, dtype=torch.long, device=CUDA),) * 2).dtype == torch.float32
    assert evaluate(model, loader, dtype=dtype) > 0


MESSAGES = [([1, 2, 3], 0), ([4], 1), ([5, 6], 1), ([7, 8, 9, 10], 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora", [False, True])
def test_fake_classifier(fake_gpu, dtype, lora):
    with CUDA, SkipInit():
        model = GPTClassifier(fake_model())
        if lora:
            add_lora(model, ["attn.qkv", "ffn.up"], 2, 4)
    if lora:
        assert {weight.device.type for weight in adapter(model).values()} == {"cuda"}
    model.requires_grad_(False)
    ids, ones = (torch.ones(shape, dtype=torch.long, device=CUDA) for shape in ((2, 5), (2,)))
    with autocast(CUDA, dtype):
        loss = classification_loss(model, ids, ones, ones)
    probs, _ = predict(model, [(ids, ones, ones)], dtype)
    assert (loss.device.type, loss.dtype) == ("cuda", torch.float32)
    assert (probs.device.type, probs.shape, probs.dtype) == ("cpu", (2, 2), torch.float32)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}, {"use_cache": False}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_generate(fake_gpu, dtype, options):
    rows = generate(fake_model(dtype), [[1, 2], [3]], 12, eot_id=0, **options)
    assert [len(row) for row in rows] == [14, 13]


FLOAT32 = ["layer_norm", "log", "exp", "pow.Tensor_Scalar", "rsqrt", "reciprocal", "cross_entropy_loss", "nll_loss_nd"]
FLOAT32_UNLESS_TOLD = ["softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "prod"]


@pytest.fixture
def autocast_of_a_gpu():
    """CPU tensors under a GPU's rules: its autocast runs these operations in float32, a CPU's leaves most of them alone."""
    library = torch.library.Library("aten", "IMPL")

    def rule(name, unless_told):
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")

        def kernel(*args, **kwargs):
            with torch.autocast("cpu", enabled=False):
                if unless_told:
                    told = any(isinstance(a, torch.dtype) for a in args)
                    return operation(*args, **({} if told else {"dtype": torch.float32}) | kwargs)
                return operation(
                    *(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args), **kwargs
                )

        library.impl(name, kernel, "AutocastCPU")

    for name in FLOAT32:
        rule(name, False)
    for name in FLOAT32_UNLESS_TOLD:
        rule(name, True)
    yield
    library._destroy()


@pytest.mark.filterwarnings("ignore:Warning only once")
def test_training_under_the_autocast_of_a_gpu(autocast_of_a_gpu):
    torch.manual_seed(0)
    model, loader = GPTModel(CONFIG), create_dataloader(list(range(100)), 2, 8, stride=8)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert torch.ones(2, dtype=torch.bfloat16).softmax(-1).dtype == torch.float32  # the rules are in force
    history = train(model, make_optimizer(model, 1e-2), loader, loader, 60, eval_every=30, dtype=torch.bfloat16)
    assert history[-1]["val_loss"] < history[0]["val_loss"] < 6
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


@pytest.mark.filterwarnings("ignore:Warning only once")
@pytest.mark.parametrize("lora", [False, True])
def test_classifying_under_the_autocast_of_a_gpu(autocast_of_a_gpu, lora):
    torch.manual_seed(0)
    model, loader = GPTClassifier(GPTModel(CONFIG)), create_message_loader(MESSAGES, 2, pad_id=0)
    if lora:
        add_lora(model, ["attn.qkv", "ffn.up"], 2, 4)
        model.head.requires_grad_(True)
    optimizer, options = make_optimizer(model, 1e-2), {"loss_fn": classification_loss, "dtype": torch.bfloat16}
    history = train(model, optimizer, loader, loader, 40, eval_every=20, **options)
    assert history[-1]["val_loss"] < 0.6
    probs, labels = predict(model, loader, torch.bfloat16)
    assert probs.dtype == torch.float32 and torch.allclose(probs.sum(1), torch.ones(4)) and len(labels) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["cpu", "cuda", "mps"])
def test_a_run_on_each_device_of_this_machine(name, dtype, tmp_path):
    """The same small run, the CPU's too, whose checkpoint then opens on a CPU."""
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        pytest.skip(f"this machine has no {name}")
    device, tokenizer = torch.device(name), BPETokenizer.train(MIXED_TEXT, CONFIG.vocab_size)
    torch.manual_seed(0)
    model = GPTModel(CONFIG).to(device)
    optimizer, loader = make_optimizer(model, 1e-2), create_dataloader(list(range(100)), 2, 8, stride=8)
    history = train(model, optimizer, loader, loader, 20, eval_every=10, dtype=dtype)
    assert history[-1]["val_loss"] < history[0]["val_loss"] < 6
    assert evaluate(model, loader, dtype=dtype) == pytest.approx(history[-1]["val_loss"], rel=1e-3)
    assert len(generate(model, [[1, 2], [3]], 12, temperature=1.0, top_k=5)[1]) == 13
    save_checkpoint(tmp_path, model, tokenizer, optimizer, history, {})
    again = GPTModel(CONFIG)
    assert load_checkpoint(tmp_path, again, make_optimizer(again, 1e-2), {}) == history
    for one in (again, load_model(tmp_path)[0]):
        pairs = zip(one.parameters(), model.parameters(), strict=True)
        assert all(our.is_cpu and torch.equal(our, their.cpu()) for our, their in pairs)
    assert evaluate(again, loader, dtype=dtype) == pytest.approx(history[-1]["val_loss"], rel=2e-2)
