"""Writing on after a prompt: the same text however the prompt was read, only likely symbols, clean ends."""

import pytest
import torch

from chela.config.schema import ModelConfig
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from chela.models.generate import Continuation, decode, encode, generate, sample

ALPHABET = "\n abcdef"


def network(name="chela", **options):
    config = ModelConfig(d_model=8, depth=2, d_ff=16, causal=True, mixer=mixer_options(name)(**options))
    return build_model(config, TaskFacts(9, 32, 9, objective="tokens", alphabet=ALPHABET), seed=0).eval()


@pytest.mark.parametrize("name", ["chela", "softmax", "mega", "s4d", "lightning"])
def test_a_prompt_that_was_prefilled_and_one_that_was_stepped_go_on_alike(name):
    model, prompt = network(name), encode("abc fed", ALPHABET)
    at_once = torch.stack(list(Continuation(model, prompt, 20, seed=3)))
    with torch.no_grad():
        _, state = model.prefill(prompt[:, :1])
        for symbol in prompt.T[1:-1]:
            _, state = model.step(symbol, state)
    stepped = torch.stack(list(Continuation(model, prompt[:, -1:], 20, seed=3, state=state)))
    assert torch.equal(at_once, stepped)
    assert at_once.unique().numel() > 2


def test_the_seed_makes_the_text():
    model, prompt = network(), encode("ab", ALPHABET).repeat(2, 1)
    first, same, other = (generate(model, prompt, 30, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (2, 32) and torch.equal(first[:, :2], prompt)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # the texts of a batch are drawn each for itself


def test_text_goes_in_and_comes_out():
    text = generate(network(), "abc\n", 12, temperature=0.5)
    assert text.startswith("abc\n") and len(text) == 16 and set(text) <= set(ALPHABET)
    byte_alphabet = "".join(map(chr, range(256)))
    assert decode(encode("naïve ☃", byte_alphabet)[0], byte_alphabet).decode() == "naïve ☃"
    with pytest.raises(ValueError, match="expected the 8 characters that the network knows, got 'z' at 2"):
        generate(network(), "abz", 1)


def test_only_what_may_be_drawn_is_drawn():
    scores = torch.tensor([9.0, 1.0, 3.0, 2.0, 0.0]).repeat(2000, 1)  # id 0 is padding
    draw = torch.Generator().manual_seed(0)

    def drawn(temperature=1.0, top_k=0):
        ids = sample(scores, temperature=temperature, top_k=top_k, draw=draw)
        return torch.bincount(ids, minlength=5) / len(ids)

    shares = scores[0].index_fill(0, torch.tensor(0), float("-inf")).softmax(0)
    torch.testing.assert_close(drawn(), shares, atol=0.04, rtol=0)
    torch.testing.assert_close(drawn(temperature=2.0), (shares.log() / 2).softmax(0), atol=0.04, rtol=0)
    assert drawn(temperature=0)[2] == 1
    assert drawn(top_k=2).nonzero().flatten().tolist() == [2, 3]


def test_a_character_is_named_whole_where_it_is_not_known():
    with pytest.raises(ValueError, match="got 'ï' at 2"):
        encode("caïn", "acn")
    with pytest.raises(ValueError, match="got '�' at 1"):
        encode(b"a\xff", "ac")


def test_the_coldest_draw_is_the_best_one():
    draw = torch.Generator().manual_seed(0)
    scores = torch.tensor([[9.0, -5.0, -3.0, -4.0]])
    assert sample(scores, temperature=1e-310, top_k=0, draw=draw).tolist() == [2]


@pytest.mark.parametrize(("name", "options"), [("mega", {}), ("softmax", {"positions": "learned"})])
def test_a_network_with_an_end_says_so_before_it_writes(name, options):
    config = ModelConfig(d_model=8, depth=1, d_ff=16, causal=True, mixer=mixer_options(name)(), **options)
    model = build_model(config, TaskFacts(9, 32, 9, objective="tokens", alphabet=ALPHABET), seed=0).eval()
    assert len(generate(model, "abc", 30)) == 33  # the last symbol is not read
    for prompt, tokens in (("abc", 31), ("a" * 40, 1)):
        with pytest.raises(ValueError, match=f"at most 33 with the prompt, got {len(prompt)} .* and {tokens}: "):
            generate(model, prompt, tokens)
    _, state = model.prefill(encode("abcd", ALPHABET))
    with pytest.raises(ValueError, match="got 5 of the prompt and 29"):
        Continuation(model, encode("a", ALPHABET), 29, state=state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1}, "expected tokens, temperature, top_k >= 0, got 1, -1 and 0"),
        ({"temperature": float("nan")}, "got 1, nan and 0"),
        ({"top_k": -1}, "got 1, 1.0 and -1"),
        ({"tokens": -1}, "got -1, 1.0 and 0"),
        ({"prompt": torch.empty(1, 0, dtype=torch.long)}, "P >= 1"),
    ],
)
def test_options_have_limits(wrong, message):
    with pytest.raises(ValueError, match=message):
        Continuation(network(), **{"prompt": encode("a", ALPHABET), "tokens": 1, **wrong})
