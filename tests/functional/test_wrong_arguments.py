"""Every public function and module with wrong things in each argument: an error of one form, never one from inside."""

import math
import re

import numpy as np
import pytest
import torch

import fusedloss
from fusedloss import calibration, longtail, metrics, retrieval, terms

NAN, INF = math.nan, math.inf
GRAMMAR = re.compile(r"^[\w:. ]+ must .*; got ", re.DOTALL)
B, K, D = 4, 3, 5
LOGITS, FEATURES, LABELS = torch.randn(B, K), torch.randn(B, D), torch.tensor([0, 1, 2, 0])
COUNTS, WEIGHT = torch.tensor([30, 20, 10]), torch.randn(K, D)
META = torch.device("meta")

NOT_A_NUMBER = ["1", [1.0], None, True, np.ones(2), 1j, NAN, INF]
NOT_AN_INTEGER = ["1", [1], None, 1.5, True, torch.tensor(1), np.ones(1)]
NOT_A_TENSOR = ["text", [1.0, 2.0], None, 3, 1.5, np.ones((B, K))]
# By what an argument is: values that it must refuse.
WRONG = {
    "number": [*NOT_A_NUMBER, torch.ones(1)],
    "positive": [*NOT_A_NUMBER, torch.ones(1), 0.0, -1.0],
    "at least 0": [*NOT_A_NUMBER, torch.ones(1), -1.0],
    "in [0, 1]": [*NOT_A_NUMBER, torch.ones(1), -0.5, 1.5],
    "in [0, 1] or a tensor": [*NOT_A_NUMBER, -0.5, 1.5],
    "positive or a tensor": [*NOT_A_NUMBER, 0.0, -1.0, torch.ones(1, dtype=torch.int64)],
    "number or a tensor": [*NOT_A_NUMBER, torch.ones(1, dtype=torch.int64)],
    "angle": [*NOT_A_NUMBER, 28.6, -4.0, torch.ones(1, dtype=torch.int64)],
    "integer": NOT_AN_INTEGER,
    "size": [*NOT_AN_INTEGER, 0, -1],
    "epoch": [*NOT_AN_INTEGER, -1],
    "bool": ["yes", None, 1, [True]],
    "choice": ["nope", None, 3, ["mean"]],
    "terms": ["text", 3, [3], [terms.Scale], torch.ones(K), [torch.ones(K)]],
    "penalty": ["text", 0.1, [0.1]],
    "class weight": [
        "text",
        [1.0] * K,
        1.0,
        np.ones(K),
        COUNTS,
        torch.ones(K, 1),
        -torch.ones(K),
        torch.full((K,), NAN),
    ],
    "logits": [
        *NOT_A_TENSOR,
        LABELS,
        LOGITS.long(),
        LOGITS.to(torch.complex64),
        torch.randn(()),
        torch.randn(B, 0),
        LOGITS.to_sparse(),
    ],
    "batched logits": [torch.randn(K)],
    "features": [
        *NOT_A_TENSOR,
        torch.ones(B, D, dtype=torch.int64),
        torch.randn(()),
        torch.randn(B, D + 1),
        torch.randn(B, 0),
        FEATURES.to_sparse(),
        torch.randn(B, D, 2),
    ],
    "batched features": [torch.randn(D)],
    "labels": [
        *NOT_A_TENSOR,
        LABELS.double(),
        LABELS.bool(),
        LABELS[:2],
        LABELS[:, None],
        torch.tensor(1),
        LABELS + 1,
        LABELS - 1,
        torch.eye(K, dtype=torch.int64)[LABELS],
        LABELS.to(META),
    ],
    "sample weight": [
        "text",
        [1.0] * B,
        1.0,
        np.ones(B),
        torch.ones(B, dtype=torch.bool),
        torch.ones(B - 1),
        torch.ones(B, device=META),
    ],
    "array of labels": [
        None,
        "text",
        LABELS.double(),
        [0.5] * B,
        ["a"] * B,
        [True] * B,
        LABELS + 1,
        LABELS - 1,
        LABELS.to(META),
    ],
    "array of scores": [
        None,
        "text",
        [["a", "b"]],
        [[1.0], [1.0, 2.0]],
        torch.full((B, K), NAN),
        LOGITS.to(META),
        LOGITS.to(torch.complex64),
    ],
    "counts": [
        None,
        "text",
        3,
        [[1, 2]],
        [],
        [-1, 2],
        [NAN, 1.0],
        [0, 0],
        torch.ones(2, device=META),
        torch.ones(2, 2),
    ],
    "log prior": [
        "text",
        [0.1] * K,
        COUNTS,
        torch.zeros(K + 1),
        torch.zeros(1, K),
        torch.full((K,), NAN),
        torch.full((K,), INF),
    ],
    "linear": [None, "text", 3, torch.nn.Conv2d(1, 1, 1), torch.ones(K, D)],
}

CROSS_ENTROPY = {
    "weight": "class weight",
    "ignore_index": "integer",
    "reduction": "choice",
    "label_smoothing": "in [0, 1] or a tensor",
    "terms": "terms",
    "focal_gamma": "at least 0",
    "poly_epsilon": "number",
    "z_loss": "number",
    "margin_penalty": "penalty",
    "return_stats": "bool",
}
ROW = {name: CROSS_ENTROPY[name] for name in ("weight", "ignore_index", "reduction", "terms")}
ON_LOGITS = {"logits": (LOGITS, "logits"), "target": (LABELS, "labels"), "sample_weight": (None, "sample weight")}


def forward(loss, first="logits"):
    """A call of `loss` by names, its first argument called `first`."""

    def call(target, sample_weight=None, **arguments):
        return loss(arguments[first], target, sample_weight)

    return call


def without(options, *names):
    return {name: kind for name, kind in options.items() if name not in names}


def options(kinds, **given):
    """Options with the values of a call that works, None for one that is left out."""
    return {name: (given.get(name, LEFT_OUT), kind) for name, kind in kinds.items()}


LEFT_OUT = object()
# By name: what is called, and by argument a value that works and the kind of it.
CALLS = {
    # terms
    "ClassTemperature": (terms.ClassTemperature, {"tau": (1.0, "positive or a tensor")}),
    "Scale": (terms.Scale, {"scale": (1.0, "number or a tensor")}),
    "Prior": (terms.Prior, {"log_prior": (torch.zeros(K), "prior of a term"), "strength": (1.0, "number")}),
    "AdditiveMargin": (terms.AdditiveMargin, {"margin": (0.1, "number or a tensor")}),
    "AngularMargin": (
        terms.AngularMargin,
        {"margin": (0.1, "angle"), "fallback": ("easy", "choice"), "gradient": ("exact", "choice")},
    ),
    "CombinedMargin": (
        terms.CombinedMargin,
        {
            "m1": (1.0, "positive or a tensor"),
            "m2": (0.1, "angle"),
            "m3": (0.1, "number or a tensor"),
            "fallback": ("easy", "choice"),
            "gradient": ("exact", "choice"),
        },
    ),
    "SoftCap": (terms.SoftCap, {"cap": (1.0, "positive or a tensor")}),
    "MarginPenalty": (
        fusedloss.MarginPenalty,
        {
            "margin": (1.0, "at least 0"),
            "strength": (0.1, "at least 0, or a tensor"),
            "over": ("mean", "choice"),
            "mix": (False, "bool"),
        },
    ),
    # losses on logits
    "CrossEntropyLoss": (fusedloss.CrossEntropyLoss, options(CROSS_ENTROPY)),
    "CrossEntropyLoss()": (forward(fusedloss.CrossEntropyLoss()), ON_LOGITS),
    "FocalLoss": (fusedloss.FocalLoss, options(without(CROSS_ENTROPY, "focal_gamma"))),
    "FocalLoss gamma": (fusedloss.FocalLoss, {"gamma": (2.0, "at least 0")}),
    "FocalLoss()": (forward(fusedloss.FocalLoss()), ON_LOGITS),
    "PolyLoss": (fusedloss.PolyLoss, {"epsilon": (2.0, "number")}),
    "BalancedSoftmaxLoss": (
        fusedloss.BalancedSoftmaxLoss,
        {
            "class_counts": (COUNTS, "counts"),
            "strength": (1.0, "at least 0"),
            "floor": (1.0, "at least 0"),
            **options(CROSS_ENTROPY),
        },
    ),
    "LDAMLoss": (
        fusedloss.LDAMLoss,
        {
            "class_counts": (COUNTS, "counts"),
            "max_margin": (0.5, "positive"),
            "scale": (30.0, "positive"),
            **options(CROSS_ENTROPY),
        },
    ),
    "MbLSLoss": (
        fusedloss.MbLSLoss,
        {
            "margin": (1.0, "at least 0"),
            "strength": (0.1, "at least 0"),
            "over": ("mean", "choice"),
            **options(without(CROSS_ENTROPY, "margin_penalty")),
        },
    ),
    "LinearCrossEntropyLoss": (
        fusedloss.LinearCrossEntropyLoss,
        {
            "in_features": (D, "size"),
            "num_classes": (K, "size"),
            "out_features": ((), "sizes"),
            "bias": (False, "bool"),
            "normalize": (False, "bool"),
            "sample_rate": (None, "rate"),
            **options(without(CROSS_ENTROPY, "ignore_index")),
        },
    ),
    "LinearCrossEntropyLoss()": (
        forward(fusedloss.LinearCrossEntropyLoss(D, K), "features"),
        {"features": (FEATURES, "features"), **without(ON_LOGITS, "logits")},
    ),
    "LinearCrossEntropyLoss.logits": (fusedloss.LinearCrossEntropyLoss(D, K).logits, {"input": (FEATURES, "features")}),
    "CrossEntropyLoss.fold_into": (
        fusedloss.CrossEntropyLoss().fold_into,
        {"linear": (torch.nn.Linear(D, K), "linear"), "prior": (True, "bool")},
    ),
    "FLSD53Loss": (fusedloss.FLSD53Loss, {"gamma": (3.0, "at least 0"), **options(ROW)}),
    "DualFocalLoss": (fusedloss.DualFocalLoss, {"gamma": (3.0, "at least 0"), **options(ROW)}),
    "ECPLoss": (fusedloss.ECPLoss, {"strength": (3.0, "at least 0"), **options(ROW)}),
    "ACLSLoss": (
        fusedloss.ACLSLoss,
        dict.fromkeys(("strength", "margin", "positive", "negative"), (1.0, "at least 0")) | options(ROW),
    ),
    **{
        f"{kind.__name__}()": (forward(kind()), {**ON_LOGITS, "logits": (LOGITS, "logits of a row")})
        for kind in (fusedloss.FLSD53Loss, fusedloss.DualFocalLoss, fusedloss.ECPLoss, fusedloss.ACLSLoss)
    },
    # priors and weights
    "class_counts": (longtail.class_counts, {"labels": (LABELS, "array of labels"), "num_classes": (K, "size")}),
    "effective_number_weights": (
        longtail.effective_number_weights,
        {"counts": (COUNTS, "counts"), "beta": (0.9, "in [0, 1]")},
    ),
    "inverse_frequency_weights": (
        longtail.inverse_frequency_weights,
        {"counts": (COUNTS, "counts"), "power": (0.9, "at least 0")},
    ),
    "log_prior": (longtail.log_prior, {"counts": (COUNTS, "counts"), "floor": (0.0, "at least 0")}),
    "ldam_margins": (longtail.ldam_margins, {"counts": (COUNTS, "counts"), "max_margin": (0.5, "positive")}),
    "adjust_logits": (
        longtail.adjust_logits,
        {
            "logits": (LOGITS, "scores"),
            "log_prior": (torch.zeros(K), "log prior"),
            "strength": (1.0, "at least 0"),
            "target_log_prior": (None, "log prior"),
            "trained_with": (None, "trained with"),
        },
    ),
    "DeferredReweighting": (
        longtail.DeferredReweighting,
        {
            "counts": (COUNTS, "counts"),
            "start_epoch": (1, "epoch"),
            "ramp_epochs": (1, "epoch"),
            "beta": (0.9, "in [0, 1]"),
            "power": (LEFT_OUT, "power"),
        },
    ),
    "DeferredReweighting()": (longtail.DeferredReweighting(COUNTS, 1), {"epoch": (1, "epoch")}),
    "DeferredReweighting.apply_to": (
        longtail.DeferredReweighting(COUNTS, 1).apply_to,
        {"loss": (fusedloss.CrossEntropyLoss(), "loss"), "epoch": (1, "epoch")},
    ),
    # calibration and metrics
    "calibration_error": (
        calibration.calibration_error,
        {
            "probs": (LOGITS.softmax(1), "array of scores"),
            "labels": (LABELS, "array of labels"),
            "n_bins": (5, "size"),
            "kind": ("ece", "choice"),
        },
    ),
    "reliability_bins": (
        calibration.reliability_bins,
        {"probs": (LOGITS.softmax(1), "array of scores"), "labels": (LABELS, "array of labels"), "n_bins": (5, "size")},
    ),
    "fit_temperature": (
        calibration.fit_temperature,
        {"logits": (LOGITS, "array of scores"), "labels": (LABELS, "array of labels"), "max_iterations": (9, "size")},
    ),
    "classification_report": (
        metrics.classification_report,
        {
            "logits_or_probs": (LOGITS, "array of scores"),
            "labels": (LABELS, "array of labels"),
            "class_names": (None, "class names"),
            "background_prefix": ("", "prefix"),
            "train_counts": (None, "train counts"),
        },
    ),
    "negative_log_likelihood": (
        metrics.negative_log_likelihood,
        {"logits_or_probs": (LOGITS, "array of scores"), "labels": (LABELS, "array of labels")},
    ),
    "retrieval_report": (
        retrieval.retrieval_report,
        {
            "features": (FEATURES, "rows"),
            "labels": (LABELS, "row labels"),
            "false_accept_rates": ([0.1], "rates"),
            "ignore_index": (-100, "integer"),
        },
    ),
}
VECTORS = torch.randn(B, 2, D)
HEADS = {"in_features": (D, "size"), "num_classes": (K, "size"), "scale": (30.0, "positive or a tensor")}
MARGIN_KEYWORDS = {
    **options(without(CROSS_ENTROPY, "weight", "label_smoothing")),
    "class_weight": (None, "class weight"),
    "sample_rate": (None, "rate"),
    "sub_centers": (1, "size"),
}
SUPCON = {
    "temperature": (0.1, "positive"),
    "contrast_mode": ("all", "choice"),
    "normalize": (True, "bool"),
    "reduction": ("mean", "choice"),
    "class_weight": (None, "class weight"),
    "class_balance": (False, "bool"),
    "ignore_index": (-100, "integer"),
}
# The functions, heads, statistics and contrastive losses.
CALLS |= {
    "cross_entropy": (
        fusedloss.cross_entropy,
        {
            "input": (LOGITS, "logits"),
            "target": (LABELS, "labels"),
            "sample_weight": (None, "sample weight"),
            **options(without(CROSS_ENTROPY, "weight")),
            "weight": (None, "class weight of a function"),
        },
    ),
    "linear_cross_entropy": (
        fusedloss.linear_cross_entropy,
        {
            "input": (FEATURES, "features"),
            "linear_weight": (WEIGHT, "rows of classes"),
            "target": (LABELS, "labels"),
            "linear_bias": (None, "bias"),
            "normalize": (False, "bool"),
            "sample_rate": (None, "rate"),
            "sample_weight": (None, "sample weight"),
            **options(without(CROSS_ENTROPY, "weight")),
            "weight": (None, "class weight of a function"),
        },
    ),
    "margin_logits": (
        fusedloss.margin_logits,
        {
            "input": (FEATURES, "matching rows"),
            "linear_weight": (WEIGHT, "rows of classes"),
            "labels": (LABELS, "optional labels"),
            "margin": (terms.AngularMargin(0.5), "margin"),
            "scale": (30.0, "number or a tensor"),
            "ignore_index": (-100, "integer"),
            "sub_centers": (1, "size"),
        },
    ),
    "supcon": (
        fusedloss.supcon,
        {
            "features": (FEATURES, "vectors"),
            "labels": (LABELS, "group labels"),
            **without(SUPCON, "class_weight"),
            "mask": (LEFT_OUT, "mask"),
            "class_weight": (None, "class weight of a function"),
            "prototypes": (None, "prototypes"),
            "contrast": (None, "prototypes"),
        },
    ),
    "SupConLoss": (
        fusedloss.SupConLoss,
        {
            **SUPCON,
            "base_temperature": (None, "positive or None"),
            "prototype_weight": (1.0, "number"),
            "focal_gamma": (0.0, "at least 0"),
            "learn_temperature": (False, "bool"),
        },
    ),
    "SupConLoss()": (fusedloss.SupConLoss(), {"features": (FEATURES, "vectors"), "labels": (LABELS, "group labels")}),
    "ArcFaceLoss": (
        fusedloss.ArcFaceLoss,
        {
            **HEADS,
            "margin": (0.5, "angle"),
            "fallback": ("easy", "choice"),
            "gradient": ("exact", "choice"),
            **MARGIN_KEYWORDS,
        },
    ),
    "CosFaceLoss": (fusedloss.CosFaceLoss, {**HEADS, "margin": (0.5, "number or a tensor"), **MARGIN_KEYWORDS}),
    "CombinedMarginLoss": (fusedloss.CombinedMarginLoss, {**HEADS, "margin": ((1.0, 0.1, 0.1), "three")}),
    "AdaFaceLoss": (
        fusedloss.AdaFaceLoss,
        {**HEADS, "margin": (0.4, "angle"), "h": (0.3, "number"), "momentum": (0.01, "in [0, 1]")},
    ),
    "CurricularFaceLoss": (
        fusedloss.CurricularFaceLoss,
        {**HEADS, "margin": (0.4, "angle"), "momentum": (0.01, "in [0, 1]")},
    ),
    "ArcFaceHead": (fusedloss.ArcFaceHead, {**HEADS, "margin": (0.4, "angle"), "sub_centers": (1, "size")}),
    **{
        f"{kind.__name__}()": (
            forward(kind(D, K), "features"),
            {"features": (FEATURES, "matching rows"), **without(ON_LOGITS, "logits")},
        )
        for kind in (fusedloss.ArcFaceLoss, fusedloss.AdaFaceLoss, fusedloss.CurricularFaceLoss)
    },
    "ArcFaceLoss.logits": (
        fusedloss.ArcFaceLoss(D, K).logits,
        {"input": (FEATURES, "matching rows"), "temperature": (1.0, "positive")},
    ),
    "ArcFaceHead()": (
        fusedloss.ArcFaceHead(D, K),
        {"features": (FEATURES, "matching rows"), "labels": (LABELS, "optional labels")},
    ),
    "VACELoss": (
        fusedloss.VACELoss,
        {
            "in_features": (D, "size"),
            "num_classes": (K, "size"),
            "a": (1.0, "number"),
            "strength": (0.5, "at least 0"),
            "tau_min": (0.5, "positive"),
            "tau_max": (2.0, "positive"),
            "momentum": (0.1, "in [0, 1] or None"),
            "warmup_steps": (10, "epoch"),
            "center": (False, "bool"),
            **options(CROSS_ENTROPY),
        },
    ),
    "VACELoss()": (
        fusedloss.VACELoss(D, K),
        {"logits": (LOGITS, "logits"), "target": (LABELS, "labels"), "features": (FEATURES, "matching rows or None")},
    ),
    "VACELoss.fit_statistics": (
        fusedloss.VACELoss(D, K).fit_statistics,
        {"features": (FEATURES, "matching rows"), "labels": (LABELS, "strict labels")},
    ),
    "FeDLaSLoss": (
        fusedloss.FeDLaSLoss,
        {
            "num_classes": (K, "size"),
            "base": ("smoothing", "choice"),
            "strength": (0.1, "at least 0, or None"),
            "beta": (1.0, "number or None"),
            "momentum": (0.1, "in [0, 1] or None"),
            "gate": ("positive", "choice"),
            "indicator": ("norm", "choice"),
            **options(without(CROSS_ENTROPY, "label_smoothing", "margin_penalty")),
        },
    ),
    "FeDLaSLoss()": (
        fusedloss.FeDLaSLoss(K),
        {"logits": (LOGITS, "logits"), "target": (LABELS, "labels"), "features": (FEATURES, "any rows")},
    ),
    "PrototypeLoss": (
        fusedloss.PrototypeLoss,
        {
            "in_features": (D, "size"),
            "num_classes": (K, "size"),
            "distance": ("l2", "choice"),
            "separation": (0.0, "at least 0"),
            "separation_margin": (0.0, "number"),
            "center_update": ("gradient", "choice"),
            "reduction": ("mean", "choice"),
            "ignore_index": (-100, "integer"),
        },
    ),
    "PrototypeLoss()": (
        fusedloss.PrototypeLoss(D, K),
        {"features": (FEATURES, "matching rows"), "target": (LABELS, "strict labels")},
    ),
    "ClassStatistics": (
        fusedloss.ClassStatistics,
        {
            "in_features": (D, "size"),
            "num_classes": (K, "size"),
            "momentum": (None, "in [0, 1] or None"),
            "per_feature": (False, "bool"),
        },
    ),
    "ClassStatistics.update": (
        fusedloss.ClassStatistics(D, K).update,
        {"features": (FEATURES, "matching rows"), "labels": (LABELS, "strict labels")},
    ),
    "ClassStatistics.merge": (
        fusedloss.ClassStatistics(D, K).merge,
        {"other": (fusedloss.ClassStatistics(D, K), "statistics")},
    ),
    "NormStatistics": (fusedloss.NormStatistics, {"momentum": (None, "in [0, 1] or None"), "norm": (1.0, "norm")}),
    "NormStatistics.update": (fusedloss.NormStatistics().update, {"features": (FEATURES, "any rows")}),
    "FeatureQueue": (fusedloss.FeatureQueue, {"in_features": (D, "size"), "size": (4, "size")}),
    "FeatureQueue.push": (
        fusedloss.FeatureQueue(D, 8).push,
        {"features": (FEATURES, "matching rows"), "labels": (LABELS, "group labels")},
    ),
    "watch": (fusedloss.VACELoss(D, K).watch, {"layer": (torch.nn.Linear(D, K), "layer")}),
}
WRONG |= {
    "prior of a term": [*NOT_A_TENSOR, COUNTS, torch.full((K,), NAN), torch.full((K,), INF), torch.eye(K).to_sparse()],
    "at least 0, or a tensor": [*NOT_A_NUMBER, -1.0, COUNTS],
    "logits of a row": [*WRONG["logits"], *WRONG["batched logits"]],
    "sizes": ["2", 2, None, [0], [1.5], torch.ones(1)],
    "rate": ["0.5", [0.5], True, 0.0, -1.0, 1.5, NAN, torch.ones(1)],
    "scores": [*NOT_A_TENSOR, LOGITS.long(), torch.randn(K), torch.randn(()), LOGITS.to_sparse()],
    "trained with": ["balanced", 3, {}, {"applied": "training"}, torch.nn.CrossEntropyLoss(), [3]],
    "power": ["1", [1.0], True, NAN, -1.0],
    "loss": [None, "text", torch.nn.Linear(2, 2), fusedloss.CrossEntropyLoss(torch.ones(K + 1))],
    "class names": ["abc", 3, ["a"]],
    "prefix": [None, 3, ["a"]],
    "train counts": ["text", [1, 2], [[1] * K], 3, torch.ones(K, device=META)],
    "rows": [*NOT_A_TENSOR, FEATURES.long(), torch.randn(D), torch.full((B, D), NAN), FEATURES.to(META)],
    "row labels": [*NOT_A_TENSOR, LABELS.float(), LABELS.bool(), LABELS[:2], LABELS[:, None]],
    "class weight of a function": [
        value
        for value in WRONG["class weight"]
        if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 1)
    ]
    + [torch.ones(K + 1), torch.ones(K, device=META)],
    "any rows": [
        *NOT_A_TENSOR,
        FEATURES.long(),
        torch.randn(D),
        torch.randn(()),
        torch.randn(B, D, 2),
        FEATURES.to_sparse(),
    ],
    "matching rows": [*WRONG["features"], torch.randn(D)],
    "matching rows or None": [value for value in WRONG["features"] if value is not None] + [torch.randn(D)],
    "rows of classes": [*WRONG["features"], torch.randn(D), torch.randn(0, D), WEIGHT.to(META)],
    "bias": [
        "text",
        [1.0] * K,
        np.ones(K),
        1.0,
        COUNTS,
        torch.ones(K + 1),
        torch.ones(K, 1),
        torch.ones(K, device=META),
    ],
    "optional labels": [value for value in WRONG["labels"] if value is not None],
    "strict labels": WRONG["labels"],
    "group labels": [
        "text",
        [0, 1],
        3,
        np.ones(B),
        LABELS.double(),
        LABELS[:2],
        LABELS[:, None],
        torch.tensor(1),
        LABELS.to(META),
    ],
    "margin": ["text", 0.5, None, terms.Scale(1.0), terms.AngularMargin],
    "mask": ["text", [1.0], 1.0, torch.ones(B), torch.ones(B, B + 1), torch.eye(B).to(META)],
    "vectors": [
        *NOT_A_TENSOR,
        FEATURES.long(),
        torch.randn(D),
        torch.randn(()),
        torch.randn(B, 2, D, 2),
        torch.randn(B, 0),
        torch.randn(B, 0, D),
        FEATURES.to_sparse(),
    ],
    "prototypes": [
        "text",
        [1.0],
        1.0,
        np.ones((2, D)),
        torch.randn(D),
        torch.randn(2, D + 1),
        torch.randn(2, D).to(META),
    ],
    "positive or None": ["1", [1.0], True, NAN, INF, 0.0, -1.0],
    "in [0, 1] or None": ["1", [1.0], True, NAN, INF, -0.5, 1.5],
    "at least 0, or None": ["1", [1.0], True, NAN, INF, -0.5],
    "number or None": ["1", [1.0], True, NAN, INF],
    "three": ["text", 0.5, None, (1.0, 0.1), (1.0, "a", 0.1), (0.0, 0.1, 0.1), torch.ones(3), (1.0, 20.0, 0.0)],
    "statistics": [None, "text", fusedloss.ClassStatistics(D + 1, K), fusedloss.NormStatistics()],
    "norm": ["1", None, [1.0], True, NAN, 0.5, -1.0],
    "layer": [None, "text", (torch.nn.Linear(D, K),), torch.nn.Linear(D + 1, K), torch.nn.Linear],
    "rates": ["0.1", 0.1, None, [0.0], [1.0], ["a"], [NAN]],
}
# Arguments whose errors are of another form so far, by call: a name is taken out with its mend.
PENDING = {
    "cross_entropy": "return_stats",
    "linear_cross_entropy": "return_stats",
    "supcon": (
        "features labels temperature contrast_mode normalize reduction class_balance ignore_index mask class_weight"
    ),
    "SupConLoss": (
        "temperature contrast_mode normalize reduction class_weight class_balance ignore_index "
        "base_temperature prototype_weight focal_gamma learn_temperature"
    ),
    "SupConLoss()": "features labels",
    "ArcFaceLoss": "scale terms poly_epsilon sample_rate",
    "CosFaceLoss": "scale terms poly_epsilon sample_rate",
    "CombinedMarginLoss": "scale margin",
    "AdaFaceLoss": "scale h momentum",
    "CurricularFaceLoss": "scale momentum",
    "ArcFaceHead": "scale",
    "AdaFaceLoss()": "features",
    "CurricularFaceLoss()": "target",
    "ArcFaceLoss.logits": "input temperature",
    "VACELoss": "in_features num_classes a strength tau_min tau_max momentum warmup_steps center",
    "VACELoss()": "target features",
    "VACELoss.fit_statistics": "features labels",
    "FeDLaSLoss": "num_classes base strength beta momentum gate indicator",
    "FeDLaSLoss()": "logits target features",
    "PrototypeLoss": (
        "in_features num_classes distance separation separation_margin center_update reduction ignore_index"
    ),
    "PrototypeLoss()": "target",
    "ClassStatistics": "in_features num_classes momentum per_feature",
    "ClassStatistics.update": "features labels",
    "ClassStatistics.merge": "other",
    "NormStatistics": "momentum norm",
    "NormStatistics.update": "features",
    "FeatureQueue": "in_features size",
    "FeatureQueue.push": "labels",
    "watch": "layer",
}


def shown(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{value.device}"
    return repr(value)[:40].replace("\n", " ")


CASES = [
    pytest.param(name, argument, value, id=f"{name}-{argument}-{shown(value)}")
    for name, (_, arguments) in CALLS.items()
    for argument, (_, kind) in arguments.items()
    for value in WRONG[kind]
    if argument not in PENDING.get(name, "").split()
]


@pytest.mark.parametrize("name", CALLS)
def test_the_call_works_with_the_right_things(name):
    call, arguments = CALLS[name]
    call(**{argument: value for argument, (value, _) in arguments.items() if value is not LEFT_OUT})


@pytest.mark.parametrize(("name", "argument", "value"), CASES)
def test_one_wrong_thing_is_an_error_of_one_form(name, argument, value):
    call, arguments = CALLS[name]
    given = {other: right for other, (right, _) in arguments.items() if right is not LEFT_OUT}
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        call(**given | {argument: value})
    assert GRAMMAR.match(str(caught.value)), caught.value
