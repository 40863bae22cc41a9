import pytest
import torch

from chela.layers.norm import NORMS, MaskedBatchNorm


def test_batch_norm_equals_torch_without_a_mask() -> None:
    ours, theirs = MaskedBatchNorm(5).double(), torch.nn.BatchNorm1d(5).double()
    for _ in range(3):
        x = torch.randn(4, 7, 5, dtype=torch.float64) * 3 + 2
        torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))


def test_batch_norm_counts_real_tokens_only() -> None:
    norm, plain = MaskedBatchNorm(3).double(), MaskedBatchNorm(3).double()
    x, mask = torch.randn(2, 6, 3, dtype=torch.float64), torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    dirty = torch.where(mask[..., None], x, 1e6)
    torch.testing.assert_close(norm(dirty, mask)[mask], plain(x[mask][None])[0])
    torch.testing.assert_close(norm.running_var, plain.running_var)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, True, False], [True, True, True]])])
def test_batch_norm_gradients(mask: torch.Tensor | None) -> None:
    norm = MaskedBatchNorm(3).double()
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x, mask), (x, norm.weight, norm.bias))


@pytest.mark.parametrize("mask", [None, torch.ones(8, 100, dtype=torch.bool)])
def test_batch_norm_keeps_digits_when_the_mean_is_large(mask: torch.Tensor | None) -> None:
    norm = MaskedBatchNorm(2)
    out = norm(torch.randn(8, 100, 2) + 1e3, mask)
    torch.testing.assert_close(out.std((0, 1)), torch.ones(2), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm_sums_in_float32_under_autocast(dtype: torch.dtype) -> None:
    """Output, gradients and running statistics are those of float32; means and squares beyond the half types' reach."""
    x, d_y = torch.randn(8, 500, 4) + torch.tensor([0.0, 10.0, 100.0, -1000.0]), torch.randn(8, 500, 4)
    mask = torch.arange(500) < torch.arange(500, 100, -50)[:, None]
    results = []
    for autocast in (False, True):
        norm, leaf = MaskedBatchNorm(4), x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = norm(leaf, mask)
            gradients = torch.autograd.grad(out, [leaf, *norm.parameters()], d_y)
        results.append([out, *gradients, norm.running_mean, norm.running_var])
    for exact, under_autocast in zip(*results, strict=True):
        assert torch.equal(exact, under_autocast)


def test_batch_norm_of_half_precision_input_sums_in_float32() -> None:
    norm, x, mask = MaskedBatchNorm(2), 30 * torch.randn(64, 2048, 2), torch.ones(64, 2048, dtype=torch.bool)
    norm(x.half(), mask)
    torch.testing.assert_close(norm.running_var, torch.full((2,), 0.9 + 0.1 * 900), rtol=2e-2, atol=0)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30])
def test_batch_norm_reads_no_padding(content: float) -> None:
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    x, d_y = torch.randn(2, 9, 3), torch.randn(2, 9, 3) * mask[..., None]
    results = []
    for filled in (0.0, content):
        norm, leaf = MaskedBatchNorm(3), x.masked_fill(~mask[..., None], filled).requires_grad_()
        out = norm(leaf, mask)
        gradients = torch.autograd.grad(out, [leaf, *norm.parameters()], d_y)
        results.append([out[mask], *gradients, norm.running_mean, norm.running_var])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_batch_norm_compiles_whole() -> None:
    torch._dynamo.reset()
    norm, mask = MaskedBatchNorm(3), torch.arange(9) < torch.tensor([[9], [4]])
    x = torch.randn(2, 9, 3).masked_fill(~mask[..., None], float("nan"))
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask)[mask], norm(x, mask)[mask])


def test_scale_norm_of_large_numbers_in_half_precision() -> None:
    x = 1000 * torch.randn(2, 5, 8)
    torch.testing.assert_close(NORMS["scale"](8)(x.half()), NORMS["scale"](8)(x).half(), rtol=1e-2, atol=1e-2)


def test_batch_norm_of_one_token() -> None:
    norm = MaskedBatchNorm(2)
    torch.testing.assert_close(norm(torch.randn(1, 1, 2)), torch.zeros(1, 1, 2))


@pytest.mark.parametrize("name", ["layer", "rms", "scale"])
def test_token_norms_look_at_one_token(name: str) -> None:
    norm, x = NORMS[name](8), torch.randn(2, 5, 8)
    torch.testing.assert_close(norm(x)[:, 3], norm(x[:, 3:4])[:, 0])
