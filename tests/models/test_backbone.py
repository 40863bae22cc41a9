"""The network as a whole, for the systems that come with the first release."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from chela.config.compose import resolve
from chela.config.schema import ModelConfig
from chela.core.errors import UsageError
from chela.models import build_model
from chela.models.backbone import Residual

TASK = SimpleNamespace(num_classes=3, l_max=40, vocab_size=9, input_dim=1, pair=False)


def model(name: str, *words: str, task: Any = TASK) -> torch.nn.Module:
    config = resolve([f"model={name}", "preset=tiny", *words])
    return build_model(config.model, task, seed=0).double()


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("prenorm", ["true", "false"])
@pytest.mark.parametrize("name", ["chela", "linear", "softmax"])
def test_padding_does_not_matter(name: str, prenorm: str, norm: str) -> None:
    net = model(name, f"model.prenorm={prenorm}", f"model.norm={norm}")
    tokens, mask = torch.randint(1, 9, (4, 20)), torch.arange(20) < torch.tensor([[20], [13], [5], [1]])
    net.train()(tokens, mask)  # batch norm: some running statistics
    for mode in (True, False):
        net.train(mode)
        expected = net(tokens, mask)
        other = torch.where(mask, tokens, 7)
        padded = F.pad(other, (0, 6), value=3), F.pad(mask, (0, 6))
        torch.testing.assert_close(net(*padded), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(net(tokens[:1]), expected[:1], rtol=0, atol=1e-10)  # a whole row needs no mask


@pytest.mark.parametrize("name", ["chela", "softmax", "mega"])
def test_padding_that_is_no_number_does_not_matter(name: str) -> None:
    task = SimpleNamespace(num_classes=2, l_max=40, vocab_size=None, input_dim=3, pair=False)
    net, mask = model(name, "model.norm=batch", task=task), torch.arange(20) < torch.tensor([[20], [13]])
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    found = []
    for padding in (0.0, float("nan")):
        net.zero_grad()
        scores = net(torch.where(mask[..., None], x, padding), mask)
        scores.sum().backward()
        found.append([scores.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_same_seed_same_values_elsewhere_others() -> None:
    one, again, other = (build_model(resolve(["preset=tiny"]).model, TASK, seed) for seed in (0, 0, 1))
    for (name, a), b, c in zip(
        one.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c) or a.unique().numel() <= 2, name  # ones, zeros


def test_continuous_input_and_pairs() -> None:
    task = SimpleNamespace(num_classes=2, l_max=40, vocab_size=None, input_dim=3, pair=True)
    net = model("chela", task=task).eval()
    x = torch.randn(4, 11, 3, dtype=torch.float64)
    scores = net(x)
    assert scores.shape == (2, 2)
    swapped = net(torch.cat([x[2:], x[:2]]))
    assert not torch.allclose(scores, swapped)  # the order of the documents matters
    assert torch.allclose(scores[:1], net(x[[0, 2]]))  # a row and its partner are B apart
    assert model("chela", "model.pair_features=concat", task=task)(x).shape == (2, 2)


def test_tokens_are_scored_one_by_one() -> None:
    task = SimpleNamespace(num_classes=5, l_max=40, vocab_size=9, objective="tokens")
    net = model("chela", "model.causal=true", task=task).eval()
    tokens = torch.randint(1, 9, (2, 11))
    scores = net(tokens)
    assert scores.shape == (2, 11, 5)
    mask = torch.arange(11) < torch.tensor([[11], [6]])
    torch.testing.assert_close(net(tokens, mask)[mask], scores[mask], rtol=0, atol=1e-10)


@pytest.mark.parametrize("facts", [{"objective": "rhymes"}, {"objective": "tokens", "pair": True}])
def test_an_objective_that_no_head_has_is_refused(facts) -> None:
    with pytest.raises(UsageError, match="expected the objective classification, or tokens for single sequences, got"):
        model("chela", task=SimpleNamespace(num_classes=5, l_max=40, vocab_size=9, **facts))


class Probe(torch.nn.Module):
    """A layer that keeps what it is given."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.forward = forward


def test_a_layer_gets_what_its_forward_names() -> None:
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5) > 0
    forms = {
        "x": lambda x: x + 1,
        "mask": lambda x, mask: x + 2 * mask[..., None],
        "stream": lambda x, stream=None, scale=3: x + scale * stream,
        "both": lambda y, mask=None, stream=None: y + stream * mask[..., None],
    }
    for prenorm in (True, False):
        for form in forms.values():
            block = Residual(Probe(form), ModelConfig(d_model=4, prenorm=prenorm))
            known = {name: value for name, value in (("mask", mask), ("stream", x)) if name in block.context}
            y = F.layer_norm(x, (4,)) if prenorm else x
            total = x + form(y, **known)
            torch.testing.assert_close(block(x, mask), total if prenorm else F.layer_norm(total, (4,)))
    with pytest.raises(
        ValueError, match=r"Probe: expected forward\(x, mask, stream\) or fewer, got \(x, mask, lengths"
    ):
        Residual(Probe(lambda x, mask, lengths: x), ModelConfig(d_model=4))


def test_dropout_is_on_the_candidate_and_before_the_gate() -> None:
    net = model("chela", "model.dropout=0.5")
    block = net.backbone.blocks[0].mixer
    x = torch.randn(4, 40, 16, dtype=torch.float64)
    kept = block.eval()(x) - x
    dropped = block.train()(x) - x
    normed = block.norm(x)
    assert (dropped != 0).all()  # a candidate that is dropped leaves −g ⊙ x, not nothing
    gone = -torch.sigmoid(block.layer.highway(block.layer.conv(normed))) * normed
    share = torch.isclose(dropped, gone, atol=1e-12).double().mean()
    assert 0.45 < share < 0.55 and not torch.allclose(kept, dropped)


def test_no_real_token_gives_finite_scores_and_gradients() -> None:
    net = model("chela")
    mask = torch.tensor([[True] * 5, [False] * 5])
    net(torch.ones(2, 5, dtype=torch.long), mask).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
