"""The calls that are judged: a loss or statistics at one shape, type and set of options, beside eager's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss

STEMS = ("softmax_ce", "linear_ce", "supcon", "class_stats")
LOGITS = 2**27
CLASSES = (100, 1000, 10000, 32000, 128256)
_LINEAR_ROWS = 8192
_SUPCON_CLASSES = 100
MARGIN, SCALE, TEMPERATURE = 0.5, 64.0, 0.1
_CAP = 30.0
_PER_ROW = ("learned smoothing", "sample weights")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Prepared:
    """A call, eager's code for the same (None: not compared), and the tensors that a backward gives gradients."""

    call: Call
    eager: Call | None = None
    leaves: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Case:
    """Instructions are counted per one of `elements`; `bytes` or `flops` are the least that any code needs."""

    stem: str
    label: str
    dtype: torch.dtype
    elements: int
    prepare: Callable[[], Prepared]
    bytes: int = 0
    flops: int = 0
    quick: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.stem} {self.dtype_name} {self.label}"


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda").requires_grad_()


def _labels(rows: int, classes: int) -> Tensor:
    """Spread over the classes, in an order that isn't theirs."""
    return torch.arange(rows, device="cuda") * 7919 % classes


def _options(name: str, rows: int, classes: int) -> tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor] | None]:
    """Keywords of cross_entropy, and eager's code where people write one."""
    per_class, per_row = torch.empty(classes, device="cuda"), torch.empty(rows, device="cuda")
    keywords: dict[str, Any] = {}
    eager: Callable[[Tensor, Tensor], Tensor] | None = None
    for word in name.split(" + "):
        if word == "plain":
            eager = F.cross_entropy
        elif word == "class temperatures":
            keywords.setdefault("terms", []).append(fusedloss.ClassTemperature(per_class))
            eager = lambda x, y: F.cross_entropy(x / per_class.to(x.dtype), y)  # noqa: E731
        elif word == "smoothing":
            keywords["label_smoothing"] = 0.1
            eager = partial(F.cross_entropy, label_smoothing=0.1)
        elif word == "learned smoothing":
            keywords["label_smoothing"] = per_row
        elif word == "focal":
            keywords["focal_gamma"] = 2.0
        elif word == "poly":
            keywords["poly_epsilon"] = 1.0
        elif word == "z-loss":
            keywords["z_loss"] = 1e-4
        elif word == "prior":
            keywords.setdefault("terms", []).append(fusedloss.Prior(per_class))
        elif word == "class weights":
            keywords["weight"] = per_class
        elif word == "sample weights":
            keywords["sample_weight"] = per_row
        elif word == "penalty":
            keywords["margin_penalty"] = fusedloss.MarginPenalty(10.0, 0.1)
        elif word == "soft cap":
            keywords.setdefault("terms", []).append(fusedloss.SoftCap(_CAP))
        elif word == "margin":
            keywords["terms"] = [fusedloss.AngularMargin(MARGIN), fusedloss.Scale(SCALE)]
        elif word == "statistics":
            keywords["return_stats"] = True
        elif word != "probabilities":
            raise ValueError(f"options must be known; got {word!r}")
    return keywords, eager


OPTIONS = (
    "smoothing", "focal", "poly", "z-loss", "prior", "class weights", "sample weights", "penalty", "soft cap", "margin",
    "probabilities", "statistics", "class temperatures + prior + class weights + smoothing + focal",
)  # fmt: skip


def _softmax(rows: int, classes: int, dtype: torch.dtype, name: str) -> Prepared:
    x, y = _leaf(rows, classes, dtype=dtype), _labels(rows, classes)
    if "probabilities" in name:
        y = torch.empty(rows, classes, dtype=dtype, device="cuda")
    keywords, eager = _options(name, rows, classes)

    def call() -> Tensor:
        found: Any = fusedloss.cross_entropy(x, y, **keywords)
        loss: Tensor = found[0] if isinstance(found, tuple) else found
        return loss

    return Prepared(call, None if eager is None else lambda: eager(x, y), [x])


def _softmax_case(classes: int, dtype: torch.dtype, name: str, quick: bool = False) -> Case:
    rows = LOGITS // classes
    moved = rows * classes * dtype.itemsize * (3 if "probabilities" in name else 2)
    prepare = partial(_softmax, rows, classes, dtype, name)
    return Case("softmax_ce", f"{rows} x {classes} {name}", dtype, rows * classes, prepare, moved, quick=quick)


def _small_softmax_case(rows: int, classes: int) -> Case:
    prepare = partial(_softmax, rows, classes, torch.float32, "plain")
    size = rows * classes
    return Case("softmax_ce", f"{rows} x {classes} plain, small", torch.float32, size, prepare, 8 * size)


def _softmax_cases() -> Iterator[Case]:
    bf16, f32 = torch.bfloat16, torch.float32
    for name in ("class temperatures", "plain"):
        for dtype in (bf16, f32):
            for classes in CLASSES:
                quick = dtype == bf16 and classes in (1000, 32000) and name == "class temperatures"
                yield _softmax_case(classes, dtype, name, quick)
    for dtype, sizes in ((bf16, (1000, 32000, 128256)), (f32, (1000,))):
        for classes in sizes:
            for name in OPTIONS:
                quick = dtype == bf16 and classes == 1000 and name == "penalty"
                yield _softmax_case(classes, dtype, name, quick)
    yield _small_softmax_case(512, 1000)
    yield _small_softmax_case(8192, 100)


def _arcface_logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    cosine = F.linear(F.normalize(x, dim=1), F.normalize(w, dim=1))
    angle = torch.acos(cosine.clamp(-1, 1)) + MARGIN * F.one_hot(y, w.shape[0])
    return SCALE * torch.cos(angle)


def _linear(rows: int, width: int, classes: int, dtype: torch.dtype, arcface: bool) -> Prepared:
    x, w, y = _leaf(rows, width, dtype=dtype), _leaf(classes, width, dtype=dtype), _labels(rows, classes)
    keywords: dict[str, Any] = {}
    if arcface:
        keywords = {"normalize": True, "terms": [fusedloss.AngularMargin(MARGIN), fusedloss.Scale(SCALE)]}

    def eager() -> Tensor:
        return F.cross_entropy(_arcface_logits(x, w, y) if arcface else F.linear(x, w), y)

    return Prepared(lambda: fusedloss.linear_cross_entropy(x, w, y, **keywords), eager, [x, w])


def _linear_cases() -> Iterator[Case]:
    for arcface in (False, True):
        for width in (384, 768, 1024, 2048, 4096):
            for classes in (1000, 16384, 131072):
                if arcface and (width not in (384, 768) or classes == 1000):
                    continue
                yield _linear_case(width, classes, torch.bfloat16, arcface, width == 768 and classes == 1000)
    yield _linear_case(768, 16384, torch.float32, False)


def _linear_case(width: int, classes: int, dtype: torch.dtype, arcface: bool, quick: bool = False) -> Case:
    label = f"{_LINEAR_ROWS} x {width} x {classes}" + " ArcFace" * arcface
    prepare = partial(_linear, _LINEAR_ROWS, width, classes, dtype, arcface)
    size = _LINEAR_ROWS * classes
    return Case("linear_ce", label, dtype, size, prepare, flops=6 * size * width, quick=quick)


def _supcon(rows: int, width: int, dtype: torch.dtype) -> Prepared:
    x, y = _leaf(rows, width, dtype=dtype), _labels(rows, _SUPCON_CLASSES)

    def eager() -> Tensor:
        unit = F.normalize(x, dim=1)
        similarity = unit @ unit.t() / TEMPERATURE
        logits = similarity - similarity.max(1, keepdim=True).values.detach()
        others = 1 - torch.eye(rows, device="cuda")
        positive = torch.eq(y.unsqueeze(1), y).float() * others
        log_p = logits - (logits.exp() * others).sum(1, keepdim=True).log()
        count = positive.sum(1)
        return -((positive * log_p).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum()

    return Prepared(lambda: fusedloss.supcon(x, y, temperature=TEMPERATURE), eager, [x])


def _supcon_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for width in (128, 512):
            # Longer loops take minutes to walk through.
            for rows in (1024, 8192, 65536 if width == 128 else 16384):
                quick = (dtype, width, rows) == (torch.bfloat16, 128, 1024)
                yield Case("supcon", f"{rows} x {width}", dtype, rows**2, partial(_supcon, rows, width, dtype),
                           flops=6 * rows**2 * width, quick=quick)  # fmt: skip


def _statistics(rows: int, width: int, classes: int, dtype: torch.dtype, in_one: bool) -> Prepared:
    with torch.device("cuda"):
        statistics = fusedloss.ClassStatistics(width, classes)
    x, y = torch.empty(rows, width, dtype=dtype, device="cuda"), _labels(rows, classes)
    if in_one:
        # Nine rows in ten.
        y = torch.where(torch.arange(rows, device="cuda") % 10 == 0, y, torch.zeros_like(y))

    def eager() -> Tensor:
        count = torch.zeros(classes, device="cuda").index_add_(0, y, torch.ones(rows, device="cuda")).clamp(min=1)
        mean = torch.zeros(classes, width, device="cuda").index_add_(0, y, x.float()) / count.unsqueeze(1)
        distance = (x.float() - mean[y]).square().sum(1)
        return torch.zeros(classes, device="cuda").index_add_(0, y, distance) / count

    return Prepared(lambda: statistics.update(x, y), eager)


def _statistics_cases() -> Iterator[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    for rows, width, classes, dtype, in_one in (
        (65536, 1024, 1000, f32, False), (65536, 1024, 1000, f32, True), (65536, 1024, 1000, bf16, False),
        (2**20, 256, 100000, f32, False), (256, 512, 100, f32, False),
    ):  # fmt: skip
        label = f"{rows} x {width}, {classes} classes" + ", 9 in 10 in one" * in_one
        prepare = partial(_statistics, rows, width, classes, dtype, in_one)
        size = rows * width
        yield Case("class_stats", label, dtype, size, prepare, bytes=size * dtype.itemsize, quick=rows == 256)


def every(stems: Sequence[str] = (), match: str = "", quick: bool = False) -> list[Case]:
    """The cases of these stems (none: of all) whose name holds any part of `match` between bars."""
    makers = {
        "softmax_ce": _softmax_cases, "linear_ce": _linear_cases, "supcon": _supcon_cases,
        "class_stats": _statistics_cases,
    }  # fmt: skip
    found = [case for stem in stems or STEMS for case in makers[stem]()]
    return [case for case in found if (case.quick or not quick) and any(part in case.name for part in match.split("|"))]


def documented() -> set[str]:
    """The names of the cases in the documentation's table: options at one size only."""
    many = {case.name for case in every(["softmax_ce"]) if any(case.label.endswith(f" {name}") for name in OPTIONS)}
    shown = {case.name for case in every(["softmax_ce"], "softmax_ce bfloat16 134217 x 1000 ")}
    return {case.name for case in every()} - (many - shown)
