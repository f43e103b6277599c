import llm_shared.linear
from llm_shared.linear import Linear, linear, way
import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1,), (5,), (64,), (65,), (0,), (1, 1), (3, 1), (2, 7), (8, 1), (64, 1), (65, 1), (0, 1)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_equals_f_linear(dtype, shape, bias, grad):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 24).to(dtype), torch.randn(16, 24).to(dtype)
    b = torch.randn(16).to(dtype) if bias else None
    with torch.set_grad_enabled(grad):
        ours, theirs = linear(x, weight, b), F.linear(x, weight, b)
    assert ours.shape == theirs.shape and ours.dtype == dtype
    assert torch.allclose(
        ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-1 if dtype == torch.bfloat16 else 1e-5
    )


def test_module_is_an_nn_linear():
    layer = Linear(4, 3)
    assert isinstance(layer, torch.nn.Linear)
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_wrong_shapes_are_errors():
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear(torch.zeros(2, 8).bfloat16(), torch.zeros(4, 16).bfloat16())


WIDE, SQUARE, DOWN, HEAD, SMALL = (2304, 768), (768, 768), (768, 3072), (50257, 768), (768, 256)
WAYS = [  # kind of processor, shape of the weight, type, rows: the way
    ("amx", SMALL, torch.float32, {1: "vector", 2: "plain", 7: "plain", 8: "turned", 16: "turned", 17: "plain"}),
    ("amx", HEAD, torch.bfloat16, {1: "vector", 2: "turned", 64: "turned", 65: "plain"}),
    ("amx", SQUARE, torch.float64, {1: "vector", 2: "plain"}),
    ("avx512_bf16", WIDE, torch.float32, {0: "plain", 1: "turned", 7: "turned", 8: "plain"}),
    ("avx512_bf16", HEAD, torch.float32, {1: "turned", 8: "turned", 9: "plain"}),
    ("avx512_bf16", SQUARE, torch.float32, {1: "plain", 2: "turned", 4: "turned", 5: "plain"}),
    ("avx512_bf16", DOWN, torch.float32, {1: "plain", 2: "turned", 4: "turned", 5: "plain"}),
    ("avx512_bf16", SMALL, torch.float32, {1: "plain", 2: "plain", 8: "plain"}),
    ("avx512_bf16", HEAD, torch.bfloat16, dict.fromkeys(range(70), "plain")),
    ("other", HEAD, torch.float32, dict.fromkeys(range(70), "plain")),
    ("other", HEAD, torch.bfloat16, dict.fromkeys(range(70), "plain")),
]


@pytest.mark.parametrize(("processor", "shape", "dtype", "ways"), WAYS)
def test_the_way_belongs_to_the_processor(monkeypatch, processor, shape, dtype, ways):
    monkeypatch.setattr(llm_shared.linear, "PROCESSOR", processor)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    assert {rows: way(rows, weight) for rows in ways} == ways


@pytest.mark.parametrize("processor", ["amx", "avx512_bf16", "other"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_way_gives_the_same_numbers(monkeypatch, processor, bias):
    """The way that was chosen is really taken, whatever machine the test runs on; with gradients it is F.linear."""
    monkeypatch.setattr(llm_shared.linear, "PROCESSOR", processor)
    monkeypatch.setattr(llm_shared.linear, "LARGE", 0)
    torch.manual_seed(0)
    weight, b = torch.randn(48, 16), torch.randn(48) if bias else None
    usual, plain = F.linear, []
    monkeypatch.setattr(F, "linear", lambda *args: plain.append(1) or usual(*args))
    for rows in (1, 2, 4, 7, 8, 9, 17):
        x = torch.randn(rows, 1, 16)
        plain.clear()
        with torch.no_grad():
            ours = linear(x, weight, b)
        assert bool(plain) == (way(rows, weight) == "plain")
        assert ours.is_contiguous() and torch.allclose(ours, usual(x, weight, b), atol=1e-5)
        plain.clear()
        assert torch.equal(linear(x, weight, b), usual(x, weight, b)) and plain


def test_a_choice_does_not_change_from_run_to_run():
    """Seeded generation stays the same: the way follows from shape, type and processor, never from a clock."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 768), torch.randn(2304, 768)
    with torch.no_grad():
        assert len({linear(x, weight).numpy().tobytes() for _ in range(5)}) == 1


def test_one_row_under_autocast():
    """Autocast hands float32 weights a bfloat16 row: F.linear knows what to do."""
    weight, bias, x = torch.randn(3, 8), torch.randn(3), torch.randn(1, 1, 8).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-2)


def test_weights_that_lie_the_other_way_round():
    weight, x = torch.randn(8, 3).T, torch.randn(16, 1, 8)
    with torch.no_grad():
        for rows in (1, 2, 16):
            assert torch.allclose(linear(x[:rows], weight), F.linear(x[:rows], weight), atol=1e-5)
