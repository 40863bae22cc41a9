"""Hedgehog's distillation: the loss by hand, its least value, and that it teaches a student."""

import math

import pytest
import torch

from chela.config.compose import resolve
from chela.layers.mixers.hedgehog import HedgehogAttention
from chela.layers.mixers.softmax import SoftmaxAttention
from chela.models import TaskFacts, build_model
from chela.models.convert import (
    attention_distillation_loss,
    convert,
    distillation_loss,
    feature_maps,
    hedgehog_from_softmax,
)
from chela.models.pretrained import from_pretrained, save_pretrained

TASK = TaskFacts(num_classes=10, l_max=32, vocab_size=17)


def _by_hand(q, k, fq, fk, causal, mask):
    total, count = 0.0, 0
    B, L, H, Z = q.shape
    for b in range(B):
        for h in range(H):
            for i in range(L):
                if not mask[b, i]:
                    continue
                keys = [j for j in range(L) if mask[b, j] and (j <= i or not causal)]
                teacher = torch.stack([q[b, i, h] @ k[b, j, h] / math.sqrt(Z) for j in keys]).softmax(0)
                student = torch.stack([fq[b, i, h] @ fk[b, j, h] for j in keys])
                total = total - (teacher * (student / student.sum()).log()).sum()
                count += 1
    return total / count


@pytest.mark.parametrize("causal", [False, True])
def test_the_loss_by_hand(causal):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 6, 3, 4, dtype=torch.float64).unbind()
    fq, fk = torch.rand(2, 2, 6, 3, 8, dtype=torch.float64).add(0.1).requires_grad_().unbind()
    mask = torch.tensor([[True] * 6, [False, True, True, True, False, False]])
    got = attention_distillation_loss(q, k, fq, fk, causal=causal, mask=mask, eps=0.0 + 1e-12)
    torch.testing.assert_close(got, _by_hand(q, k, fq, fk, causal, mask), rtol=1e-8, atol=0)


def test_the_least_value_is_the_entropy_of_the_teacher():
    """Features that make q·k's own softmax, one feature per key, reach the bound; no others go below it."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 6, 1, 4, dtype=torch.float64).unbind()
    weights = torch.softmax(torch.einsum("bihz,bjhz->bhij", q, k)[0, 0] / 2, -1)
    entropy = -(weights * weights.log()).sum(-1).mean()
    one_hot = torch.eye(6, dtype=torch.float64)[None, :, None]
    best = attention_distillation_loss(q, k, weights[None, :, None], one_hot, eps=1e-12)
    torch.testing.assert_close(best, entropy)
    other = attention_distillation_loss(q, k, torch.rand(1, 6, 1, 8).double(), torch.rand(1, 6, 1, 8).double())
    assert other > entropy


def test_a_layer_takes_over_the_projections():
    teacher = SoftmaxAttention(16, heads=2, d_value=24, rotary=True, causal=True).double()
    student = hedgehog_from_softmax(teacher)
    assert (student.heads, student.d_value, student.rotary, student.causal) == (2, 24, True, True)
    assert torch.equal(student.qkv.weight, teacher.qkv.weight)
    assert torch.equal(student.out.bias, teacher.out.bias)
    assert student.qkv.weight.dtype == torch.float64


@pytest.fixture
def teacher():
    network = build_model(resolve(["model=softmax", "preset=tiny"]).model, TASK, 0)
    with torch.no_grad():  # sharper than at the start, so that there is something to learn
        for block in network.backbone.blocks:
            block.mixer.layer.qkv.weight.mul_(4)
    return network.eval()


def test_the_first_stage_lowers_the_loss_and_nears_the_teacher(teacher):
    torch.manual_seed(0)
    inputs = torch.randint(1, 17, (16, 24))
    mask = torch.arange(24) < torch.randint(5, 25, (16, 1))
    student = convert(teacher)
    assert student.backbone.blocks[0].mixer.layer is not teacher.backbone.blocks[0].mixer.layer
    optimizer = torch.optim.Adam(feature_maps(student), lr=0.02)

    def gap() -> float:
        with torch.no_grad():
            return float((student(inputs, mask) - teacher(inputs, mask)).norm())

    losses, before = [], gap()
    for _ in range(60):
        loss = distillation_loss(teacher, student, inputs, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert gap() < 0.8 * before


def test_a_converted_network_is_saved_as_what_it_is(teacher, tmp_path):
    student, inputs = convert(teacher), torch.randint(1, 17, (2, 10))
    again = from_pretrained(save_pretrained(student, tmp_path))
    with torch.no_grad():
        assert torch.equal(again(inputs), student(inputs))


def test_a_network_without_softmax_is_refused():
    with pytest.raises(ValueError, match="SoftmaxAttention"):
        convert(torch.nn.Linear(2, 2))


def test_a_softmax_layer_alone_is_converted_too():
    torch.manual_seed(0)
    teacher, x = SoftmaxAttention(8), torch.randn(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    x[~mask] = float("nan")
    student = convert(teacher)
    assert isinstance(student, HedgehogAttention)
    assert torch.equal(student.qkv.weight, teacher.qkv.weight)
    distillation_loss(teacher, student, x, mask).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in feature_maps(student))
