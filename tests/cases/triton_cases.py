"""Cases of the Triton backend against independent float64 formulas; as a script, in Triton's interpreter.

See ``triton_main`` for the options.
"""

from __future__ import annotations

import torch
import triton_linear
import triton_supcon
from triton_checks import (
    CHUNKS,
    ONE_BLOCK,
    OWN,
    STEPS,
    WITH_HINGE,
    Check,
    bad_labels,
    class_statistics,
    class_updates,
    cross_entropy,
    empty,
    flat_rows,
    no_kept_row,
    same_bits,
    scaling,
    stats_backward,
    through_the_operation,
)
from triton_main import main
from triton_truth import Penalty

CASES: dict[str, Check] = {}
# Of features: rows of a step that a thread takes one after another; several blocks of columns.
_UNROLLED, _WIDE_ROWS = (8, 64, 8, 1), (4, 16, 4, 2)
LABEL = "logits affine target_override"
EVERYTHING = {
    "cap": 2.5, "margin": True, "penalty": Penalty(strength=None, mix=True), "per_row": True, "focal_gamma": 2.0,
    "poly_epsilon": 0.7, "z_loss": 0.01, "mean": False,
    "grads": "logits affine label_smoothing target_override penalty_strength",
}  # fmt: skip


def case(check: Check, name: str) -> None:
    assert name not in CASES, name
    CASES[name] = check


def mutants(device: str) -> list[str]:
    """Wrong kernels must fail the comparison."""
    import triton_mutants as wrong

    from fusedloss.backends.triton import (
        blocks,
        class_kernels,
        grad_logits,
        softmax_ce,
        softmax_kernels,
        softmax_rows,
        statistics,
    )
    from fusedloss.backends.triton import row_loss as formulas

    poly = {"poly_epsilon": 0.5, "mean": False}
    changes = [
        (softmax_rows, "grad_coefficients", wrong.softmax_coefficient, cross_entropy()),
        (softmax_rows, "grad_coefficients", wrong.target_coefficient, cross_entropy(soft=True)),
        (softmax_rows, "grad_coefficients", wrong.target_coefficient, stats_backward()),
        (softmax_rows, "row_loss", wrong.one_minus_pt_partial, cross_entropy(**poly)),
        (softmax_rows, "row_loss", wrong.one_minus_pt_partial, cross_entropy(focal_gamma=2.0)),
        (softmax_rows, "row_loss", wrong.unmixed_partial, cross_entropy(penalty=Penalty(mix=True))),
        (softmax_ce, "loss_row", wrong.loss_row, cross_entropy(label_smoothing=0.1)),
        (softmax_ce, "statistics_row", wrong.statistics_row, stats_backward()),
        (formulas, "target_grad", wrong.target_grad, flat_rows),
        (formulas, "hinge_at_label", wrong.hinge_at_label, cross_entropy(penalty=Penalty(), label_smoothing=0.1)),
        (softmax_kernels, "add_columns", wrong.add_columns, cross_entropy(ONE_BLOCK)),
        (softmax_kernels, "add_block", wrong.add_block, cross_entropy()),
        (softmax_kernels, "add_hinge", wrong.add_hinge, cross_entropy(penalty=Penalty(), grads="")),
        (statistics, "with_label", wrong.with_label, cross_entropy(margin=True, special="far label")),
        (softmax_rows, "best_class", wrong.best_class, stats_backward(margin=True)),
        (blocks, "tanh", wrong.tanh, cross_entropy(cap=2.5)),
        (grad_logits, "is_label", wrong.is_label, cross_entropy(margin=True)),
        (class_kernels, "add_parts", wrong.add_parts, class_statistics()),
        (class_kernels, "first_place", wrong.first_place, class_updates(kind="new head nan")),
        (
            class_kernels,
            "is_usable",
            wrong.is_usable,
            class_statistics(kind="last column", tile=_WIDE_ROWS, classes=25),
        ),
        (class_kernels, "larger", wrong.larger, class_statistics(kind="nan")),
    ]
    passed = []
    for module, name, function, check in changes:
        right = getattr(module, name)
        setattr(module, name, function)
        try:
            if not check(device):
                passed.append(f"a wrong {function.__name__} passed")
        finally:
            setattr(module, name, right)
    return passed


for _dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    _word = str(_dtype).split(".")[1]
    for _tile, _size in ((STEPS, "steps"), (CHUNKS, "chunks"), (ONE_BLOCK, "one block")):
        case(cross_entropy(_tile, dtype=_dtype, label_smoothing=0.1), f"ce {_word} {_size}")
        case(
            cross_entropy(_tile, dtype=_dtype, soft=True, label_smoothing=0.1, z_loss=0.01),
            f"ce probabilities {_word} {_size}",
        )
    _focal = {
        "focal_gamma": 2.0,
        "per_row": True,
        "mean": False,
        "grads": "logits affine label_smoothing",
        "z_loss": 0.01,
    }
    case(cross_entropy(dtype=_dtype, **_focal), f"ce focal, per row, {_word}")
    case(stats_backward(dtype=_dtype), f"statistics {_word} steps")
    case(stats_backward(dtype=_dtype, soft=True), f"statistics probabilities {_word}")
    case(class_statistics(dtype=_dtype), f"classes {_word}")
for _dtype in (torch.float32, torch.float64, torch.bfloat16):
    _word = str(_dtype).split(".")[1]
    case(cross_entropy(dtype=_dtype, poly_epsilon=2.0), f"ce poly {_word}")
    case(cross_entropy(ONE_BLOCK, dtype=_dtype, poly_epsilon=-1.0, label_smoothing=0.1), f"ce poly smooth {_word}")
for _special in ("confident", "ignored", "nan", "infinite"):
    case(
        cross_entropy(poly_epsilon=2.0, special=_special, terms="weight", grads="logits"), f"ce poly {_special}"
    )  # fmt: skip
for _terms in ("", "scale", "bias", "weight", "scale weight"):
    case(cross_entropy(terms=_terms, torch_agrees=True), f"ce with terms '{_terms}'")
    case(
        cross_entropy(ONE_BLOCK, terms=_terms, label_smoothing=0.2, torch_agrees=True),
        f"ce smooth with terms '{_terms}'",
    )
case(cross_entropy(soft=True, torch_agrees=True, label_smoothing=0.2), "ce probabilities as torch")
case(
    cross_entropy(soft=True, terms="", per_row=True, mean=False, grads="logits label_smoothing"),
    "ce probabilities per row",
)
for _grads in ("", "logits", "affine", "affine label_smoothing"):
    for _tile in (STEPS, CHUNKS):
        _own = "smoothing" in _grads
        case(cross_entropy(_tile, grads=_grads, per_row=_own, mean=not _own), f"ce gradients of '{_grads}' {_tile}")
for _layout in ("", "transposed", "gaps", "channels last"):
    for _tile in (STEPS, CHUNKS):
        case(
            cross_entropy(_tile, rows=(3, 5), layout=_layout, label_smoothing=0.1),
            f"ce positions {_layout} {_tile}",
        )
    case(cross_entropy(rows=(5, 2), layout=_layout, soft=True), f"ce probabilities positions {_layout}")
    case(stats_backward(CHUNKS, rows=(3, 5), layout=_layout), f"statistics positions {_layout}")
for _layout in ("transposed", "gaps"):
    case(cross_entropy(layout=_layout), f"ce {_layout}")
    case(cross_entropy(layout=_layout, soft=True, dtype=torch.bfloat16), f"ce probabilities {_layout}")
for _special in ("offset", "confident", "nan", "plus infinity", "ignored"):
    for _tile in (STEPS, CHUNKS):
        case(
            cross_entropy(_tile, special=_special, terms="weight", grads="logits"),
            f"ce {_special} {_tile}",
        )
for _tile in (STEPS, CHUNKS):
    case(
        cross_entropy(_tile, special="infinite", terms="", grads="logits"),
        f"ce infinite {_tile}",
    )
    case(
        cross_entropy(_tile, special="infinite", terms="", soft=True, grads="logits"),
        f"ce infinite soft {_tile}",
    )
    case(
        cross_entropy(_tile, special="confident", focal_gamma=0.5, terms="scale", mean=False),
        f"ce focal confident {_tile}",
    )
    case(stats_backward(_tile, special="confident"), f"statistics confident {_tile}")
    for _special in ("nan", "infinite"):
        case(
            stats_backward(_tile, special=_special, terms="", upstream="log_sum_exp", grads="logits"),
            f"statistics {_special} {_tile}",
        )
for _upstream in ("log_sum_exp", "target_logit", "cross_entropy one_minus_pt", "smooth_loss"):
    case(stats_backward(upstream=_upstream), f"statistics, gradient of {_upstream}")
    case(
        stats_backward(upstream=_upstream, soft=True, terms="bias"),
        f"statistics probabilities, gradient of {_upstream}",
    )
case(stats_backward(grads="affine"), "statistics, scale and bias alone")
case(stats_backward(terms="", grads="logits"), "statistics without terms")
case(cross_entropy(OWN, classes=1, rows=(5,), terms="scale"), "ce one class")
case(cross_entropy(OWN, classes=2, rows=(1,), terms="scale bias"), "ce one row")
case(cross_entropy(OWN, classes=130, rows=(20,)), "ce own tiles")
case(cross_entropy(OWN, classes=33000, rows=(3,), label_smoothing=0.1), "ce own tiles, long rows")
case(cross_entropy(OWN, classes=9000, rows=(3,), label_smoothing=0.1), "ce own tiles, several blocks")
case(stats_backward(OWN, classes=5000, rows=(3,)), "statistics own tiles, long rows")
for _per_feature in (False, True):
    case(class_statistics(per_feature=_per_feature, tile=None), f"classes own tiles {_per_feature}")
    case(class_statistics(per_feature=_per_feature, kind="strided"), f"classes strided {_per_feature}")
    case(class_statistics(per_feature=_per_feature, kind="nan"), f"classes nan {_per_feature}")
case(class_statistics(rows=4, classes=40, per_feature=True), "classes mostly absent")
case(class_statistics(rows=0), "classes without rows")
case(class_statistics(kind="last column", tile=_WIDE_ROWS, classes=25), "classes of one segment, blocks")
for _kind in ("", "nan", "new head", "new head nan", "last column"):
    case(class_statistics(per_feature=True, kind=_kind, tile=_WIDE_ROWS), f"classes blocks {_kind}")
    case(class_updates(kind=_kind, tile=_WIDE_ROWS), f"classes moved in two steps {_kind}")
    case(class_updates(kind=_kind, tile=_UNROLLED, momentum=None), f"classes moved unrolled {_kind}")
    for _per_feature in (False, True):
        case(class_updates(per_feature=_per_feature, kind=_kind, rows=90), f"classes moved {_kind} {_per_feature}")
for _dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    _word = str(_dtype).split(".")[1]
    case(class_updates(dtype=_dtype, tile=None, per_feature=True), f"classes moved own tiles {_word}")
    case(class_updates(dtype=_dtype, momentum=0.0), f"classes moved by nothing {_word}")
case(class_updates(dtype=torch.float64, mean_dtype=torch.float32), "classes moved, narrow mean")
case(class_updates(kind="strided", momentum=1.0), "classes moved strided")
case(class_updates(rows=0), "classes moved without rows")
case(class_updates(rows=5, classes=33000), "classes moved, wide keys")
for _dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    _word = str(_dtype).split(".")[1]
    for _tile, _size in ((STEPS, "steps"), (CHUNKS, "chunks"), (ONE_BLOCK, "one block")):
        _name = f"{_word} {_size}"
        if _dtype in (torch.float32, torch.bfloat16):
            case(cross_entropy(_tile, dtype=_dtype, cap=2.5), f"ce cap {_name}")
            case(cross_entropy(_tile, dtype=_dtype, margin=True, grads=LABEL), f"ce override {_name}")
            case(cross_entropy(_tile, dtype=_dtype, penalty=Penalty()), f"ce penalty {_name}")
        case(cross_entropy(_tile, dtype=_dtype, **EVERYTHING), f"ce everything {_name}")
        case(
            cross_entropy(_tile, dtype=_dtype, penalty=Penalty(mix=True), cap=2.5, soft=True, label_smoothing=0.1),
            f"ce probabilities penalty {_name}",
        )
        case(
            stats_backward(_tile, dtype=_dtype, cap=2.5, margin=True, upstream=WITH_HINGE, grads=LABEL),
            f"statistics everything {_name}",
        )
        case(
            stats_backward(_tile, dtype=_dtype, cap=2.5, soft=True, upstream=WITH_HINGE),
            f"statistics probabilities hinge {_name}",
        )
for _tile in (STEPS, CHUNKS):
    for _terms in ("", "scale", "bias"):
        case(
            cross_entropy(_tile, terms=_terms, cap=4.0, margin=True, penalty=Penalty(), grads=LABEL),
            f"ce options with terms '{_terms}' {_tile}",
        )
    for _special in ("ties", "offset", "confident", "ignored"):
        case(
            cross_entropy(_tile, special=_special, terms="weight", penalty=Penalty(2.0), grads="logits"),
            f"ce penalty {_special} {_tile}",
        )
    case(
        stats_backward(_tile, special="ties", terms="", upstream="hinge", penalty_margin=0.0),
        f"statistics hinge ties {_tile}",
    )
    for _special in ("large", "tiny", "nan", "plus infinity", "infinite"):
        case(
            cross_entropy(_tile, special=_special, terms="weight", cap=5.0, grads="logits"),
            f"ce cap {_special} {_tile}",
        )
        case(
            cross_entropy(_tile, special=_special, terms="", margin=True, grads="logits target_override"),
            f"ce override {_special} {_tile}",
        )
    for _special in ("nan", "plus infinity"):
        case(
            cross_entropy(_tile, special=_special, terms="", penalty=Penalty(), grads="logits"),
            f"ce penalty {_special} {_tile}",
        )
    for _special in ("far label", "infinite", "nan", "ignored"):
        case(
            stats_backward(_tile, special=_special, terms="", margin=True, grads="logits target_override"),
            f"statistics override {_special} {_tile}",
        )
    case(
        cross_entropy(
            _tile, special="far label", terms="", margin=True, label_smoothing=0.1, grads="logits target_override"
        ),
        f"ce override far label {_tile}",
    )
    case(
        cross_entropy(_tile, special="confident", focal_gamma=0.5, margin=True, penalty=Penalty(), grads=LABEL),
        f"ce focal options {_tile}",
    )
for _layout in ("", "transposed", "gaps", "channels last"):
    for _tile in (STEPS, CHUNKS):
        case(cross_entropy(_tile, rows=(3, 5), layout=_layout, **EVERYTHING), f"ce everything {_layout} {_tile}")
    case(
        stats_backward(rows=(5, 2), layout=_layout, cap=2.5, margin=True, upstream=WITH_HINGE, grads=LABEL),
        f"statistics everything {_layout}",
    )
for _grads in ("", "logits", "affine", "target_override", "penalty_strength", "affine penalty_strength"):
    case(cross_entropy(**{**EVERYTHING, "grads": _grads}), f"ce everything, gradients of '{_grads}'")
for _upstream in ("hinge", "log_sum_exp hinge"):
    case(stats_backward(upstream=_upstream), f"statistics, gradient of {_upstream}")
    case(stats_backward(ONE_BLOCK, upstream=_upstream, grads="affine"), f"statistics, scale and bias of {_upstream}")
for _upstream in ("log_sum_exp", "target_logit", "cross_entropy", "smooth_loss", "one_minus_pt", "hinge"):
    case(
        stats_backward(upstream=_upstream, margin=True, cap=2.5, grads="target_override"),
        f"statistics override, gradient of {_upstream}",
    )
case(flat_rows, "ce equal logits, all smoothed")
for _strength in (0.0, 1.0):
    case(cross_entropy(penalty=Penalty(strength=_strength, mix=True)), f"ce penalty mixed {_strength}")
case(cross_entropy(penalty=Penalty(0.0, 0.3, 1.0)), "ce penalty without margin")
case(
    cross_entropy(OWN, classes=1, rows=(5,), margin=True, penalty=Penalty(), cap=2.0, grads=LABEL),
    "ce one class, all",
)
case(
    stats_backward(OWN, classes=1, rows=(5,), margin=True, upstream=WITH_HINGE, grads=LABEL),
    "statistics one class, all",
)
for _classes in (130, 5000, 33000):
    _own = {"classes": _classes, "rows": (3,)}
    case(cross_entropy(OWN, **_own, **EVERYTHING), f"ce everything own tiles {_classes}")
    case(
        stats_backward(OWN, **_own, cap=2.5, margin=True, upstream=WITH_HINGE, grads=LABEL),
        f"statistics everything own tiles {_classes}",
    )
    case(
        cross_entropy(OWN, **_own, dtype=torch.bfloat16, **{**EVERYTHING, "grads": "logits target_override"}),
        f"ce everything own tiles without scale {_classes}",
    )
case(scaling, "scale in place")
case(bad_labels, "labels out of range")
for _reduction, _stats in (("mean", False), ("sum", True), ("none", False)):
    for _dtype in (torch.float32, torch.float16):
        case(
            through_the_operation(_reduction, _stats, _dtype),
            f"through the operation: {_reduction}, {_stats}, {str(_dtype).split('.')[1]}",
        )
case(empty, "no rows")
case(no_kept_row, "no kept row")
for _name in ("softmax", "linear", "cosine"):
    case(same_bits(_name), f"other strides, {_name}")
    case(same_bits(_name, "meta"), f"other default device, {_name}")
for _name, _check in (triton_supcon.CASES | triton_linear.CASES).items():
    case(_check, _name)
# On a GPU a replaced function is compiled already.
INTERPRETED = {
    "mutants": mutants,
    "contrast mutants": triton_supcon.mutants,
    "linear mutants": triton_linear.mutants,
}
# One of each kernel, for tools that slow a program down a thousandfold.
FEW = (
    "ce everything float32 steps",
    "ce everything bfloat16 one block",
    "statistics everything float32 steps",
    "statistics probabilities hinge float16 one block",
    "classes float32",
    "scale in place",
    f"contrast everything {triton_supcon.STEPS}",
    "linear f32 plain mean",
)


if __name__ == "__main__":
    main({**CASES, **INTERPRETED}, CASES, FEW)
