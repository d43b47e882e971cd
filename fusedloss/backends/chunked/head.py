"""A linear head walked in row chunks: a chunk's logits live in one reused buffer, and no product is formed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fusedloss.core.operands import LinearInputs

# A chunk's logits: each chunk reads the weight and its gradient again, so the largest that leaves peak memory small.
_CHUNK_BYTES = 56_000_000
_CHUNK_BYTES_ON_DEVICE = 1 << 28
# A weight that stays in the caches is read again for nothing: chunks go down to so many rows, or they were inefficient.
_CACHED_BYTES, _CHUNK_BYTES_OF_CACHED, _LEAST_ROWS = 1 << 22, 1 << 21, 512
_ADDED_AT_ONCE = 1 << 22


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
            return max(1, _CHUNK_BYTES_ON_DEVICE // of_row)
        most = max(1, _CHUNK_BYTES // of_row)
        if weight.numel() * self.dtype.itemsize > _CACHED_BYTES:
            return most
        return min(most, max(_LEAST_ROWS, _CHUNK_BYTES_OF_CACHED // of_row))

    def chunks(self) -> Iterator[slice]:
        """Ranges of rows, of nearly the same length."""
        rows = len(self.inputs.input)
        count = -(-rows // self.most_rows)
        for i in range(count):
            yield slice(rows * i // count, rows * (i + 1) // count)

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk's products ``(rows, K)``; the buffer is the next chunk's too."""
        buffer: Tensor | None = None
        for rows in self.chunks():
            count = rows.stop - rows.start
            if buffer is None:
                # Chunks differ by a row at most.
                buffer = self.prepared(self.operand.new_empty(count + 1, len(self.operand)))
            found = buffer[:count]
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
        self.input = self._accumulator(head.inputs.input) if want_input else None
        self.weight = self._accumulator(head.inputs.weight) if want_weight else None
        self.started = False

    def _accumulator(self, like: Tensor) -> Tensor:
        return self.head.prepared(like.new_empty(like.shape, dtype=self.head.compute_dtype))

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        """`grad_logits` are those of the chunk's products."""
        operand = self.head.operand
        same = operand.dtype == self.head.compute_dtype
        if self.input is not None:
            if same:
                torch.mm(grad_logits, operand, out=self.input[rows])
            else:
                self.input[rows] = torch.mm(grad_logits, operand)
        if self.weight is not None:
            x = self.head.rows(rows)
            if not same:
                self._add_widened(grad_logits, x)
            elif self.started:
                torch.addmm(self.weight, grad_logits.t(), x, out=self.weight)
            else:
                torch.mm(grad_logits.t(), x, out=self.weight)
        self.started = True

    def _add_widened(self, grad_logits: Tensor, x: Tensor) -> None:
        """A chunk's product is rounded once to 16 bits; chunks add up in float32."""
        assert self.weight is not None
        width = max(1, _ADDED_AT_ONCE // max(1, x.shape[1]))
        for start in range(0, len(self.weight), width):
            product = torch.mm(grad_logits[:, start : start + width].t(), x)
            part = self.weight[start : start + width]
            if self.started:
                part += product
            else:
                part.copy_(product)

    def zero_if_none_came(self) -> None:
        """Without a chunk the sums were never written."""
        if not self.started:
            for sums in (self.input, self.weight):
                if sums is not None:
                    sums.zero_()
