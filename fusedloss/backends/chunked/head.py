"""A linear head walked in row chunks: a chunk's logits live in one reused buffer, and no product is formed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusedloss.backends.chunked.device_chunks import device_chunk_rows
from fusedloss.backends.chunked.products import multiply
from fusedloss.core.operands import LinearInputs

# A chunk's logits: each chunk reads the weight and its gradient again, so the largest that leaves peak memory small.
_CHUNK_BYTES = 56_000_000
# A weight that stays in the caches is read again for nothing: chunks go down to so many rows, or they were inefficient.
_CACHED_BYTES, _CHUNK_BYTES_OF_CACHED, _LEAST_ROWS = 1 << 22, 1 << 21, 512
_ROW_BYTES = 16  # with other rows, cuBLAS takes kernels of a fraction of the speed


class ChunkedHead:
    """The operands of the products, and the logits chunk by chunk; `prepared` readies fresh memory for writing."""

    def __init__(self, inputs: LinearInputs, prepared: Callable[[Tensor], Tensor]) -> None:
        self.inputs, self.prepared = inputs, prepared
        self.normalized = inputs.input_norm is not None
        self.dtype, self.compute_dtype = inputs.dtype, inputs.compute_dtype
        weight = inputs.weight
        # A copy is made where the products need another type; then it may as well hold unit rows.
        # In float16 a gradient over the length of its class row would leave the range.
        self.unit_weight = self.normalized and (weight.dtype != self.dtype or self.dtype == torch.float16)
        if self.unit_weight:
            # Divided in the compute dtype: a float16 row may be longer than float16 reaches.
            weight = weight.to(self.compute_dtype)
            weight = weight / inputs.class_norm.to(weight.dtype).unsqueeze(1)  # type: ignore[union-attr]
        self.operand = weight.to(self.dtype)
        self.scale = self._column_scale()
        self._latest: tuple[slice, Tensor] | None = None

    @property
    def most_rows(self) -> int:
        """The largest chunk."""
        weight, of_row = self.inputs.weight, len(self.inputs.weight) * self.dtype.itemsize
        if weight.device.type != "cpu":
            return device_chunk_rows(len(self.inputs.input), len(weight), weight.shape[1], self.dtype.itemsize)
        most = max(1, _CHUNK_BYTES // of_row)
        if weight.numel() * self.dtype.itemsize > _CACHED_BYTES:
            return most
        return min(most, max(_LEAST_ROWS, _CHUNK_BYTES_OF_CACHED // of_row))

    @property
    def _classes_aligned(self) -> int:
        """What the length of a row of logits in memory is a multiple of: products on a GPU need rows that are."""
        return 1 if self.inputs.weight.device.type == "cpu" else _ROW_BYTES // self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """0 without rows."""
        return -(-len(self.inputs.input) // self.most_rows)

    def chunks(self) -> Iterator[slice]:
        """Ranges of rows, of nearly the same length."""
        rows, count = len(self.inputs.input), self.num_chunks
        for i in range(count):
            yield slice(rows * i // count, rows * (i + 1) // count)

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk's products ``(rows, K)``; the buffer is the next chunk's too."""
        buffer: Tensor | None = None
        for rows in self.chunks():
            count = rows.stop - rows.start
            if buffer is None:
                # Chunks differ by a row at most.
                classes = len(self.operand)
                buffer = self.prepared(self.operand.new_empty(count + 1, classes + -classes % self._classes_aligned))
            found = buffer[:count, : len(self.operand)]
            torch.mm(self.rows(rows), self.operand.t(), out=found)
            yield rows, found

    def rows(self, rows: slice) -> Tensor:
        """The chunk of the input as it is multiplied; asked for twice in a row, the same tensor."""
        x, norm = self.inputs.input, self.inputs.input_norm
        if norm is None:
            return x[rows]
        if self._latest is None or self._latest[0] != rows:
            unit = x[rows].to(self.compute_dtype)
            unit = (unit / norm[rows].to(unit.dtype).unsqueeze(1)).to(self.dtype)
            self._latest = rows, unit
        return self._latest[1]

    def _column_scale(self) -> Tensor | None:
        """What multiplies a product to give z: the terms' scale over the length of the class row."""
        scale, norm = self.inputs.scale, self.inputs.class_norm
        if norm is None or self.unit_weight:
            return scale
        limit = torch.finfo(self.compute_dtype).max
        scale = norm.reciprocal() if scale is None else scale / norm
        return scale.clamp(-limit, limit).to(self.compute_dtype)

    def scale_gradient(self, gradient: Tensor) -> Tensor:
        """Of the terms' scale, from that of the scale that the sweep saw."""
        norm = self.inputs.class_norm
        return gradient if norm is None or self.unit_weight else (gradient / norm).to(gradient.dtype)


class HeadGradients:
    """Sums of products of grad_logits, and what makes them the gradients of input and weight."""

    def __init__(self, head: ChunkedHead, want_input: bool, want_weight: bool) -> None:
        self.head = head
        self.want_input, self.want_weight = want_input, want_weight
        # A row of the input's gradient is one product, and so is the weight's of one chunk: rounded once, as they are
        # stored, unless something is still added to them.
        once = not head.normalized
        self.input = self._sums(head.inputs.input, once) if want_input else None
        self.weight = self._sums(head.inputs.weight, once and head.num_chunks == 1) if want_weight else None
        self.started = False

    def _sums(self, like: Tensor, once: bool) -> Tensor:
        head = self.head
        dtype = head.dtype if once and like.dtype == head.dtype else head.compute_dtype
        return head.prepared(like.new_empty(like.shape, dtype=dtype))

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        """`grad_logits` are those of the chunk's products."""
        if self.input is not None:
            multiply(grad_logits, self.head.operand, self.input[rows], add=False)
        if self.weight is not None:
            multiply(grad_logits.t(), self.head.rows(rows), self.weight, add=self.started)
        self.started = True

    def zero_if_none_came(self) -> None:
        """Without a chunk the sums were never written."""
        if not self.started:
            for sums in (self.input, self.weight):
                if sums is not None:
                    sums.zero_()
