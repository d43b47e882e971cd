"""Full-batch multinomial logistic regression with scikit-learn's objective, over a path of C.

``fit_logistic_path(rows, num_classes, c, ...)`` minimizes for each C, in increasing order,

    C * sum_i s_i * loss_i + 0.5 * |W|^2,        z_i = a * (W x_i + b) + log_prior

with a bias that isn't penalised, as ``sklearn.linear_model.LogisticRegression(solver="lbfgs")`` does. ``loss_i`` is the
cross-entropy of softmax(z_i), with label smoothing and class weights as ``fusedloss.cross_entropy`` has them; a, one
over the class temperatures, and log_prior are constants. It returns a ``LogisticFit`` for each C: weight ``(K, D)`` and
bias ``(K,)`` of raw features, without log_prior and temperatures.

How it is fast: the features are centred and rotated once (``basis.py``), L-BFGS searches in the metric of an
approximate Hessian that is found anew for each C (``metric.py``), and a pass over the rows is two matrix products
around the fused softmax.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedloss.core.checks import check_integer, check_number
from fusedloss.core.operands import LinearInputs, LinearMask, RowInputs
from fusedloss.core.row_loss import RowOptions
from fusedloss.train.solvers.basis import CentredRows, centred_rows
from fusedloss.train.solvers.lbfgs import minimize
from fusedloss.train.solvers.metric import ClassMetric, class_metric
from fusedloss.train.solvers.rows import RowSource, check_labels

_MASK = LinearMask(weight=True, bias=True)


@dataclass(frozen=True, eq=False)
class LogisticSettings:
    """The frozen options of the loss, and when to stop.

    Args:
        class_weight: ``(K,)``, not negative; multiplies the loss of each row by its label's.
        sample_weight: ``(N,)``, not negative.
        log_prior: ``(K,)``, added to the logits while fitting (logit adjustment); -inf only for classes without rows.
        class_temperature: positive, a float or ``(K,)``; divides ``W x + b`` while fitting.
        label_smoothing: in [0, 1).
        tolerance: has converged where the objective is about this share of it above its minimum.
        max_iterations: of each C.
        memory: steps that L-BFGS remembers.
        dtype: float32, or float64 for more digits.
        keep_bytes: a copy of the features in `dtype` up to this size is kept; beyond, they are read at each pass.
    """

    class_weight: Tensor | None = None
    sample_weight: Tensor | None = None
    log_prior: Tensor | None = None
    class_temperature: Tensor | float | None = None
    label_smoothing: float = 0.0
    tolerance: float = 1e-7
    max_iterations: int = 1000
    memory: int = 20
    dtype: torch.dtype = torch.float32
    keep_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        check_number("label_smoothing", self.label_smoothing, at_least=0.0, below=1.0)
        check_number("tolerance", self.tolerance, above=0.0)
        check_integer("max_iterations", self.max_iterations, at_least=1)
        check_integer("memory", self.memory, at_least=1)
        check_integer("keep_bytes", self.keep_bytes, at_least=0)
        if self.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64; got {self.dtype}")

    def checked(self, num_rows: int, num_classes: int) -> None:
        """Raises unless every tensor fits these rows and classes."""
        temperature = self.class_temperature
        if temperature is not None and not isinstance(temperature, Tensor):
            check_number("class_temperature", temperature, above=0.0)
            temperature = None
        _check_vector("class_weight", self.class_weight, num_classes, lambda value: value >= 0, "not negative")
        _check_vector("sample_weight", self.sample_weight, num_rows, lambda value: value >= 0, "not negative")
        _check_vector("class_temperature", temperature, num_classes, lambda value: value > 0, "positive")
        # -inf is for classes without rows, which are left out later
        below = torch.zeros(()) if self.log_prior is None else self.log_prior.nan_to_num(nan=torch.inf, neginf=0.0)
        if self.log_prior is not None:
            _check_vector("log_prior", below, num_classes, lambda value: value < torch.inf, "below infinity")


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """The minimum at one C.

    Attributes:
        c: scikit-learn's C.
        weight: ``(K, D)`` for raw features; bias: ``(K,)``. A class without rows has weight 0 and a bias below all
            others' (unless labels are smoothed).
        objective: ``C * sum_i s_i * loss_i + 0.5 * |W|^2``.
        gradient_norm: the largest element of the gradient of the objective over ``C * sum_i s_i``, which scikit-learn
            compares with its ``tol``.
        iterations, evaluations: steps, and passes over the rows.
        converged: False where `max_iterations` came first.
    """

    c: float
    weight: Tensor
    bias: Tensor
    objective: float
    gradient_norm: float
    iterations: int
    evaluations: int
    converged: bool


def fit_logistic_path(
    rows: RowSource,
    num_classes: int,
    c: Sequence[float],
    settings: LogisticSettings | None = None,
    *,
    finished: Sequence[LogisticFit] = (),
    on_fit: Callable[[LogisticFit], None] | None = None,
) -> list[LogisticFit]:
    """Logistic regression for each C of an increasing sequence, each started from the one before.

    Args:
        rows: ``TensorRows``, ``ArrayRows`` or another source of features and labels in ``[0, K)``, on one device.
        num_classes: K.
        c: positive, increasing.
        settings: frozen options of the loss, tolerance, dtype.
        finished: fits of the first values of `c` from an interrupted call; the rest comes out with the same bits.
        on_fit: called with each new fit, to save it.

    Raises:
        ValueError, TypeError: arguments that don't fit; features that aren't finite; no row with a positive weight.

    Source: the objective of ``sklearn.linear_model.LogisticRegression``; L-BFGS: Nocedal 1980; the metric: the diagonal
    blocks of the Hessian (Böhning 1992), each a diagonal in the basis and a matrix of rank one.

    >>> import torch
    >>> from fusedloss.train.solvers.rows import TensorRows
    >>> rows = TensorRows(torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1]))
    >>> fits = fit_logistic_path(rows, 2, [0.1, 10.0])
    >>> (rows.features @ fits[1].weight.T + fits[1].bias).argmax(1)
    tensor([0, 0, 1])
    """
    settings = settings or LogisticSettings()
    check_integer("num_classes", num_classes, at_least=1)
    if len(rows) == 0:
        raise ValueError("rows must number at least 1; got 0")
    values = _checked_path(c, finished)
    settings.checked(len(rows), num_classes)
    problem = _Problem(rows, num_classes, settings)
    fits = list(finished)
    for value in values[len(fits) :]:
        fits.append(problem.fit(value, fits))
        if on_fit is not None:
            on_fit(fits[-1])
    return fits


def _checked_path(c: Sequence[float], finished: Sequence[LogisticFit]) -> list[float]:
    values = [float(check_number("c", value, above=0.0)) for value in c]
    if not values or any(right <= left for left, right in itertools.pairwise(values)):
        raise ValueError(f"c must be increasing and not empty; got {values}")
    done = [fit.c for fit in finished]
    if done != values[: len(done)]:
        raise ValueError(f"finished must be fits of the first values of c, {values}; got {done}")
    return values


def _check_vector(name: str, value: Tensor | None, count: int, allowed: Callable[[Tensor], Tensor], words: str) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or tuple(value.shape) != (count,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor ({count},); got {got}")
    if not bool((allowed(value) & torch.isfinite(value)).all()):
        raise ValueError(f"{name} must be finite and {words}; got {float(value[~allowed(value)].flatten()[:1].sum())}")


class _Problem:
    """The rows in their basis and the frozen terms; points are ``(K, D + 1)``: weights in the basis, then the bias."""

    def __init__(self, source: RowSource, num_classes: int, settings: LogisticSettings) -> None:
        self.settings, self.num_classes = settings, num_classes
        self.dtype, self.device = settings.dtype, _device_of(source)
        self.class_weight = self._vector(settings.class_weight)
        self.sample_weight = self._vector(settings.sample_weight)
        self.scale = self._scale()
        row_weight = self._row_weight(source)
        if not float(row_weight.sum()) > 0:
            raise ValueError("sample_weight and class_weight must leave a row with a positive weight; got none")
        self.rows: CentredRows = centred_rows(source, row_weight, num_classes, self.dtype, settings.keep_bytes)
        self.total = float(self.rows.mass.sum())
        self.options = list(RowOptions(label_smoothing=settings.label_smoothing))
        self.absent = self._absent()
        self.log_prior = self._log_prior()

    def _vector(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to(self.device, self.dtype).contiguous()

    def _scale(self) -> Tensor | None:
        temperature = self.settings.class_temperature
        if temperature is None:
            return None
        tau = torch.as_tensor(temperature, dtype=torch.float64).expand(self.num_classes)
        return tau.reciprocal().to(self.device, self.dtype).contiguous()

    def _row_weight(self, source: RowSource) -> Tensor:
        weight = torch.ones(len(source), dtype=torch.float64, device=self.device)
        if self.sample_weight is not None:
            weight *= self.sample_weight
        if self.class_weight is not None:
            labels = torch.cat([labels for _, labels in source])
            check_labels(labels, self.num_classes)
            weight *= self.class_weight[labels]
        return weight

    def _absent(self) -> Tensor | None:
        """Classes whose probability only ever falls: left out, or their bias would never arrive."""
        absent = self.rows.mass == 0
        return absent if self.settings.label_smoothing == 0 and bool(absent.any()) else None

    def _log_prior(self) -> Tensor | None:
        prior = self._vector(self.settings.log_prior)
        if self.absent is None:
            pass
        elif prior is None:
            prior = torch.zeros(self.num_classes, dtype=self.dtype, device=self.device)
            prior[self.absent] = -torch.inf
        else:
            prior = prior.masked_fill(self.absent, -torch.inf)
        if prior is not None and bool((torch.isinf(prior) & (self.absent is None or ~self.absent)).any()):
            raise ValueError("log_prior must be finite for classes that have rows or smoothed labels; got -inf")
        return prior

    def fit(self, c: float, earlier: Sequence[LogisticFit]) -> LogisticFit:
        decay = 1 / (c * self.total)
        start = self._point(earlier[-1]) if earlier else self._first_point()
        eps = torch.finfo(torch.float32 if self.dtype == torch.float32 else torch.float64).eps
        found = minimize(
            lambda point: self.evaluate(point, decay),
            start,
            self._metric(start, decay).solve,
            tolerance=self.settings.tolerance,
            max_iterations=self.settings.max_iterations,
            memory=self.settings.memory,
            resolution=eps,
        )
        weight, bias = self._raw(found.point)
        norm = self._gradient_norm(found.gradient)
        objective = found.value * c * self.total
        return LogisticFit(c, weight, bias, objective, norm, found.iterations, found.evaluations, found.converged)

    def evaluate(self, point: Tensor, decay: float) -> tuple[float, Tensor]:
        """Mean loss plus ``decay / 2 * |W|^2``, and its gradient."""
        weight, bias = point[:, :-1].contiguous(), point[:, -1]
        operand = weight if self.rows.rotated else weight @ self.rows.vectors.t()
        offset = bias if self.scale is None else bias * self.scale
        offset = (offset if self.log_prior is None else offset + self.log_prior).contiguous()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        gradients: list[Tensor] = []
        for features, labels, rows in self.rows.chunks():
            inputs = LinearInputs(
                features, operand, labels, scale=self.scale, bias=offset, class_weight=self.class_weight
            )
            weights = None if self.sample_weight is None else self.sample_weight[rows]
            of_rows = RowInputs(sample_weight=weights)
            _, row_loss, grads = torch.ops.fusedloss.linear_ce.default(
                *inputs, *of_rows, self.options, False, list(_MASK)
            )
            loss += (row_loss.double() if weights is None else row_loss.double() * weights).sum()
            gradients = [sum_.add_(grad) for sum_, grad in zip(gradients, grads, strict=True)] if gradients else grads
        of_weight, of_bias = gradients
        if not self.rows.rotated:
            of_weight = of_weight @ self.rows.vectors
        gradient = torch.empty_like(point)
        torch.add(weight * decay, of_weight, alpha=1 / self.total, out=gradient[:, :-1])
        gradient[:, -1] = (of_bias if self.scale is None else of_bias * self.scale) / self.total
        value = float(loss) / self.total + 0.5 * decay * float(weight.double().square().sum())
        return value, gradient

    def _first_point(self) -> Tensor:
        """The minimum without features: the classes' shares of the weight."""
        smoothing = self.settings.label_smoothing
        share = (1 - smoothing) * self.rows.mass / self.total + smoothing / self.num_classes
        bias = share.log().to(self.dtype)
        bias = bias if self.log_prior is None else bias - self.log_prior
        bias = bias if self.scale is None else bias / self.scale
        point = self.rows.vectors.new_zeros(self.num_classes, self.rows.source.width + 1)
        point[:, -1] = bias if self.absent is None else bias.masked_fill(self.absent, 0)
        return point

    def _probabilities(self, point: Tensor) -> Tensor:
        """Of the probe rows ``(P, K)``."""
        logits = torch.addmm(point[:, -1], self.rows.probe[0], point[:, :-1].t())
        logits = logits if self.scale is None else logits.mul_(self.scale)
        return (logits if self.log_prior is None else logits.add_(self.log_prior)).softmax(1)

    def _metric(self, point: Tensor, decay: float) -> ClassMetric:
        features, weight = self.rows.probe
        p = self._probabilities(point)
        spread = weight[:, None] * (p - p * p)
        if self.scale is not None:
            spread *= self.scale.square()
        return class_metric(features, spread, decay, least=1e-3 / max(self.total, self.num_classes))

    def _raw(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias for features that are neither centred nor rotated."""
        weight, bias = point[:, :-1] @ self.rows.vectors.t(), point[:, -1].double()
        if self.absent is not None:
            present = bias[~self.absent]
            bias = bias.masked_fill(self.absent, float(present.min() - len(present) - 1))
        if self.scale is None:
            bias = bias - bias.mean()
        bias = bias - weight.double() @ self.rows.mean.double()
        return weight, bias.to(self.dtype)

    def _point(self, fit: LogisticFit) -> Tensor:
        """The point whose `_raw` is this fit, but for rounding: what a resumed path has, too."""
        weight, bias = fit.weight.to(self.device, self.dtype), fit.bias.to(self.device, self.dtype)
        if weight.shape != (self.num_classes, self.rows.source.width):
            got = tuple(weight.shape)
            raise ValueError(f"finished must have weights ({self.num_classes}, {self.rows.source.width}); got {got}")
        bias = (bias.double() + weight.double() @ self.rows.mean.double()).to(self.dtype)
        if self.absent is not None:
            bias = bias.masked_fill(self.absent, 0)
        return torch.cat([weight @ self.rows.vectors, bias[:, None]], dim=1)

    def _gradient_norm(self, gradient: Tensor) -> float:
        of_bias = gradient[:, -1]
        of_weight = gradient[:, :-1] @ self.rows.vectors.t() + of_bias[:, None] * self.rows.mean
        return float(torch.maximum(of_weight.abs().max(), of_bias.abs().max()))


def _device_of(source: RowSource) -> torch.device:
    for features, _ in source:
        return features.device
    raise ValueError("rows must number at least 1; got 0")
