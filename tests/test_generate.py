from llm_shared.generate import generate, sample, stream, stream_text
from llm_shared.gpt import GPTConfig, GPTModel
from llm_shared.tokenizer import BPETokenizer, gpt2_tokenizer
import pytest
import torch

CONFIG = GPTConfig(vocab_size=50, context_length=16, n_embd=32, n_head=4, n_layer=3)
PROMPTS = [[1, 2, 3], [7], [4, 5, 6, 7, 8, 9, 10], list(range(20, 41))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = GPTModel(CONFIG).double()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)  # far from uniform, so that every position matters
    return model.eval()


def by_the_book(model, prompt, max_new_tokens):
    """Greedy, one prompt, no cache, the last context_length tokens: the loop of chapter 4."""
    ids = torch.tensor([prompt])
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(ids[:, -CONFIG.context_length :])
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("new", [0, 1, 5, 40])
def test_equals_the_books_loop(model, use_cache, new):
    expected = [by_the_book(model, prompt, new) for prompt in PROMPTS]
    assert [generate(model, [prompt], new, use_cache=use_cache)[0] for prompt in PROMPTS] == expected
    assert generate(model, PROMPTS, new, use_cache=use_cache) == expected
    assert len({tuple(row[-new:]) for row in expected}) > 1 or new == 0


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0, "top_p": 0.9}]
)
def test_sampling_is_seeded_and_the_cache_changes_nothing(model, options):
    def run(seed, **more):
        return generate(model, PROMPTS, 30, generator=torch.Generator().manual_seed(seed), **options, **more)

    assert run(0) == run(0) == run(0, use_cache=False)
    assert run(0) != run(1)


def test_generating_leaves_the_global_generator_alone(model):
    torch.manual_seed(5)
    generate(model, PROMPTS, 5, temperature=1.0, generator=torch.Generator().manual_seed(0))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_rows_stop_one_by_one(model):
    full = generate(model, PROMPTS, 30)
    first = full[0][len(PROMPTS[0]) :]
    eot = next(new for i, new in enumerate(first) if i >= 3 and new not in first[:i])
    stopped = generate(model, PROMPTS, 30, eot_id=eot)
    for prompt, row, short in zip(PROMPTS, full, stopped, strict=True):
        new = row[len(prompt) :]
        assert short == prompt + (new[: new.index(eot)] if eot in new else new)
    steps = list(stream(model, PROMPTS[:1], 30, eot_id=eot))
    assert len(steps) == first.index(eot) >= 3 and all(new is not None for (new,) in steps)


def test_edges(model):
    assert generate(model, [], 5) == []
    start = generate(model, [[3]], 6)[0]
    assert generate(model, [[]], 6, eot_id=3)[0] == start[1:]
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, [[1], []], 5)
    model.train()
    generate(model, PROMPTS, 2)
    assert model.training
    model.eval()


def test_sample_filters():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        return sorted(sample(logits, generator=generator, **options).unique().tolist())

    assert drawn() == [0]
    assert drawn(temperature=1.0) == [0, 1, 2, 3]
    assert drawn(temperature=1.0, top_k=2) == [0, 1]
    assert drawn(temperature=1.0, top_k=1) == [0]
    assert drawn(temperature=1.0, top_k=99) == [0, 1, 2, 3]
    probs = logits[0].softmax(0)  # 0.64, 0.24, 0.09, 0.03
    assert drawn(temperature=1.0, top_p=0.6) == [0]
    assert drawn(temperature=1.0, top_p=float(probs[:2].sum()) - 0.01) == [0, 1]
    assert drawn(temperature=1.0, top_p=1.0) == [0, 1, 2, 3]
    frequency = (sample(logits.repeat(10, 1), temperature=2.0, generator=generator) == 0).double().mean()
    assert frequency == pytest.approx((logits[0] / 2).softmax(0)[0].item(), abs=0.01)


BAD = [{"temperature": t} for t in (-1, float("nan"), float("inf"))] + [{"top_k": 0}, {"top_k": -3}]
BAD += [{"top_p": p} for p in (0.0, 1.5, float("nan"))]


@pytest.mark.parametrize("options", BAD)
def test_bad_sampling(options):
    with pytest.raises(ValueError, match="temperature must be"):
        sample(torch.zeros(1, 4), **options)


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), BPETokenizer([])], ids=["gpt2", "bytes"])
def test_streamed_text_waits_for_whole_characters(tokenizer):
    text = "Tiếng Việt 👋🏽"
    pieces = list(stream_text(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(stream_text(tokenizer, tokenizer.encode(text)[:-1])).endswith("\ufffd")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"top_p": 0.5, "temperature": 2}]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_are_an_error(bad, options):
    logits = torch.zeros(2, 5)
    logits[1] = bad
    with pytest.raises(FloatingPointError, match="no numbers any more"):
        sample(logits, **options)


def test_top_k_of_one_is_greedy_even_among_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    drawn = {sample(logits, temperature=1.0, top_k=1).item() for _ in range(20)}
    assert drawn == {sample(logits).item()}


@pytest.mark.parametrize("temperature", [1.0, 1e9, 1e39, 1e300])
@pytest.mark.parametrize("logits", [torch.zeros(300), torch.arange(300.0), torch.tensor([5.0] * 7 + [1.0] * 293)])
def test_top_k_keeps_k_even_among_equals_and_in_great_heat(temperature, logits):
    drawn = sample(logits.repeat(200, 1), temperature=temperature, top_k=2).unique()
    assert len(drawn) == 2 and logits[drawn].min() == logits.topk(2).values[-1]


@pytest.mark.parametrize("top_p", [1e-300, 1e-12])
def test_a_tiny_top_p_leaves_the_likeliest(top_p):
    assert sample(torch.randn(50, 300), temperature=1.0, top_p=top_p).shape == (50,)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-7, 1e-5, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.tensor([[1000.0, 1001.0, -torch.inf, 999.0]])
    assert sample(logits, temperature=temperature).item() == 1


def test_a_masked_vocabulary_is_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).repeat(200, 1)
    assert set(sample(logits, temperature=1.0, top_k=3, top_p=0.99).tolist()) == {0, 2}


@pytest.mark.parametrize("prompt", [[60], [3, -1], [10**9]])
def test_ids_of_another_tokenizer_are_refused(prompt):
    model = GPTModel(GPTConfig(vocab_size=60, context_length=8, n_embd=16, n_head=2, n_layer=1))
    with pytest.raises(ValueError, match="run from 0 to 59: take the model's own tokenizer"):
        generate(model, [[1], prompt], 2)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, not -1"):
        generate(model, [[1]], -1)
