"""Cases of the Triton backend's linear head, in chunks of a few rows and several ragged steps, and mutants."""

import warnings
from unittest import mock

import linear_cases
import torch
import triton
import triton.language as tl
from triton_supcon import resolve_backend

from fusedloss.backends.chunked import device_chunks
from fusedloss.backends.chunked import head as chunked_head

# Chunks of a few rows, and blocks of 16 features: each loop runs more than once.
ROWS, CLASSES, WIDTH, CHUNK, BLOCK = 19, 23, 21, 7, 16
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
        case = head(dtype, name, reduction, normalize)
        return checked(case, device, CHUNK * CLASSES * 4, BLOCK)

    return run


def checked(case, device, chunk_bytes, block):
    """What is wrong with a case in such chunks, in words; kernels have their own block sizes on a GPU."""
    from fusedloss.backends.triton import linear_rows

    with mock.patch.multiple(device_chunks, _CHUNK_BYTES=chunk_bytes, _FEWEST_ROWS=1), \
         mock.patch.object(chunked_head, "_CHUNK_BYTES", chunk_bytes), \
         mock.patch.object(chunked_head.ChunkedHead, "_classes_aligned", 8), \
         mock.patch.object(linear_rows, "_forced_block", block if device == "cpu" else None), \
         resolve_backend(device), warnings.catch_warnings():  # fmt: skip
        warnings.simplefilter("ignore")
        try:
            linear_cases.check(case, lambda given: on(device, given))
        except AssertionError as error:
            return [str(error)]
    return []


def wide(dtype, normalize):
    """200 rows, 300 classes and 200 features, in chunks of 64 rows."""

    def run(device):
        terms = (("angular", 0.5, "monotone", "exact"), ("scale", 8.0)) if normalize else ()
        case = linear_cases.random_head(
            200, 300, 200, dtype=_TYPES[dtype], normalize=normalize, bias=not normalize, spread=0.1, terms=terms
        )
        return checked(case, device, 64 * 300 * case.x.element_size(), 64)

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
CASES |= {f"linear 200 x 300 x 200 {dtype}": wide(dtype, False) for dtype in ("f32", "bf16")}
CASES |= {f"cosine 200 x 300 x 200 {dtype}": wide(dtype, True) for dtype in ("f32", "bf16")}


def norms(device):
    """Lengths of rows of every type and of any width, in double; zeros are infinite."""
    from fusedloss.backends.triton import linear_rows

    wrong = []
    generator = torch.Generator().manual_seed(3)
    for dtype in _TYPES.values():
        for rows, width in ((1, 1), (5, 40), (37, 600), (3, 0), (0, 7)):
            x = torch.randn(rows, width, generator=generator).to(dtype)
            x[-1:] = 0
            truth = torch.linalg.vector_norm(x.double(), dim=1)
            truth = torch.where(truth == 0, torch.inf, truth)
            got = linear_rows.row_norms(x.to(device)).cpu()
            if not torch.allclose(got, truth, rtol=1e-14, atol=0):
                wrong.append(f"{dtype} {rows} x {width}: {got.tolist()}, not {truth.tolist()}")
    return wrong


CASES["linear norms"] = norms


@triton.jit
def no_tangent(pairs, row, label, grad, places, inside, OF_WEIGHT: tl.constexpr):
    x = tl.load(pairs.input + row * pairs.width + places, mask=inside, other=0.0).to(tl.float64)
    w = tl.load(pairs.weight + label * pairs.width + places, mask=inside, other=0.0).to(tl.float64)
    return grad * (x if OF_WEIGHT else w)


def mutants(device):
    """Wrong kernels must fail the comparison."""
    from fusedloss.backends.triton import linear_rows

    before = linear_rows.product_grad
    linear_rows.product_grad = no_tangent
    try:
        found = right("f32", "angular", "mean", True)(device)
    finally:
        linear_rows.product_grad = before
    return [] if found else ["product_grad may be no_tangent"]
