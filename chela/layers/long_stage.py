"""The long stage of CHELA's convolution: parallel linear branches in training, one kernel and one bias afterwards.

Shapes: B batch, L length, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chela.layers.long_kernel import LongKernel
from chela.layers.norm import MaskedBatchNorm
from chela.layers.short_conv import ShortConv
from chela.ops.fft_conv import fft_conv

__all__ = ["FoldedKernel", "LongStage"]


class FoldedKernel(NamedTuple):
    """One convolution equal to a whole long stage in eval mode.

    Attributes:
        forward: `(C, l_max)`, lags from 0 on.
        back: `(C, l_max − 1)`, lags from −1 on; None when causal.
        bias: `(C,)`.
    """

    forward: Tensor
    back: Tensor | None
    bias: Tensor


class MergedKernel(nn.Module):
    """A folded kernel as buffers: it runs and is saved, it does not train.

    Args:
        d_model: Number of channels C.
        l_max: Taps of the forward kernel.
        causal: Without the back kernel.
    """

    forward_kernel: Tensor
    back_kernel: Tensor | None
    bias: Tensor

    def __init__(self, d_model: int, l_max: int, *, causal: bool) -> None:
        super().__init__()
        self.register_buffer("forward_kernel", torch.zeros(d_model, l_max))
        self.register_buffer("back_kernel", None if causal else torch.zeros(d_model, l_max - 1))
        self.register_buffer("bias", torch.zeros(d_model))

    def folded(self) -> FoldedKernel:
        """Return the buffers under their names."""
        return FoldedKernel(self.forward_kernel, self.back_kernel, self.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Convolve u `(B, L, C)`, L up to `l_max`."""
        if u.shape[1] > self.forward_kernel.shape[1]:
            raise ValueError(
                f"merged long kernel: expected at most l_max={self.forward_kernel.shape[1]} tokens, got {u.shape[1]}; "
                "unmerge, or merge a layer built with a larger l_max"
            )
        return fft_conv(u, self.forward_kernel, kernel_back=self.back_kernel).add_(self.bias)  # keeps the dtype of u


class LongStage(nn.Module):
    """`long * u + skip ⊙ u`, optionally as one of several parallel branches that `merge` folds into one kernel.

    With branches: `BN_0(long * u + skip ⊙ u) + Σ_j BN_j(short_j * u)`, each batch norm over the real tokens. In eval
    mode every term is linear in u, so the sum is one convolution and one bias: that is the merged form. A state_dict
    says by its keys which form it is (`merged.*` or the branches'); loading a merged one merges the stage.

    Args:
        kernel: The long kernel.
        branches: Sizes of the parallel short convolutions; none leaves the norms out too.
    """

    def __init__(self, kernel: LongKernel, branches: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.d_model, self.l_max, self.causal = kernel.d_model, kernel.l_max, kernel.directions == 1
        if not self.causal and any(taps % 2 == 0 for taps in branches):
            raise ValueError(f"LongStage: expected odd branch sizes when not causal, got {branches}")
        self.kernel = kernel
        self.skip = nn.Parameter(torch.empty(self.d_model))
        self.branches = nn.ModuleList(ShortConv(self.d_model, taps, causal=self.causal) for taps in branches)
        self.norms = nn.ModuleList(MaskedBatchNorm(self.d_model) for _ in range(len(branches) + 1 if branches else 0))
        self.merged: MergedKernel | None = None
        self._training_form: dict[str, Any] | None = None
        self.register_load_state_dict_pre_hook(_take_the_form_of)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the skip from N(0, 1); kernel, branches and norms draw their own."""
        if self.merged is None:
            nn.init.normal_(self.skip)

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve u.

        Args:
            u: `(B, L, C)`, 0 at padding.
            mask: `(B, L)` bool, True on real tokens; it keeps padding out of the batch statistics. The output at
                padding is not 0.
        """
        if self.merged is not None:
            if self.training:
                raise RuntimeError("LongStage: the merged form does not train; call unmerge() before train()")
            out: Tensor = self.merged(u)
            return out
        forward, back = self.kernel(u.shape[1])
        y = fft_conv(u, forward, kernel_back=back, skip=self.skip)
        for index, norm in enumerate(self.norms):
            y = norm(y, mask) if index == 0 else y + norm(self.branches[index - 1](u), mask)
        return y

    @torch.no_grad()
    def fold(self) -> FoldedKernel:
        """Return the one convolution that this stage is in eval mode: norms, branches and skip in kernel and bias."""
        if self.merged is not None:
            return self.merged.folded()
        kernels = self.kernel.build(self.l_max)
        forward, back = kernels[0].clone(), None if self.causal else kernels[1][:, : self.l_max - 1].clone()
        forward[:, 0] += self.skip
        bias = torch.zeros_like(self.skip)
        for index, norm in enumerate(self.norms):
            scale, shift = _affine(norm)
            bias += shift
            if index:
                _add_taps(forward, back, self.branches[index - 1].get_parameter("weight") * scale[:, None])
                continue
            forward *= scale[:, None]
            if back is not None:
                back *= scale[:, None]
        return FoldedKernel(forward, back, bias)

    @torch.no_grad()
    def merge(self, *, keep_training_form: bool = True) -> None:
        """Replace the branches by one kernel and one bias at `l_max`; equal to eval mode.

        Args:
            keep_training_form: Keep the parameters aside, out of the state_dict, so that `unmerge` can bring them back.

        Raises:
            RuntimeError: It is merged already.
        """
        if self.merged is not None:
            raise RuntimeError("LongStage: expected the training form, but it is merged already")
        folded = self.fold()
        training_form = {name: getattr(self, name) for name in _TRAINING_FORM}
        self._become_merged()
        assert self.merged is not None
        self.merged.to(folded.bias.device, folded.bias.dtype)
        self.merged.forward_kernel.copy_(folded.forward)
        if self.merged.back_kernel is not None and folded.back is not None:
            self.merged.back_kernel.copy_(folded.back)
        self.merged.bias.copy_(folded.bias)
        self._training_form = training_form if keep_training_form else None

    def unmerge(self) -> None:
        """Bring the training form back, as it was when merged.

        Raises:
            RuntimeError: It is not merged, or the parameters were not kept.
        """
        if self.merged is None:
            raise RuntimeError("LongStage: expected the merged form, but it is not merged")
        if self._training_form is None:
            raise RuntimeError(
                "LongStage: the training parameters were not kept (merge(keep_training_form=False), or a merged "
                "state_dict was loaded), and one kernel cannot be split again; load a checkpoint of the training form"
            )
        like = self.merged.bias
        for name, value in self._training_form.items():
            setattr(self, name, value)
            if isinstance(value, nn.Module):
                value.to(like.device, like.dtype).train(self.training)
        self.skip.data = self.skip.data.to(like)
        self.merged, self._training_form = None, None

    def _become_merged(self) -> None:
        """Drop the training form and make room, on its device, for a merged kernel."""
        like = self.skip
        for name in _TRAINING_FORM:
            delattr(self, name)
        del self.merged
        self.merged = MergedKernel(self.d_model, self.l_max, causal=self.causal).to(like.device, like.dtype)
        self.merged.train(self.training)

    def extra_repr(self) -> str:
        """Say which form it is in."""
        return "merged" if self.merged is not None else f"branches={len(self.branches)}"


_TRAINING_FORM = ("kernel", "skip", "branches", "norms")


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and shift `(C,)` of a batch norm in eval mode."""
    assert isinstance(norm, MaskedBatchNorm)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _add_taps(forward: Tensor, back: Tensor | None, taps: Tensor) -> None:
    """Add a short kernel `(C, K)` to the long one, in place; lags beyond the long one meet no pair of positions."""
    size, l_max = taps.shape[1], forward.shape[1]
    left = size - 1 if back is None else (size - 1) // 2
    past = taps[:, : left + 1].flip(1)[:, :l_max]
    forward[:, : past.shape[1]] += past
    if back is not None:
        ahead = taps[:, left + 1 :][:, : l_max - 1]
        back[:, : ahead.shape[1]] += ahead


def _take_the_form_of(stage: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: a merged state_dict makes the stage merged; one of the training form needs a training stage."""
    assert isinstance(stage, LongStage)
    saved_merged = f"{prefix}merged.bias" in state_dict
    saved_training = f"{prefix}skip" in state_dict
    if saved_merged and stage.merged is None:
        stage._become_merged()
    elif saved_training and stage.merged is not None:
        raise RuntimeError(
            f"{prefix.rstrip('.') or 'LongStage'}: expected the merged form, which this layer has, but the state_dict "
            "holds the training form; call unmerge(), or build the layer anew"
        )
    if saved_merged:
        stage._training_form = None
