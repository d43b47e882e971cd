"""The repr of every module: the call that makes it, without what is left at its default."""

import inspect

import pytest
import torch
from torch import nn

import fusedloss
from fusedloss import AngularMargin, ClassTemperature, MarginPenalty, Prior, Scale

COUNTS = torch.tensor([30, 20, 10])
W = torch.ones(3)

# The module of a call, and another call that gives each of its settings a value of its own.
CROSS_ENTROPY = {
    "weight": W,
    "ignore_index": 7,
    "reduction": "sum",
    "label_smoothing": 0.25,
    "terms": [Scale(2.0)],
    "focal_gamma": 1.5,
    "poly_epsilon": 0.75,
    "z_loss": 0.5,
    "margin_penalty": MarginPenalty(2.0, 0.5),
    "return_stats": True,
}
ROW = {"weight": W, "ignore_index": 7, "reduction": "sum", "terms": [Scale(2.0)]}
FORWARDED = {
    "weight": "weight=tensor(3,)",
    "ignore_index": "ignore_index=7",
    "reduction": "reduction='sum'",
    "label_smoothing": "label_smoothing=0.25",
    "terms": "terms=[Scale(scale=2.0)]",
    "focal_gamma": "focal_gamma=1.5",
    "poly_epsilon": "poly_epsilon=0.75",
    "z_loss": "z_loss=0.5",
    "margin_penalty": "margin_penalty=MarginPenalty(margin=2.0, strength=0.5)",
    "return_stats": "return_stats=True",
}
MODULES = {
    fusedloss.CrossEntropyLoss: ((), "", {}),
    fusedloss.FocalLoss: ((), "", {"gamma": (3.0, "gamma=3.0")}),
    fusedloss.BalancedSoftmaxLoss: (
        (COUNTS,),
        "class_counts=tensor(3,)",
        {"strength": (0.5, "strength=0.5"), "floor": (2.0, "floor=2.0")},
    ),
    fusedloss.LDAMLoss: (
        (COUNTS,),
        "class_counts=tensor(3,)",
        {"max_margin": (0.25, "max_margin=0.25"), "scale": (20.0, "scale=20.0")},
    ),
    fusedloss.MbLSLoss: (
        (),
        "",
        {"margin": (2.0, "margin=2.0"), "strength": (0.5, "strength=0.5"), "over": ("sum", "over='sum'")},
    ),
    fusedloss.PolyLoss: ((), "", {"epsilon": (2.0, "epsilon=2.0")}),
    fusedloss.LinearCrossEntropyLoss: (
        (4, 3),
        "in_features=4, num_classes=3",
        {
            "out_features": ((2,), "out_features=[2]"),
            "bias": (True, "bias=True"),
            "normalize": (True, "normalize=True"),
            "sample_rate": (0.5, "sample_rate=0.5"),
        },
    ),
    fusedloss.FLSD53Loss: ((), "", {"gamma": (2.0, "gamma=2.0")}),
    fusedloss.DualFocalLoss: ((), "", {"gamma": (3.0, "gamma=3.0")}),
    fusedloss.ECPLoss: ((), "", {"strength": (0.5, "strength=0.5")}),
    fusedloss.ACLSLoss: (
        (),
        "",
        {
            "strength": (0.5, "strength=0.5"),
            "margin": (2.0, "margin=2.0"),
            "positive": (0.5, "positive=0.5"),
            "negative": (0.25, "negative=0.25"),
        },
    ),
}
# Of torch's signature, and without a meaning here.
NOT_SETTINGS = {"size_average", "reduce", "device", "dtype", "options"}


@pytest.mark.parametrize("kind", MODULES)
def test_defaults_are_not_shown(kind):
    arguments, shown, _ = MODULES[kind]
    assert repr(kind(*arguments)) == f"{kind.__name__}({shown})"


@pytest.mark.parametrize("kind", MODULES)
def test_each_setting_is_shown_alone(kind):
    arguments, always, own = MODULES[kind]
    forwarded = CROSS_ENTROPY if issubclass(kind, fusedloss.CrossEntropyLoss) else ROW
    names = list(inspect.signature(kind).parameters)[len(arguments) :]
    for name in names:
        if name in NOT_SETTINGS:
            continue
        value, shown = own[name] if name in own else (forwarded[name], FORWARDED[name])
        expected = ", ".join(part for part in (always, shown) if part)
        assert repr(kind(*arguments, **{name: value})) == f"{kind.__name__}({expected})"


def test_terms_and_learned_tensors():
    tau = nn.Parameter(torch.ones(3))
    loss = fusedloss.CrossEntropyLoss(
        terms=[AngularMargin(0.5, "easy"), ClassTemperature(tau), Prior(W, 0.5), Scale(torch.tensor(4.0))]
    )
    assert repr(loss) == (
        "CrossEntropyLoss(terms=[AngularMargin(margin=0.5, fallback='easy'), ClassTemperature(tau=tensor(3,)), "
        "Prior(log_prior=tensor(3,), strength=0.5), Scale(scale=4.0)])"
    )
    assert "(loss): FocalLoss(gamma=3.0)" in repr(nn.ModuleDict({"loss": fusedloss.FocalLoss(3.0)}))


def test_what_changed_after_construction_and_a_loss_of_ones_own():
    class Mine(fusedloss.RowLoss):
        def __init__(self, power, shift=0.0):
            super().__init__()
            self.power, self.shift = power, shift

    loss = Mine(2.0)
    loss.shift = 1.0
    assert repr(loss) == "Mine(power=2.0, shift=1.0)"
