"""Chunks of a linear head on a GPU, without one: their size, the share predicted of them, float32 sums, launches."""

import pytest
import torch
from launch_count import launches_of
from linear_cases import random_head

from bench import chunk_model
from fusedloss import AdditiveMargin, linear_cross_entropy
from fusedloss.backends.chunked import head, products
from fusedloss.backends.chunked.device_chunks import bytes_per_logit, device_chunk_rows

SHAPES = [
    (rows, classes, width)
    for rows in (1, 4096, 65536)
    for classes in (2, 1000, 10000, 16000, 32000, 131072, 1000000)
    for width in (1, 128, 768, 1024, 4096)
]


@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks_keep_their_memory_and_are_long(itemsize):
    for rows, classes, width in SHAPES:
        chunk = device_chunk_rows(rows, classes, width, itemsize)
        assert 1 <= chunk <= rows
        budget = max(1 << 29, classes * width * (itemsize + 4))
        assert chunk == 1 or chunk * classes * itemsize <= budget
        if chunk < min(rows, 2048):
            # What limits it is the memory, or it stays in the cache, where no sums leave it.
            cached = chunk * classes * itemsize <= 20_000_000 and classes * width * 4 <= 20_000_000
            assert cached or (chunk + 1) * classes * itemsize > budget


def test_chunks_stay_in_the_cache_where_that_moves_fewer_bytes():
    assert device_chunk_rows(65536, 1000, 1024, 2) == 10000
    assert device_chunk_rows(65536, 5000, 1024, 2) == 2000
    # Sums of 65 MB would be read and written 26 times over.
    assert device_chunk_rows(16384, 16000, 1024, 2) == (1 << 28) // 32000
    assert bytes_per_logit(16384, 625, 16000, 1024, 2) > bytes_per_logit(16384, 8388, 16000, 1024, 2)


@pytest.mark.parametrize("device", chunk_model.DEVICES)
def test_predicted_share_of_products(device):
    limits = chunk_model.DEVICES[device]
    shares = {
        shape: chunk_model.share_of_products(limits, *shape)
        for shape in SHAPES
        if shape[0] >= 4096 and shape[1] >= 1000
    }
    assert all(share >= 0.6 for (_, _, width), share in shares.items() if width >= 768)
    assert all(0 < share < 1 for share in shares.values())
    # A chunk of 134 rows, as a fixed quarter of a gigabyte would be at a million classes.
    few = chunk_model.share_of_products(limits, 134, 1000000, 768)
    assert few == pytest.approx(chunk_model.share_of_products(limits, 134, 100000, 768), rel=0.01)


def float32_products(compute=True):
    """``mm`` and ``addmm`` of 16-bit matrices into float32 ones, which PyTorch has on GPUs, for a CPU."""
    library = torch.library.Library("aten", "IMPL")

    def mm(left, right, dtype, *, out):
        assert left.dtype == right.dtype != dtype == out.dtype
        return out.copy_(left.double() @ right.double()) if compute else out

    def addmm(addend, left, right, dtype, *, beta=1, alpha=1, out):
        assert left.dtype == right.dtype != dtype == out.dtype == addend.dtype
        return out.copy_(beta * addend + alpha * (left.double() @ right.double())) if compute else out

    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    return library


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_add_up_in_float32(monkeypatch, dtype, wide):
    monkeypatch.setattr(products, "_ADDED_AT_ONCE", 3 * 7)
    left, right = torch.randn(40, 11).to(dtype), torch.randn(11, 7).to(dtype)
    truth = left.double() @ right.double()
    library = float32_products() if wide else None
    monkeypatch.setattr(products, "writes_float32", lambda device_type: wide)
    try:
        out = torch.full((40, 7), torch.nan)
        products.multiply(left, right, out, add=False)
        # Rounded to 16 bits on the way, or not.
        rounding = torch.finfo(torch.float32 if wide else dtype).eps
        torch.testing.assert_close(out.double(), truth, rtol=rounding, atol=8 * rounding)
        products.multiply(left, right, out, add=True)
        torch.testing.assert_close(out.double(), 2 * truth, rtol=2 * rounding, atol=16 * rounding)
        narrow = torch.empty(40, 7, dtype=dtype)
        products.multiply(left, right, narrow, add=False)
        assert torch.equal(narrow, truth.to(dtype)) or (narrow.double() - truth).abs().max() < 0.1
    finally:
        if library is not None:
            library._destroy()


@pytest.mark.parametrize(
    ("version", "expected"), [("2.8.0", False), ("2.9.1", False), ("2.10.0", True), ("2.14.1+cu130", True)]
)
def test_float32_products_are_asked_for_where_pytorch_has_them(monkeypatch, version, expected):
    monkeypatch.setattr(torch, "__version__", version)
    for device_type, there in (("cuda", expected), ("cpu", False), ("xpu", False)):
        products.writes_float32.cache_clear()
        assert products.writes_float32(device_type) is there
    products.writes_float32.cache_clear()


def launches(monkeypatch, chunks, **options):
    """Forward and backward of a head of 16 bits in so many chunks."""
    monkeypatch.setattr(head, "_CHUNK_BYTES", -(-40 // chunks) * 30 * 2)
    library = float32_products(compute=False)
    monkeypatch.setattr(products, "writes_float32", lambda device_type: True)
    case = random_head(rows=40, num_classes=30, width=20, dtype=torch.bfloat16)
    x, w = case.x.requires_grad_(), case.w.requires_grad_()
    try:
        counted = launches_of(lambda: linear_cross_entropy(x, w, case.case.target, **options).backward())
    finally:
        library._destroy()
    return counted


@pytest.mark.parametrize(
    ("options", "of_call", "of_chunk"), [({}, 18, 8), ({"normalize": True, "terms": [AdditiveMargin(0.3)]}, 54, 13)]
)
def test_launches(monkeypatch, options, of_call, of_chunk):
    """Each chunk is three products and the softmax of its rows; what else there is doesn't grow with their number."""
    for chunks in (1, 2, 8):
        counted = launches(monkeypatch, chunks, **options)
        assert counted["mm"] + counted["addmm"] == 3 * chunks, counted
        assert counted["row_kernel"] == chunks, counted
        assert counted.total() <= of_call + of_chunk * chunks, counted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_lengths_are_taken_without_a_copy(dtype):
    from fusedloss.backends.triton.linear_ce import row_norms

    assert launches_of(lambda: row_norms(torch.ones(7, 5, dtype=dtype)[:3])) == {"ones": 1, "norm_kernel": 1}
