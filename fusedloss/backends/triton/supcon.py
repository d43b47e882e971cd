"""Supervised contrast on a GPU: tiles of similarities that are never written, an online log-sum-exp, no atomics.

One kernel gives each anchor's sums. The other gives the gradient of each row: the gradients of a tile's similarities
serve both directions of its pairs, so that each row is written by one program, once for each block of features.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from fusedloss.backends.triton import supcon_kernels as kernels
from fusedloss.core.operands import AnchorSums, SavedAnchors, SupConInputs, SupConMask

from . import launch, linear_rows
from .supcon_kernels import Coefficients, Rows, Spec, Sums, spec_of

_COEFFICIENT_ROWS, _COEFFICIENT_WARPS = 1024, 4
_SCALED_TOGETHER = 1024  # values of 16-bit rows
_ALIGNED = 16  # what Triton tells widths by


def supcon_stats(inputs: SupConInputs) -> AnchorSums:
    """The loss of each anchor, its shift and its sum of exponentials; the contract is the reference's."""
    rows, tile = _rows(inputs), _tile(inputs, "sums")
    anchors, spec = inputs.num_anchors, _spec(inputs, tile)
    sums = AnchorSums(*(inputs.per_positive.new_empty(anchors) for _ in AnchorSums._fields))
    launch.start(
        kernels.sums_kernel, (triton.cdiv(anchors, tile.rows),),
        (rows, Sums(*sums, inputs.per_positive.contiguous()), spec),
        inputs.features.device, tile.warps, tile.stages, maxnreg=launch.most_registers(tile.warps),
    )  # fmt: skip
    return sums


def supcon_backward(inputs: SupConInputs, saved: SavedAnchors, grad_loss: Tensor, mask: SupConMask) -> list[Tensor]:
    """The gradients that `mask` names, from those of the losses; rows from ``num_grad_rows`` on have zeros."""
    rows, tile = _rows(inputs), _tile(inputs, "gradient", mask.temperature)
    features, anchors, spec = inputs.features, inputs.num_anchors, _spec(inputs, tile)
    grad = inputs.per_positive.new_zeros(rows.features.shape)
    moment = inputs.per_positive.new_empty(anchors) if mask.temperature else None
    of_anchors, scale = _coefficients(inputs, saved, grad_loss)
    coefficients = Coefficients(of_anchors[0], of_anchors[1], of_anchors[2], moment)
    # A temperature's gradient needs the anchors' rows alone.
    count, width = (inputs.num_grad_rows, rows.width) if mask.features else (anchors, 1)
    grid = (triton.cdiv(max(count, anchors if mask.temperature else 0), tile.rows), triton.cdiv(width, tile.block))
    launch.start(
        kernels.gradient_kernel, grid, (rows, coefficients, grad, inputs.num_grad_rows, spec),
        features.device, tile.warps, tile.stages, maxnreg=launch.most_registers(tile.warps),
    )  # fmt: skip
    if scale is not None:
        grad /= scale
    grad = grad[:, : features.shape[1]]
    if inputs.norms is not None and mask.features:
        known, grad = slice(0, inputs.num_grad_rows), grad.contiguous()
        linear_rows.project_rows(features[known], inputs.norms[known], grad[known], True)
    grads = [grad.to(features.dtype).contiguous()] if mask.features else []
    if moment is None:
        return grads
    of_temperature = -moment.sum() * (math.log(2.0) if inputs.norms is not None else 1.0)
    return [*grads, of_temperature if scale is None else of_temperature / scale]


def _coefficients(inputs: SupConInputs, saved: SavedAnchors, grad_loss: Tensor) -> tuple[Tensor, Tensor | None]:
    """(3, M): each row's shift, and what exp(s - shift) and the mean over positives are multiplied by.

    In float16 all are scaled by a power of two, which is returned, so that small ones keep their digits.
    """
    scale = None
    if inputs.features.dtype == torch.float16:
        largest = (grad_loss / inputs.temperature).abs().amax() if len(grad_loss) else grad_loss.new_ones(())
        scale = torch.where(largest > 0, torch.exp2(13 - largest.log2().ceil()), 1.0)
        grad_loss = grad_loss * scale
    made = inputs.per_positive.new_empty(3, len(inputs.features))
    given = (saved.shift, saved.sum, grad_loss, inputs.per_positive)
    arguments = (*launch.contiguous(given), inputs.temperature, inputs.num_anchors, len(inputs.features))
    launch.start(
        kernels.coefficient_kernel, (triton.cdiv(len(inputs.features), _COEFFICIENT_ROWS),), (*arguments, made),
        made.device, _COEFFICIENT_WARPS, COMMON=_may_share(inputs), LOG2=inputs.norms is not None,
        ROWS=_COEFFICIENT_ROWS,
    )  # fmt: skip
    return made, scale


def _rows(inputs: SupConInputs) -> Rows:
    """The tensors as the kernels address them: contiguous, whatever they were."""
    features, mask, weights = inputs.features, inputs.mask, inputs.weights
    inverse = None
    if inputs.norms is not None:
        features, inverse = _scaled(features.contiguous(), inputs.norms.contiguous(), inputs.codes.contiguous())
    elif features.shape[1] % _ALIGNED:
        # So that each copy into shared memory is of 16 bytes.
        features = torch.nn.functional.pad(features, (0, -features.shape[1] % _ALIGNED))
    return Rows(
        features.contiguous(),
        features.shape[0],
        features.shape[1],
        inverse,
        inputs.codes.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        1 if mask is None else len(mask),
        None if weights is None else weights.contiguous(),
        inputs.temperature,
        inputs.num_anchors,
    )


def _scaled(features: Tensor, norms: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """See scale_kernel."""
    count, width = features.shape
    padded = width + -width % _ALIGNED
    scaled = features.new_empty(count, padded)
    inverse = torch.empty(count, dtype=torch.float32, device=features.device)
    block = min(_SCALED_TOGETHER, triton.next_power_of_2(max(padded, 1)))
    together = _SCALED_TOGETHER // block
    launch.start(
        kernels.scale_kernel, (triton.cdiv(count, together),),
        (features, norms, codes, scaled, inverse, count, width, padded), features.device, _COEFFICIENT_WARPS,
        ROWS=together, BLOCK=block,
    )  # fmt: skip
    return scaled, inverse


def _tile(inputs: SupConInputs, kernel: str, moments: bool = False) -> launch.ProductTile:
    """Smaller ones where more is kept in registers; square ones, alike in both kernels, where a rounding counts."""
    features = inputs.features
    if not inputs.normalized:
        kernel = "any length"
    elif inputs.mask is not None:
        kernel += " mask" if kernel == "gradient" else " extras"
    elif inputs.weights is not None or (moments and inputs.norms is not None):
        kernel += " extras"
    return launch.product_tile("supcon", kernel, features.shape[1], features.dtype, features.device)


def _may_share(inputs: SupConInputs) -> bool:
    """Whether exp(s - 1 / T) serves both directions of a pair, where T is not too small; weights may be of any size."""
    return inputs.normalized and inputs.weights is None and inputs.per_positive.dtype == torch.float32


def _spec(inputs: SupConInputs, tile: launch.ProductTile) -> Spec:
    dtype = inputs.features.dtype
    # Three tensor-core products keep float32's digits of cosines; larger values are multiplied in float32 itself.
    precision = "tf32x3" if inputs.normalized and dtype == torch.float32 else "ieee"
    return spec_of(
        dtype=dtype, rows=tile.rows, columns=tile.columns, step=tile.step, block=tile.block, precision=precision,
        log2=inputs.norms is not None, common=_may_share(inputs), same=inputs.normalized,
        whole=inputs.norms is not None and inputs.features.shape[1] <= min(tile.step, tile.block),
    )  # fmt: skip
