"""The network as a whole, for the systems that come with the first release."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from chela.config import resolve
from chela.models import build_model

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


def test_too_long_a_sequence_is_named() -> None:
    with pytest.raises(ValueError, match="at most l_max=40 tokens, got 41"):
        model("chela")(torch.ones(1, 41, dtype=torch.long))


def test_continuous_input_and_pairs() -> None:
    task = SimpleNamespace(num_classes=2, l_max=40, vocab_size=None, input_dim=3, pair=True)
    net = model("chela", task=task).eval()
    x = torch.randn(4, 11, 3, dtype=torch.float64)
    scores = net(x)
    assert scores.shape == (2, 2)
    swapped = net(torch.cat([x[2:], x[:2]]))
    assert not torch.allclose(scores, swapped)  # the order of the documents matters
    assert torch.allclose(scores[:1], net(x[[0, 2]]))  # a row and its partner are B apart


def test_no_real_token_gives_finite_scores_and_gradients() -> None:
    net = model("chela")
    mask = torch.tensor([[True] * 5, [False] * 5])
    net(torch.ones(2, 5, dtype=torch.long), mask).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
