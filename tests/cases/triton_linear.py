"""Cases of the Triton backend's linear head, in small tiles and several ragged steps, and mutants of its kernels."""

import warnings

import linear_cases
import torch
import triton
import triton.language as tl
from triton_supcon import resolve_backend

from fusedloss.backends.chunked import head as chunked_head

# Rows, columns, features of a step and of a block: each loop of the kernels runs more than once.
ROWS, CLASSES, WIDTH, TILE = 19, 23, 21, (16, 16, 16, 16, 4)
_TYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
# What decides which kernels run: the type, the options, and whether gradients are made in the forward.
_LINEAR = (
    ("f32", "plain", "mean"), ("f32", "scale and prior", "none"), ("f32", "penalty", "mean"),
    ("f32", "soft cap", "none"), ("bf16", "plain", "mean"), ("bf16", "weight and smoothing", "none"),
    ("bf16", "scale and prior", "mean"), ("bf16", "focal and z loss", "mean"), ("bf16", "penalty", "mean"),
    ("bf16", "smoothing per row", "mean"), ("f16", "additive margin", "mean"), ("f16", "weight and smoothing", "mean"),
)  # fmt: skip
_COSINES = (
    ("f32", "angular", "mean"), ("f32", "temperature", "none"), ("f64", "margin, smoothing, weight", "mean"),
    ("bf16", "angular", "mean"), ("bf16", "angular", "none"), ("bf16", "temperature", "mean"),
    ("f16", "margin, smoothing, weight", "mean"),
)  # fmt: skip


def head(dtype, name, reduction, normalize):
    options = (linear_cases.COSINES if normalize else linear_cases.OPTIONS)[name]
    per_row = {key: _of_rows(value) for key, value in options.items()}
    return linear_cases.random_head(
        ROWS, CLASSES, WIDTH, dtype=_TYPES[dtype], normalize=normalize, bias=not normalize, reduction=reduction,
        spread=0.3, **per_row,
    )  # fmt: skip


def _of_rows(value):
    """Options with one value per row of nine, for the rows here."""
    if isinstance(value, torch.Tensor) and value.shape == (9,):
        return value.repeat(3)[:ROWS]
    return value


def right(dtype, name, reduction, normalize):
    def run(device):
        from fusedloss.backends.triton import launch, linear_rows

        case = head(dtype, name, reduction, normalize)
        before = linear_rows._forced_block, chunked_head._CHUNK_BYTES
        tile = launch.ProductTile(*TILE) if device == "cpu" else None
        if device == "cpu":
            linear_rows._forced_block, chunked_head._CHUNK_BYTES = 16, 7 * CLASSES * 4
        try:
            with resolve_backend(device), launch.forced(products=tile), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                linear_cases.check(case, lambda given: on(device, given))
        except AssertionError as error:
            return [str(error)]
        finally:
            linear_rows._forced_block, chunked_head._CHUNK_BYTES = before
        return []

    return run


def on(device, case):
    """The loss of a case whose tensors go to `device` and come back."""
    if device == "cpu":
        return linear_cases.fused(case)
    moved = {key: value.to(device) for key, value in vars(case).items() if isinstance(value, torch.Tensor)}
    of_case = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in vars(case.case).items()
    }
    of_case["terms"] = tuple(
        tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in term)
        for term in case.case.terms
    )
    whole = linear_cases.Head(**{**vars(case), **moved, "case": type(case.case)(**of_case)})
    return linear_cases.fused(whole).cpu()


CASES = {f"linear {' '.join(key)}": right(*key, False) for key in _LINEAR}
CASES |= {f"cosine {' '.join(key)}": right(*key, True) for key in _COSINES}


@triton.jit
def no_bias(head, product, right):
    z = product
    if head.scale is not None:
        z = z * tl.load(head.scale + right, mask=right < head.classes, other=0.0)[None, :]
    return tl.where((right < head.classes)[None, :], z, float("-inf"))


@triton.jit
def weights_of_one(head, right):
    return (right < head.classes).to(tl.float32)


@triton.jit
def no_tangent(pairs, row, label, grad, places, inside, OF_WEIGHT: tl.constexpr):
    x = tl.load(pairs.input + row * pairs.width + places, mask=inside, other=0.0).to(tl.float64)
    w = tl.load(pairs.weight + label * pairs.width + places, mask=inside, other=0.0).to(tl.float64)
    return grad * (x if OF_WEIGHT else w)


def mutants(device):
    """Wrong kernels must fail the comparison."""
    from fusedloss.backends.triton import linear_rows, linear_tiles

    wrong = []
    for module, name, function, case in (
        (linear_tiles, "logits_of", no_bias, ("bf16", "plain", "mean", False)),
        (linear_tiles, "class_weights", weights_of_one, ("bf16", "weight and smoothing", "mean", False)),
        (linear_rows, "product_grad", no_tangent, ("f32", "angular", "mean", True)),
    ):
        before = getattr(module, name)
        setattr(module, name, function)
        try:
            if not right(*case)(device):
                wrong.append(f"{name} may be {function.__name__}")
        finally:
            setattr(module, name, before)
    return wrong
