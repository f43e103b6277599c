"""LoRA against peft: same rank, alpha and start, the same outputs and gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from llm_shared.classify import GPTClassifier
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.lora import LoRALinear, adapter, add_lora, load_adapter, merge_lora, save_adapter
from llm_shared.weights import load_pretrained

CONFIG = GPTConfig(vocab_size=97, context_length=16, n_embd=24, n_head=3, n_layer=2)
LAYERS = ["attn.qkv", "ffn.down"]


def with_change(model, seed=0):
    """A model whose B matrices are no longer zeros."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.B.normal_()
    return model


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1), (4, 8), (8, 4.0)])
def test_outputs_and_gradients_equal_pefts(rank, alpha):
    torch.manual_seed(0)
    ours = GPTModel(CONFIG)
    theirs = copy.deepcopy(ours)
    with_change(add_lora(ours, LAYERS, rank, alpha))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["qkv", "down"], lora_dropout=0.0)
    theirs = inject_adapter_in_model(config, theirs)
    pairs = [
        (module, theirs.get_submodule(name)) for name, module in ours.named_modules() if isinstance(module, LoRALinear)
    ]
    assert len(pairs) == 4
    with torch.no_grad():
        for our, their in pairs:
            their.lora_A["default"].weight.copy_(our.A)
            their.lora_B["default"].weight.copy_(our.B)
    ids = torch.randint(97, (3, 16))
    assert torch.allclose(ours(ids), theirs(ids), atol=1e-6)
    for model in (ours, theirs):
        model(ids).square().mean().backward()
    for our, their in pairs:
        assert torch.allclose(our.A.grad, their.lora_A["default"].weight.grad, atol=1e-6)
        assert torch.allclose(our.B.grad, their.lora_B["default"].weight.grad, atol=1e-6)
    trains = [name for name, weight in theirs.named_parameters() if weight.requires_grad]
    assert len(trains) == len(adapter(ours)) and all(name.endswith((".A", ".B")) for name in adapter(ours))


def test_at_first_nothing_changes_and_only_the_adapter_learns():
    model = GPTModel(CONFIG)
    ids = torch.randint(97, (2, 16))
    before, weights = model(ids), {name: weight.clone() for name, weight in model.named_parameters()}
    add_lora(model, LAYERS, 4, 8)
    assert torch.equal(model(ids), before)
    model(ids).sum().backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == set(adapter(model))
    for name, weight in weights.items():
        now = name.replace("qkv", "qkv.linear").replace("down", "down.linear")
        assert torch.equal(model.get_parameter(now), weight)


def test_merged_equals_unmerged_and_comes_back():
    model = with_change(add_lora(GPTModel(CONFIG), LAYERS, 4, 8))
    ids = torch.randint(97, (2, 16))
    weight = model.blocks[0].attn.qkv.linear.weight.clone()
    apart = model(ids)
    for _ in range(2):  # the second time changes nothing
        merge_lora(model)
        assert torch.allclose(model(ids), apart, atol=1e-4)
    assert not torch.allclose(model.blocks[0].attn.qkv.linear.weight, weight)
    merge_lora(model, merged=False)
    assert torch.allclose(model.blocks[0].attn.qkv.linear.weight, weight, atol=1e-6)
    assert torch.allclose(model(ids), apart, atol=1e-5)


def test_the_adapter_file_is_small_and_enough(tmp_path):
    model = GPTClassifier(load_pretrained("mini"))
    add_lora(model, ["attn.qkv", "attn.out_proj", "ffn.up", "ffn.down"], 16, 16)
    model.head.requires_grad_(True)
    with_change(model)
    save_adapter(tmp_path / "adapter.safetensors", model)
    whole = sum(weight.numel() * weight.element_size() for weight in load_pretrained("mini").parameters())
    assert (tmp_path / "adapter.safetensors").stat().st_size < 0.03 * whole
    again = add_lora(
        GPTClassifier(load_pretrained("mini")), ["attn.qkv", "attn.out_proj", "ffn.up", "ffn.down"], 16, 16
    )
    again.head.requires_grad_(True)
    load_adapter(tmp_path / "adapter.safetensors", again)
    ids, lengths = torch.randint(50257, (2, 9)), torch.tensor([9, 4])
    assert torch.equal(again(ids, lengths), model(ids, lengths))


def test_another_adapter_is_refused_by_name(tmp_path):
    save_adapter(tmp_path / "a.safetensors", add_lora(GPTModel(CONFIG), LAYERS, 4, 8))
    for layers, rank in ((LAYERS, 2), (["attn.qkv"], 4), (["ffn.up", *LAYERS], 4)):
        other = add_lora(GPTModel(CONFIG), layers, rank, 8)
        before = {name: weight.clone() for name, weight in adapter(other).items()}
        with pytest.raises(ValueError, match=r"does not fit the model: blocks\.0\."):
            load_adapter(tmp_path / "a.safetensors", other)
        assert all(torch.equal(weight, before[name]) for name, weight in adapter(other).items())


@pytest.mark.parametrize(
    ("layers", "rank", "message"),
    [
        (
            ["attn.query"],
            4,
            r"no linear layer is called 'attn\.query'; there are attn\.out_proj, attn\.qkv, ffn\.down, ffn\.up",
        ),
        (["qk"], 4, "no linear layer is called 'qk'"),
        (LAYERS, 0, "rank must be from 1 to 24 for this layer, not 0"),
        (LAYERS, 25, "rank must be from 1 to 24"),
    ],
)
def test_nonsense_changes_nothing(layers, rank, message):
    model = GPTModel(CONFIG)
    with pytest.raises(ValueError, match=message):
        add_lora(model, layers, rank, 8)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(weight.requires_grad for weight in model.blocks[1].ffn.up.parameters())
