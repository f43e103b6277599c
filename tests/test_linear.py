from llm_shared.linear import Linear, linear

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


def test_few_rows_are_turned_round(monkeypatch):
    """F.linear is left to gradients, to many rows, and to the few where it is as fast."""
    calls = []
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args) or args[0] @ args[1].T)
    weight = torch.randn(3, 8)

    def leaves_it(rows, dtype):
        calls.clear()
        linear(torch.randn(rows, 1, 8).to(dtype), weight.to(dtype))
        return bool(calls)

    with torch.no_grad():
        assert [leaves_it(rows, torch.bfloat16) for rows in (1, 2, 64, 65)] == [False] * 3 + [True]
        assert [leaves_it(rows, torch.float32) for rows in (1, 2, 7, 8, 16, 17)] == [
            False,
            True,
            True,
            False,
            False,
            True,
        ]
    assert leaves_it(1, torch.bfloat16) and leaves_it(1, torch.float32)


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
