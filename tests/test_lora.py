"""LoRA against peft: same rank, alpha and start, the same outputs and gradients."""

import copy
import math
import pickle
import warnings
from dataclasses import replace

from llm_shared.checkpoint import load_model, save_model
from llm_shared.classify import GPTClassifier, load_classifier, save_classifier, train_only
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.hf_format import export_hf, load_hf
from llm_shared.lora import LoRALinear, adapter, add_lora, load_adapter, merge_lora, save_adapter, unwrap_lora
from llm_shared.tokenizer import BPETokenizer
from llm_shared.weights import load_pretrained
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import save_file
from samples import MIXED_TEXT
from torch.utils.checkpoint import checkpoint

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
        with torch.no_grad():
            assert torch.allclose(model(ids), apart, atol=1e-4)
    assert not torch.allclose(model.blocks[0].attn.qkv.linear.weight, weight)
    merge_lora(model, merged=False)
    assert torch.equal(model.blocks[0].attn.qkv.linear.weight, weight)
    assert torch.equal(model(ids), apart)


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


def small():
    torch.manual_seed(0)
    return GPTModel(CONFIG)


def worn(model=None, layers=LAYERS, rank=4, alpha=8, size=0.02):
    """A model whose LoRA has learned something, not much, as training does."""
    model = add_lora(model or small(), layers, rank, alpha)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.B.normal_(std=size)
    return model


def state(model):
    """All that an error must leave as it was."""
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    return kinds, [(name, weight.requires_grad, weight.tolist()) for name, weight in model.named_parameters()]


IDS = torch.arange(32).view(2, 16)


def test_the_file_tells_layers_rank_and_alpha(tmp_path):
    save_adapter(tmp_path / "a", worn(rank=3, alpha=10))
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"layers": "attn.qkv, ffn.down", "rank": "3", "alpha": "10"}


@pytest.mark.parametrize(
    ("layers", "rank", "alpha", "named"),
    [
        (LAYERS, 4, 32, ["'alpha': '8'", "'alpha': '32'"]),
        (LAYERS, 4, 8.5, ["'alpha': '8'", "'alpha': '8.5'"]),
        (LAYERS, 8, 8, ["'rank': '4'", "'rank': '8'"]),
        (["ffn.up"], 4, 8, ["'layers': 'attn.qkv, ffn.down'", "'layers': 'ffn.up'"]),
        (["0.attn.qkv", "0.ffn.down"], 4, 8, ["blocks.1.attn.qkv.A"]),  # the same kinds of layers, but not all
    ],
)
def test_another_lora_is_refused_in_one_line_that_names_both(tmp_path, layers, rank, alpha, named):
    save_adapter(tmp_path / "a", worn())
    other = worn(layers=layers, rank=rank, alpha=alpha)
    before = state(other)
    with pytest.raises(ValueError) as error:
        load_adapter(tmp_path / "a", other)
    assert all(name in str(error.value) for name in ["a ", *named]) and "\n" not in str(error.value)
    assert state(other) == before


@pytest.mark.parametrize("change", [{"n_layer": 3}, {"n_embd": 48}])
def test_the_adapter_of_a_model_of_another_size_is_refused(tmp_path, change):
    save_adapter(tmp_path / "a", worn())
    with pytest.raises(ValueError, match=r"does not fit the model: blocks\.\d\.attn\.qkv\.A"):
        load_adapter(tmp_path / "a", add_lora(GPTModel(replace(CONFIG, **change)), LAYERS, 4, 8))


@pytest.mark.parametrize(
    "metadata", [{"alpha": "8"}, {"layers": "?", "rank": "", "alpha": "\n8"}, {"format": "pt"}, {"rank": "4"}]
)
def test_settings_that_say_something_else_are_refused(tmp_path, metadata):
    weights = {name: weight.detach() for name, weight in adapter(worn()).items()}
    save_file(weights, tmp_path / "a", metadata)
    with pytest.raises(ValueError, match="was saved with .* but the model wears"):
        load_adapter(tmp_path / "a", worn())


def test_a_file_without_settings_is_taken_with_a_warning(tmp_path):
    model, other = worn(), worn(size=1)
    save_file({name: weight.detach() for name, weight in adapter(model).items()}, tmp_path / "a")
    with pytest.warns(UserWarning, match="does not tell its alpha; it is taken to be 8"):
        load_adapter(tmp_path / "a", other)
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 64, b'{"rank": 4}'])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    model = worn()
    before = state(model)
    with pytest.raises((ValueError, OSError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(tmp_path / "a", model)
    assert state(model) == before


def test_an_adapter_takes_the_type_of_its_model(tmp_path):
    model = worn(small().bfloat16())
    save_adapter(tmp_path / "a", model)
    other = add_lora(small(), LAYERS, 4, 8)
    load_adapter(tmp_path / "a", other)
    assert all(weight.dtype == torch.float32 for weight in adapter(other).values())
    assert all(torch.equal(weight, adapter(model)[name].float()) for name, weight in adapter(other).items())


def freeze(model):
    return model.requires_grad_(False)


def learn_only_b(model):
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.endswith(".B"))
    return model


def head_only(model):
    model = GPTClassifier(model)
    train_only(model, ["head"])
    return model


@pytest.mark.parametrize(
    "model", [lambda: small(), lambda: freeze(small()), lambda: freeze(worn()), lambda: learn_only_b(worn()), lambda: head_only(worn())]
)  # fmt: skip
def test_an_adapter_without_its_matrices_is_neither_saved_nor_loaded(tmp_path, model):
    with pytest.raises(ValueError, match="wears no LoRA, or a frozen one"):
        save_adapter(tmp_path / "new", model())
    assert not list(tmp_path.iterdir())
    save_adapter(tmp_path / "a", worn())
    with pytest.raises(ValueError, match="wears no LoRA, or a frozen one"):
        load_adapter(tmp_path / "a", model())


def tied():
    """A model whose last layer has the embedding's weight, the same parameter."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("embedding", torch.nn.Embedding(97, 24))
    model.add_module("head", torch.nn.Linear(24, 97, bias=False))
    model.head.weight = model.embedding.weight
    return model.double()


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (small, LAYERS),
        (lambda: GPTClassifier(small()).double(), ["attn.qkv", "head"]),
        (tied, ["head"]),
        (lambda: torch.nn.Sequential(torch.nn.Embedding(97, 24), torch.nn.Linear(24, 30)), ["1"]),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_unwrapped_a_model_is_plain_and_does_the_same(make, layers, merged):
    model = make()
    names = list(model.state_dict())
    inputs = (IDS, torch.tensor([16, 3])) if isinstance(model, GPTClassifier) else (IDS,)
    worn(model, layers, rank=2)
    with torch.no_grad():
        apart = model(*inputs)
        merge_lora(model, merged)
        assert unwrap_lora(model) is model
        assert torch.allclose(model(*inputs), apart, atol=1e-6)
    assert list(model.state_dict()) == names and not any(isinstance(module, LoRALinear) for module in model.modules())
    worn(model, layers, rank=2)  # it can be put on again
    assert unwrap_lora(unwrap_lora(model)) is model


def test_unwrapped_a_model_can_be_saved_and_exported(tmp_path):
    gguf_format = pytest.importorskip("llm_shared.gguf_format")
    pytest.importorskip("gguf")
    tokenizer = BPETokenizer.train(MIXED_TEXT, 300)
    config = replace(CONFIG, vocab_size=300)
    for merged in (False, True):
        classifier = GPTClassifier(GPTModel(config))
        model = worn(classifier.gpt)
        with torch.no_grad():
            apart, probabilities = model(IDS), classifier(IDS, torch.tensor([16, 3]))
        merge_lora(model, merged)
        with pytest.raises(ValueError, match="must be unwrapped first"):
            save_model(tmp_path / "worn", model, tokenizer)
        with pytest.raises(ValueError, match="must be unwrapped first"):
            save_classifier(tmp_path / "worn", classifier)
        assert not (tmp_path / "worn").exists()
        unwrap_lora(model)
        save_classifier(tmp_path / f"c{merged}", classifier)
        save_model(tmp_path / f"m{merged}", model, tokenizer)
        export_hf(model, tmp_path / f"h{merged}", tokenizer)
        gguf_format.export_gguf(model, tmp_path / f"g{merged}", tokenizer)
        with torch.no_grad():
            again = [load_model(tmp_path / f"m{merged}")[0], load_hf(tmp_path / f"h{merged}")]
            again.append(gguf_format.load_gguf(tmp_path / f"g{merged}")[0])
            assert all(torch.allclose(one(IDS), apart, atol=1e-6) for one in again)
            again = load_classifier(tmp_path / f"c{merged}")(IDS, torch.tensor([16, 3]))
        assert torch.allclose(again, probabilities, atol=1e-6)


def test_a_compiled_model_gives_the_same_adapter_and_unwraps_to_a_plain_one(tmp_path):
    plain = small()
    model = add_lora(torch.compile(plain, backend="eager"), LAYERS, 4, 8)
    with_change(model)
    save_adapter(tmp_path / "a", model)
    other = add_lora(small(), LAYERS, 4, 8)
    load_adapter(tmp_path / "a", other)
    load_adapter(tmp_path / "a", model)
    with torch.no_grad():
        assert torch.equal(other(IDS), plain(IDS))
    assert unwrap_lora(model) is plain and set(plain.state_dict()) == set(small().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_taken_out_again_the_weights_are_the_same_bit_for_bit(dtype):
    model = worn(small().to(dtype), size=1)
    before = state(model)
    layer = model.blocks[1].ffn.down
    exact = layer.linear.weight.double() + layer.scale * layer.B.double() @ layer.A.double()
    for _ in range(20):
        merge_lora(model)
        rounded = layer.linear.weight.double()
        assert ((rounded - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-7).all()  # rounded once
        merge_lora(model, merged=False)
    assert state(model) == before


def test_a_merged_model_may_be_moved_copied_and_pickled():
    model = worn()
    with torch.no_grad():
        apart = model(IDS)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        merge_lora(copied)
        again = pickle.loads(pickle.dumps(copy.deepcopy(copied)))
        with torch.no_grad():
            assert torch.allclose(again(IDS), apart, atol=1e-6)
        merge_lora(again.double().float(), merged=False)
        assert state(again) == state(model)


def test_states_of_a_merged_and_an_unmerged_model_do_not_mix(tmp_path):
    apart, merged = worn(), worn(size=1)
    merge_lora(merged)
    save_adapter(tmp_path / "merged", merged)  # A and B are there, whole
    for model, other in ((apart, merged), (merged, apart)):
        with pytest.raises(RuntimeError, match="original"):
            copy.deepcopy(model).load_state_dict(other.state_dict())
    before = state(merged)
    save_adapter(tmp_path / "apart", apart)
    with pytest.raises(ValueError, match=r"merge_lora\(model, merged=False\) first"):
        load_adapter(tmp_path / "apart", merged)
    assert state(merged) == before
    merge_lora(merged, merged=False)
    load_adapter(tmp_path / "merged", apart)
    assert state(apart) == state(merged)
    apart.load_state_dict(merged.state_dict())


def test_a_merged_model_refuses_to_train(tmp_path):
    model = GPTClassifier(worn())
    merge_lora(model)
    with pytest.raises(ValueError, match=r"a merged LoRA learns nothing: call merge_lora\(model, merged=False\)"):
        model(IDS, torch.tensor([16, 3]))
    with torch.no_grad():
        model(IDS, torch.tensor([16, 3]))
    model.eval()(IDS, torch.tensor([16, 3]))
    merge_lora(model.train(), merged=False)
    model(IDS, torch.tensor([16, 3])).sum().backward()
    assert all(weight.grad is not None for weight in adapter(model).values())


def test_a_model_loaded_for_inference_can_be_merged():
    with torch.inference_mode():
        model = small()
    worn(model)
    with torch.no_grad():
        apart = model(IDS)
        merge_lora(model)
        assert torch.allclose(model(IDS), apart, atol=1e-6)


def test_autocast_and_checkpointing_give_the_same_gradients():
    def gradients(run):
        model = worn()
        run(model).float().square().mean().backward()
        return torch.cat([weight.grad.flatten() for weight in adapter(model).values()])

    plain = gradients(lambda model: model(IDS))
    again = gradients(lambda model: checkpoint(model, IDS, use_reentrant=False))
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(lambda model: model(IDS))
    assert torch.equal(again, plain) and half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half, plain, dim=0) > 0.99


@pytest.mark.parametrize(
    ("layers", "rank", "alpha", "message"),
    [
        ("attn.qkv", 4, 8, "layers must be a list of names, such as .*, not 'attn.qkv'"),
        ([], 4, 8, r"a list of names, such as .*, not \[\]"),
        ((), 4, 8, "a list of names"),
        ([""], 4, 8, "no linear layer is called ''"),
        ([*LAYERS, "head"], 4, 8, "no linear layer is called 'head'"),
        (LAYERS, 4.5, 8, "rank must be from 1 to 24"),
        (LAYERS, math.nan, 8, "rank must be from 1 to 24"),
        (LAYERS, -1, 8, "rank must be from 1 to 24"),
        (LAYERS, 4, 0, "alpha must be a number above 0, not 0"),
        (LAYERS, 4, -8, "alpha must be a number above 0, not -8"),
        (LAYERS, 4, math.nan, "alpha must be a number above 0, not nan"),
        (LAYERS, 4, math.inf, "alpha must be a number above 0, not inf"),
        pytest.param(LAYERS, 4, 10**400, "alpha must be a number above 0, not 1000", id="an alpha without a float"),
        (LAYERS, 4, 1e39, "alpha must be a number above 0"),  # infinite in float32
    ],
)
def test_more_nonsense_changes_nothing(layers, rank, alpha, message):
    model = small()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, layers, rank, alpha)
    assert state(model) == before


@pytest.mark.parametrize(
    ("make", "layers", "rank", "message"),
    [
        (
            lambda: GPTClassifier(small()),
            ["attn.qkv", "head"],
            4,
            "from 1 to 2 for this layer",
        ),  # only the head is narrow
        (lambda: torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 3)), ["0", "1"], 5, "from 1 to 3"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 3)), "01", 2, "a list of names"),
        (lambda: worn(), LAYERS, 4, "wears LoRA already"),
        (lambda: worn(), ["ffn.up"], 4, "wears LoRA already"),  # it would freeze the first one
        (lambda: worn(), ["linear"], 4, "wears LoRA already"),  # LoRA within LoRA
    ],
)
def test_what_does_not_fit_some_layers_changes_none(make, layers, rank, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, layers, rank, 8)
    assert state(model) == before


def test_names_may_come_from_a_generator():
    assert len(adapter(add_lora(small(), (name for name in LAYERS), 4, 8))) == 8
