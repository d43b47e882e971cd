"""A training step over tensors that stay where they are, so that a GPU can capture it once and replay it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Steps outside the graph, real ones: they allocate gradients and optimizer state, and compile the kernels.
_STEPS_BEFORE_CAPTURE = 3


class BufferedStep:
    """Gathers a batch from rows that lie on the device, fills the gradients, updates, and adds up the loss.

    What changes between steps is in tensors: the row numbers, the learning rate (`rate`, which the optimizer reads),
    the sum of the losses over rows (`total`). With `capture` full batches are replayed as one CUDA graph; a shorter one
    runs as it does without.

    Raises:
        ValueError: capture on another device than a GPU.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, gradients: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer, batch_size: int, capture: bool = False,
    ) -> None:  # fmt: skip
        device = features.device
        if capture and device.type != "cuda":
            raise ValueError(f"capture must be False unless the features are on a GPU; got features on {device}")
        self.features, self.labels, self.gradients, self.optimizer = features, labels, gradients, optimizer
        self.rows = torch.empty(batch_size, dtype=torch.int64, device=device)
        self.batch_features = features.new_empty(batch_size, features.shape[1])
        self.batch_labels = labels.new_empty(batch_size)
        self.total = torch.zeros((), device=device)
        self.rate = rate_tensor(device)
        self.stream = torch.cuda.Stream(device) if capture else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps_seen = 0

    def __call__(self, rows: Tensor, lr: float) -> None:
        """One step on the rows of these numbers (int64, on the device)."""
        for group in self.optimizer.param_groups:
            # A restored optimizer has its own copy of the rate.
            group["lr"] = self.rate
        self.rate.fill_(lr)
        self.rows[: len(rows)].copy_(rows)
        if self.stream is None or len(rows) < len(self.rows):
            self._run(len(rows))
        else:
            self._run_or_replay(self.stream)

    def _run(self, count: int) -> None:
        rows = self.rows[:count]
        x = torch.index_select(self.features, 0, rows, out=self.batch_features[:count])
        y = torch.index_select(self.labels, 0, rows, out=self.batch_labels[:count])
        self.total += self.gradients(x, y) * count
        self.optimizer.step()

    def _run_or_replay(self, stream: torch.cuda.Stream) -> None:
        """A full batch: eagerly at first, then captured (which runs nothing) and replayed from then on."""
        outside = torch.cuda.current_stream()
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            self.steps_seen += 1
            if self.steps_seen <= _STEPS_BEFORE_CAPTURE:
                self._run(len(self.rows))
            else:
                if self.graph is None:
                    self.graph = self._captured(stream)
                self.graph.replay()
        outside.wait_stream(stream)

    def _captured(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._run(len(self.rows))
        return graph


def rate_tensor(device: torch.device) -> Tensor:
    """A learning rate that can be changed under a captured step; in float64 a CPU's update has a float's bits."""
    return torch.zeros((), device=device, dtype=torch.float32 if device.type == "cuda" else torch.float64)
