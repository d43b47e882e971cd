"""How well features find their own class: Recall@1, MAP@R and TAR@FAR, by pytorch-metric-learning and scikit-learn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fusedloss.core.checks import check_ignore_index, check_integer_tensor, check_number, check_tensor
from fusedloss.core.normalize import unit_rows

_PAIRS_AT_MOST = 20_000_000


def retrieval_report(
    features: Tensor,
    labels: Tensor,
    *,
    false_accept_rates: Sequence[float] = (1e-2, 1e-3),
    ignore_index: int = -100,
) -> dict[str, float]:
    """Retrieval by cosine among the rows themselves, and verification of pairs.

    ``recall_at_1``: share of rows whose nearest other row has their class. ``map_at_r``: mean average precision at R,
    R the number of other rows of the class (Musgrave et al. 2020, arXiv:2003.08505). ``tar_at_far_1e-03``: share of
    pairs of one class accepted at the threshold that accepts that share of pairs of two classes.

    Args:
        features: ``(N, D)``; only directions count. labels: ``(N,)`` integers.
        false_accept_rates: in (0, 1).
        ignore_index: rows with this label are left out.

    Raises:
        ValueError: shapes that don't fit, no class with two rows, fewer than two classes, or pairs beyond memory.
        ImportError: pytorch-metric-learning is missing: ``pip install "fusedloss[metric]"``.

    >>> import torch
    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> retrieval_report(features, torch.tensor([0, 0, 1, 1]), false_accept_rates=[0.01])
    {'recall_at_1': 1.0, 'map_at_r': 1.0, 'tar_at_far_1e-02': 1.0}
    """
    check_tensor("features", features, ("N", "D"))
    check_integer_tensor("labels", labels, (len(features),))
    ignore_index = check_ignore_index(ignore_index)
    if isinstance(false_accept_rates, (str, Tensor)) or not isinstance(false_accept_rates, Iterable):
        got = type(false_accept_rates).__name__
        raise TypeError(f"false_accept_rates must be a sequence of numbers; got {got}")
    for rate in false_accept_rates:
        check_number("false_accept_rates", rate, above=0.0, below=1.0)
    if features.device.type == "meta":
        raise ValueError("features must hold values; got a tensor on the meta device")
    kept = labels != ignore_index
    features, labels = unit_rows(features[kept].detach().float().cpu()), labels[kept].cpu()
    counts = torch.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or int(counts.max()) < 2:
        raise ValueError(
            "labels must hold two classes, one of them with two rows, for anything to be retrieved; got "
            f"{len(counts)} in {len(labels)} rows"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features must be finite; got NaN or an infinity")
    if len(labels) * (len(labels) - 1) // 2 > _PAIRS_AT_MOST:
        raise ValueError(
            f"features must have at most {_PAIRS_AT_MOST} pairs of rows (pass a sample of rows); got {len(labels)} rows"
        )
    # Rows that are alone in their class have nothing to find, but may be found.
    return _nearest(features, labels) | _verification(features, labels, false_accept_rates)


def _nearest(features: Tensor, labels: Tensor) -> dict[str, float]:
    try:
        from pytorch_metric_learning.distances import CosineSimilarity
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        from pytorch_metric_learning.utils.inference import CustomKNN
    except ImportError as error:
        raise ImportError('retrieval_report needs pytorch-metric-learning: pip install "fusedloss[metric]"') from error
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity(), batch_size=1024),
        device=torch.device("cpu"),
    )
    accuracy = calculator.get_accuracy(features, labels)
    return {
        "recall_at_1": float(accuracy["precision_at_1"]),
        "map_at_r": float(accuracy["mean_average_precision_at_r"]),
    }


def _verification(features: Tensor, labels: Tensor, rates: Sequence[float]) -> dict[str, float]:
    import numpy as np
    from sklearn.metrics import roc_curve

    first, second = torch.triu_indices(len(labels), len(labels), 1)
    score = (features @ features.t())[first, second]
    false_accepted, accepted, _ = roc_curve((labels[first] == labels[second]).numpy(), score.numpy())
    return {
        f"tar_at_far_{rate:.0e}": float(accepted[np.searchsorted(false_accepted, rate, side="right") - 1])
        for rate in rates
    }
