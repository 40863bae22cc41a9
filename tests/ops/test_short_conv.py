"""short_conv: every backend that runs here against the definition. Shapes: x (B, L, C), weight (C, K).

Without a CUDA device the Triton kernels run in Triton's interpreter.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from chela.ops import backends, short_conv, short_conv_step
from chela.ops.short_conv import cpu
from tests.ops.test_fft_conv import _assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = [name for name, why_not in backends(DEVICE)["short_conv"].items() if why_not is None and name != "reference"]
INTERPRETED = DEVICE == "cpu"


def _inputs(batch, length, channels, taps, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, of=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, of)

    of_weight = dtype if dtype == torch.float64 else torch.float32
    weight = draw(channels, taps, of=of_weight) / taps**0.5
    return draw(batch, length, channels), weight, draw(batch, length, channels)


def _run(x, weight, grad, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    y = short_conv(*leaves, **options)
    d_x, d_weight = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    return {"y": y.detach(), "dx": d_x, "dweight": d_weight}


def _reference(*inputs, **options):
    return _run(*(t.double() for t in inputs), backend="reference", **options)


SLOW = ["triton"] if INTERPRETED else []  # a program takes tens of milliseconds: few and short cases
# All combinations; of slow backends half of them: every two values of two options are in one.
COMBINED = [
    row
    for row in itertools.product(FAST, (2, 3, 4, 5, 31), (False, True), (False, True))
    if row[0] not in SLOW or sum(row[1:]) % 2
]
# Tiles hold 64 positions of 32 channels: 130 positions of 70 channels are tiles with neighbours on each side.
LONG = [(backend, length) for backend in FAST for length in ([130] if backend in SLOW else [500, 1000, 1023])]


@pytest.mark.parametrize(("backend", "taps", "causal", "silu"), COMBINED)
def test_equals_the_definition(backend, taps, causal, silu):
    for length in (1, 2, 17, 66 if backend in SLOW else 130):
        inputs = _inputs(1 + length % 2, length, 5, taps, torch.float32)
        options = {"causal": causal, "silu": silu}
        _assert_close(_run(*inputs, backend=backend, **options), _reference(*inputs, **options), 2e-6)


@pytest.mark.parametrize(("backend", "length"), LONG)
def test_long_sequences_and_many_channels(backend, length):
    inputs = _inputs(1, length, 70, 5, torch.float32)
    options = {"causal": False, "silu": True}
    _assert_close(_run(*inputs, backend=backend, **options), _reference(*inputs, **options), 2e-6)


@pytest.mark.parametrize(("taps", "left"), [(2, 1), (5, 2), (31, 15)])
@pytest.mark.parametrize("length", [1, 3, 63, 300])
@pytest.mark.parametrize("products", [2**7, 2**12, 2**18])
def test_gradient_of_the_taps_in_slices(monkeypatch, taps, left, length, products):
    monkeypatch.setattr(cpu, "PRODUCTS", products)
    x, _, grad = _inputs(3, length, 4, taps, torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, left, taps - 1 - left))
    expected = torch.stack([(padded[:, k : k + length] * grad).sum((0, 1)) for k in range(taps)], 1)
    torch.testing.assert_close(cpu.weight_gradient(grad, x, taps, left), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_other_dtypes(backend, dtype):
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly without saying so; a GPU is the judge")
    x, weight, grad = _inputs(2, 63, 5, 5, dtype)
    got = _run(x, weight, grad, backend=backend, silu=True)
    want = _reference(x, weight, grad, silu=True)
    assert got["y"].dtype == got["dx"].dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    _assert_close(got, {k: want[k] for k in ("y", "dx")}, tolerance)
    _assert_close(got, {"dweight": want["dweight"]}, 1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["same", "causal"])
@pytest.mark.parametrize("backend", FAST)
def test_non_contiguous_inputs(backend, causal):
    x, weight, grad = _inputs(2, 40, 6, 5, torch.float32)
    want = _run(x, weight, grad, backend=backend, causal=causal)
    x, grad = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, grad))
    weight = weight.T.contiguous().T
    y = short_conv(x, weight, causal=causal, backend=backend)
    assert y.is_contiguous()
    torch.testing.assert_close(y, want["y"])
    _assert_close(_run(x, weight, grad, backend=backend, causal=causal), want, 1e-6)


@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_the_whole(dtype, silu):
    x, weight, _ = _inputs(2, 20, 3, 5, dtype)
    recent, tokens = weight.new_zeros(2, 5, 3), []
    for token in x.unbind(1):
        y, recent = short_conv_step(token, weight, recent, silu=silu)
        tokens.append(y)
    torch.testing.assert_close(torch.stack(tokens, 1), short_conv(x, weight, causal=True, silu=silu))


@pytest.mark.parametrize("backend", FAST)
def test_an_impulse_gives_the_taps(backend):
    weight = torch.arange(1.0, 6.0, device=DEVICE).expand(3, 5).contiguous()
    x = torch.zeros(1, 12, 3, device=DEVICE)
    x[:, 6] = 1
    same = short_conv(x, weight, backend=backend)[0, :, 0].tolist()
    causal = short_conv(x, weight, causal=True, backend=backend)[0, :, 0].tolist()
    assert same == [0, 0, 0, 0, 5, 4, 3, 2, 1, 0, 0, 0]
    assert causal == [0, 0, 0, 0, 0, 0, 5, 4, 3, 2, 1, 0]


# Of slow backends the gradients are those of the definition to 1e-12: ``test_other_dtypes``.
@pytest.mark.parametrize("backend", [name for name in FAST if name not in SLOW])
def test_gradcheck(backend):
    x, weight, _ = (t.requires_grad_() for t in _inputs(1, 6, 2, 3, torch.float64))
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, w, causal=causal: short_conv(x, w, causal=causal, silu=True, backend=backend), (x, weight)
        )


@pytest.mark.skipif("triton" not in FAST, reason="triton cannot run here")
def test_opcheck():
    x, weight, grad = _inputs(2, 9, 3, 3, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    torch.library.opcheck(torch.ops.chela.short_conv_triton.default, (*leaves, 1, True))
    torch.library.opcheck(torch.ops.chela.short_conv_triton.default, (*leaves, 2, False))
    torch.library.opcheck(torch.ops.chela.short_conv_triton_backward.default, (grad, x, weight, 1, True))


@pytest.mark.parametrize("backend", [name for name in FAST if name != "plain"])
def test_compiles_as_one_graph(backend):
    x, weight, grad = _inputs(2, 17, 3, 5, torch.float32)
    want = _run(x, weight, grad, backend=backend, silu=True)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: short_conv(x, w, silu=True, backend=backend), fullgraph=True, backend="aot_eager"
    )
    leaves = [t.requires_grad_() for t in (x, weight)]
    y = compiled(*leaves)
    torch.testing.assert_close(y, want["y"])
    for got, name in zip(torch.autograd.grad(y, leaves, grad), ("dx", "dweight"), strict=True):
        torch.testing.assert_close(got, want[name])


def test_float32_inside_under_autocast():
    x, weight, _ = _inputs(2, 17, 3, 5, torch.float32)
    for backend in FAST:
        want = short_conv(x, weight, silu=True, backend=backend)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(short_conv(x, weight, silu=True, backend=backend), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 5), torch.ones(5, 3)), r"expected x of shape \(B, L, C\), got \(4, 5\)"),
        ((torch.ones(1, 4, 5), torch.ones(4, 3)), r"expected weight of shape \(C=5, K\), got \(4, 3\)"),
        ((torch.ones(1, 4, 5), torch.ones(5, 32)), r"2 <= K <= 31 taps, got 32; fft_conv takes more"),
        ((torch.ones(1, 4, 5), torch.ones(5, 3, device="meta")), r"weight is on meta, other tensors on cpu"),
        ((torch.ones(1, 4, 5, dtype=torch.int32), torch.ones(5, 3)), r"floating dtype for x, got torch.int32"),
    ],
)
def test_errors_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        short_conv(*arguments)


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from chela.ops.short_conv import kernels
from chela.ops.short_conv import triton as triton_conv
from tests.ops.linear_attention.compile_kernels import resources

def compiled(kernel, types, constants, arch):
    signature = types | {name: "constexpr" for name in constants}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": triton_conv.WARPS})
    return made.metadata.shared, resources(made.asm["cubin"])["spills"]

rows = []
for arch in (80, 90, 100):
    for dtype, taps, silu in (("bf16", 31, True), ("fp32", 5, True), ("fp32", 31, False), ("fp64", 31, True)):
        sums = "fp64" if dtype == "fp64" else "fp32"
        of_x, of_sum, sizes = "*" + dtype, "*" + sums, {"L": "i32", "C": "i32"}
        common = {"K": taps, "LEFT": 2, "SILU": silu, "BLOCK_L": triton_conv.BLOCK_L,
                  "BLOCK_C": triton_conv.BLOCK_C, "dtype": tl.float64 if sums == "fp64" else tl.float32}
        inputs = {"x_ptr": of_x, "weight_ptr": of_sum}
        gradients = {"grad_ptr": of_x, "d_sum_ptr": of_sum if silu else of_x, "partial_ptr": of_sum}
        forward = compiled(kernels.short_conv_kernel, inputs | {"y_ptr": of_x} | sizes, common | {"FLIP": False}, arch)
        backward = compiled(kernels.short_conv_backward_kernel, inputs | gradients | sizes, common, arch)
        rows += [["forward", arch, dtype, taps, *forward], ["backward", arch, dtype, taps, *backward]]
json.dump(rows, sys.stdout)
"""


@pytest.mark.slow
def test_compiles_ahead_of_time_without_spills_for_three_architectures():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # else the kernels are interpreted
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(result.stdout)
    assert len(rows) == 3 * 4 * 2
    for name, arch, dtype, taps, shared, stack in rows:
        assert shared <= 99 * 1024 and stack == 0, (name, arch, dtype, taps, shared, stack)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 0, 3), (2, 8, 0)], ids=str)
def test_nothing_in_gives_nothing_out_and_zero_gradients(shape, causal, backend):
    leaves = [torch.randn(s, device=DEVICE).requires_grad_() for s in (shape, (shape[2], 9))]
    y = short_conv(*leaves, causal=causal, silu=True, backend=backend)
    assert y.shape == shape
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(y.sum(), leaves))
