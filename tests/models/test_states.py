"""Causal networks that go on from a state."""

import pytest
import torch
from torch import nn

from chela.config.compose import names, resolve
from chela.core.errors import UsageError
from chela.models import TaskFacts, build_model

TASK = TaskFacts(num_classes=9, l_max=40, vocab_size=9, objective="tokens")


def _network(name="chela", *words, task=TASK):
    config = resolve([f"model={name}", "preset=tiny", "model.causal=true", *words]).model
    return build_model(config, task, seed=0).double().eval()


AROUND = (["model.prenorm=false"], ["model.positions=learned", "model.norm=rms"], ["model.d_ff=0"])


# What stands around a mixer knows nothing of it: each system in one of these, by turns, and one system in all.
@pytest.mark.parametrize(
    ("name", "words"),
    [(name, AROUND[i % 3]) for i, name in enumerate(names("model"))]
    + [("chela", words) for words in AROUND if words != AROUND[names("model").index("chela") % 3]],
    ids=str,
)
@torch.no_grad()
def test_prefill_and_step_are_the_scores_of_the_whole(name, words):
    network, tokens = _network(name, *words), torch.randint(1, 9, (2, 33))
    first, state = network.prefill(tokens[:, :13])
    second, state = network.prefill(tokens[:, 13:20], state)
    scores = [first, second]
    for t in range(20, 33):
        one, state = network.step(tokens[:, t], state)
        scores.append(one[:, None])
    torch.testing.assert_close(torch.cat(scores, 1), network(tokens), rtol=1e-8, atol=1e-8)
    assert state["position"].tolist() == [33, 33] and all(type(t) is torch.Tensor for t in state.values())


@torch.no_grad()
def test_features_go_on_too():
    network = _network(task=TaskFacts(num_classes=3, l_max=40, vocab_size=None, input_dim=2, objective="tokens"))
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    _, state = network.prefill(x[:, :8])
    torch.testing.assert_close(network.step(x[:, 8], state)[0], network(x)[:, 8], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_compiled_block_goes_on_as_any_other():
    network, tokens = _network(), torch.randint(1, 9, (2, 12))
    network.backbone.blocks[0] = torch.compile(network.backbone.blocks[0], backend="eager")
    torch.testing.assert_close(network.prefill(tokens)[0], network(tokens), rtol=1e-8, atol=1e-8)


def test_beyond_l_max_there_is_a_way_on_or_a_clear_end():
    tokens = torch.randint(1, 9, (1, 41))
    with pytest.raises(ValueError, match=r"at most l_max=40 tokens, got 41; build .* or give the rest to prefill$"):
        _network()(tokens)
    assert _network().prefill(tokens)[0].shape == (1, 41, 9)
    with pytest.raises(ValueError, match=r"got 41; build with a larger l_max$"):
        _network("chela", "model.positions=learned")(tokens)
    with pytest.raises(ValueError, match="got 41: learned positions end there; build with a larger l_max, or with"):
        _network("chela", "model.positions=learned").prefill(tokens)
    with pytest.raises(ValueError, match="MEGA: expected at most l_max=40 tokens, got 41"):
        _network("mega").prefill(tokens)
    with pytest.raises(ValueError, match=r"got 41; build with a larger l_max$"):
        _network("mega")(tokens)
    assert [_network(name).backbone.ends() for name in ("chela", "mega", "mega_chunk")] == ["", "MEGA", ""]


class Own(nn.Module):
    """A mixer of somebody's own, without states."""

    def __init__(self, d_model):
        super().__init__()
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x):
        """Map."""
        return self.out(x)


def test_what_has_no_state_says_so_in_one_line():
    tokens = torch.randint(1, 9, (1, 4))
    network = _network()
    network.backbone.blocks[0].mixer.layer = Own(16)
    with pytest.raises(UsageError, match=r"^Own: expected a method start, to go on token by token .*, got none$"):
        network.prefill(tokens)
    looks_ahead = build_model(resolve(["preset=tiny"]).model, TASK, seed=0)
    with pytest.raises(RuntimeError, match=r"TokenModel\.start: expected causal=True"):
        looks_ahead.prefill(tokens)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["chela", "softmax"])
@torch.no_grad()
def test_a_state_can_be_branched(mode, name):
    network, tokens = _network(name), torch.randint(1, 9, (2, 6))
    getattr(network, mode)()
    _, state = network.prefill(tokens)
    wide = {key: tensor.repeat_interleave(3, dim=0) for key, tensor in state.items()}
    branch = {key: tensor.clone() for key, tensor in state.items()}
    one = network.step(tokens[:, 0], state)[0]
    assert torch.equal(network.step(tokens[:, 0], branch)[0], one)
    torch.testing.assert_close(network.step(tokens[:, 0].repeat_interleave(3), wide)[0][1::3], one)
