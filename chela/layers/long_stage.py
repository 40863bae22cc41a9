"""The stages of CHELA's convolution: a few taps; then parallel branches in training, one kernel and bias afterwards.

Shapes: B batch, L length, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from chela.layers.long_kernel import LongKernel
from chela.layers.norm import MaskedBatchNorm
from chela.ops.fft_conv import fft_conv
from chela.ops.short_conv import short_conv


class ShortConv(nn.Module):
    """Depthwise convolution of a few taps.

    Args:
        d_model: Number of channels C.
        taps: Kernel size, 2–31.
        causal: Whether output t sees inputs up to t only.
        silu: Whether SiLU follows.
    """

    def __init__(self, d_model: int, taps: int, *, causal: bool = False, silu: bool = False) -> None:
        super().__init__()
        if not causal and taps % 2 == 0:
            raise ValueError(f"ShortConv: expected an odd number of taps when not causal, got {taps}")
        self.weight = nn.Parameter(torch.empty(d_model, taps))
        self.causal, self.silu = causal, silu
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the taps from U(−1/√K, 1/√K), as PyTorch's own convolutions do."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x ``(B, L, C)``."""
        return short_conv(x, self.weight, causal=self.causal, silu=self.silu)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.weight.shape[0]}, taps={self.weight.shape[1]}, causal={self.causal}, silu={self.silu}"


class MergedKernel(nn.Module):
    """One convolution equal to a whole long stage in eval mode; buffers, which run and are saved but do not train.

    Args:
        forward_kernel: ``(C, l_max)``, lags from 0 on.
        back_kernel: ``(C, l_max − 1)``, lags from −1 on; None when causal.
        bias: ``(C,)``.
    """

    forward_kernel: Tensor
    back_kernel: Tensor | None
    bias: Tensor

    def __init__(self, forward_kernel: Tensor, back_kernel: Tensor | None, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("forward_kernel", forward_kernel)
        self.register_buffer("back_kernel", back_kernel)
        self.register_buffer("bias", bias)

    def forward(self, u: Tensor) -> Tensor:
        """Convolve u ``(B, L, C)``, L up to ``l_max``."""
        if u.shape[1] > self.forward_kernel.shape[1]:
            raise ValueError(
                f"merged long kernel: expected at most l_max={self.forward_kernel.shape[1]} tokens, got {u.shape[1]}; "
                "unmerge, or merge a layer built with a larger l_max"
            )
        return fft_conv(u, self.forward_kernel, kernel_back=self.back_kernel).add_(self.bias)  # keeps the dtype of u


class LongStage(nn.Module):
    """``long * u + skip ⊙ u``, alone or beside parallel short branches that ``merge`` folds into one kernel.

    With branches: ``BN_0(long * u + skip ⊙ u) + Σ_j BN_j(short_j * u)``, each batch norm over the real tokens. In eval
    mode every term is linear in u, so the sum is one convolution and one bias: that is the merged form. A state_dict
    shows by its keys which form it is (``merged.*`` or the branches'); loading a merged one merges the stage.

    Args:
        kernel: The long kernel.
        branches: Sizes of the parallel short convolutions; none leaves the norms out too.
    """

    def __init__(self, kernel: LongKernel, branches: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.d_model, self.l_max, self.causal = kernel.d_model, kernel.l_max, kernel.directions == 1
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
        """Convolve ``u: (B, L, C)``, 0 at padding; the output there is not 0.

        ``mask: (B, L)`` bool, True on real tokens, keeps padding out of the batch statistics.
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
    def fold(self) -> MergedKernel:
        """Return the one convolution that this stage is in eval mode: norms, branches and skip in kernel and bias."""
        if self.merged is not None:
            return self.merged
        kernels = self.kernel.build(self.l_max)
        forward, back = kernels[0].clone(), None if self.causal else kernels[1][:, : self.l_max - 1].clone()
        forward[:, 0] += self.skip
        bias = torch.zeros_like(self.skip)
        for index, norm in enumerate(self.norms):
            assert isinstance(norm, MaskedBatchNorm)
            scale, shift = norm.affine()
            bias += shift
            if index == 0:
                forward *= scale[:, None]
                back = None if back is None else back * scale[:, None]
            else:
                _add_taps(forward, back, self.branches[index - 1].get_parameter("weight") * scale[:, None])
        return MergedKernel(forward, back, bias)

    @torch.no_grad()
    def merge(self, *, keep_training_form: bool = True) -> None:
        """Replace the branches by one kernel and one bias at ``l_max``; equal to eval mode.

        Args:
            keep_training_form: Keep the parameters, outside the state_dict, so that ``unmerge`` can bring them back.

        Raises:
            RuntimeError: It is merged already.
        """
        if self.merged is not None:
            raise RuntimeError("LongStage: expected the training form, but it is merged already")
        training_form = {name: getattr(self, name) for name in _TRAINING_FORM}
        self._become_merged()
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
        merged = self.fold().train(self.training)
        for name in (*_TRAINING_FORM, "merged"):
            delattr(self, name)
        self.merged = merged


_TRAINING_FORM = ("kernel", "skip", "branches", "norms")


def _add_taps(forward: Tensor, back: Tensor | None, taps: Tensor) -> None:
    """Add a short kernel ``(C, K)`` to the long one, in place; lags beyond l_max never occur and are left out."""
    size, l_max = taps.shape[1], forward.shape[1]
    left = size - 1 if back is None else (size - 1) // 2
    past = taps[:, : left + 1].flip(1)[:, :l_max]
    forward[:, : past.shape[1]] += past
    if back is not None:
        ahead = taps[:, left + 1 :][:, : l_max - 1]
        back[:, : ahead.shape[1]] += ahead


def _take_the_form_of(stage: LongStage, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading, merge the stage if the state_dict is merged; refuse a training form to a merged stage."""
    saved_merged = f"{prefix}merged.bias" in state_dict
    if saved_merged and stage.merged is None:
        stage._become_merged()  # of the right shapes; loading fills it
    elif f"{prefix}skip" in state_dict and stage.merged is not None:
        raise RuntimeError(
            f"{prefix.rstrip('.') or 'LongStage'}: expected the merged form, which this layer has, but the state_dict "
            "holds the training form; call unmerge(), or build the layer anew"
        )
    if saved_merged:
        stage._training_form = None
