"""Every module under torch.compile(fullgraph=True, dynamic=True): no graph break, and at most two graphs."""

import pytest
import torch
from torch import nn

import fusedloss
from fusedloss import MarginPenalty
from fusedloss.terms import AdditiveMargin, AngularMargin, ClassTemperature, Prior, Scale, SoftCap

WIDTH, CLASSES, SIZES = 6, 5, (4, 5, 7, 8, 9, 11, 12, 16, 17, 23)
COUNTS = torch.tensor([100, 50, 20, 10, 5])

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def logits(x, y):
    return x[:, :CLASSES], y


def features(x, y):
    return x, y


def both(x, y):
    return x[:, :CLASSES], y, x


def soft(x, y):
    return x[:, :CLASSES], x[:, :CLASSES].detach().softmax(1)


def images(x, y):
    return x[:, :CLASSES, None, None].expand(-1, -1, 2, 3), y[:, None, None].expand(-1, 2, 3)


def views(x, y):
    return torch.stack([x, x.flip(1)], 1), y


def learned(*shape):
    return nn.Parameter(torch.rand(shape) + 0.5)


def cross_entropy(**keywords):
    return lambda: fusedloss.CrossEntropyLoss(**keywords)


MODULES = {
    "cross-entropy": (cross_entropy(), logits),
    "weights and smoothing": (cross_entropy(weight=torch.rand(CLASSES), label_smoothing=0.1), logits),
    "focal": (cross_entropy(focal_gamma=2.0), logits),
    "z-loss": (cross_entropy(z_loss=0.1), logits),
    "poly": (cross_entropy(poly_epsilon=1.0), logits),
    "penalty": (cross_entropy(margin_penalty=MarginPenalty(1.0, 0.1)), logits),
    "mixed penalty": (cross_entropy(margin_penalty=MarginPenalty(1.0, 0.1, "sum", mix=True)), logits),
    "sum": (cross_entropy(reduction="sum"), logits),
    "none": (cross_entropy(reduction="none", label_smoothing=0.1), logits),
    "statistics": (cross_entropy(return_stats=True), logits),
    "ignored": (cross_entropy(ignore_index=2), logits),
    "probabilities": (cross_entropy(label_smoothing=0.1), soft),
    "focal probabilities": (cross_entropy(focal_gamma=2.0), soft),
    "images": (cross_entropy(), images),
    "temperature": (lambda: fusedloss.CrossEntropyLoss(terms=[ClassTemperature(torch.rand(CLASSES) + 0.5)]), logits),
    "learned temperature": (lambda: fusedloss.CrossEntropyLoss(terms=[ClassTemperature(learned(CLASSES))]), logits),
    "learned scale": (lambda: fusedloss.CrossEntropyLoss(terms=[Scale(learned()), Prior(COUNTS.log())]), logits),
    "soft cap": (lambda: fusedloss.CrossEntropyLoss(terms=[SoftCap(3.0), Scale(2.0)]), logits),
    "additive margin": (lambda: fusedloss.CrossEntropyLoss(terms=[AdditiveMargin(learned(CLASSES))]), logits),
    "focal preset": (fusedloss.FocalLoss, logits),
    "balanced softmax": (lambda: fusedloss.BalancedSoftmaxLoss(COUNTS), logits),
    "ldam": (lambda: fusedloss.LDAMLoss(COUNTS), logits),
    "mbls": (fusedloss.MbLSLoss, logits),
    "flsd": (fusedloss.FLSD53Loss, logits),
    "poly preset": (fusedloss.PolyLoss, logits),
    "dual focal": (fusedloss.DualFocalLoss, logits),
    "dual focal rows": (
        lambda: fusedloss.DualFocalLoss(weight=torch.rand(CLASSES), terms=[Prior(COUNTS.log())], reduction="none"),
        logits,
    ),
    "ecp": (fusedloss.ECPLoss, logits),
    "acls": (fusedloss.ACLSLoss, logits),
    "linear": (lambda: fusedloss.LinearCrossEntropyLoss(WIDTH, CLASSES), features),
    "linear with a bias": (lambda: fusedloss.LinearCrossEntropyLoss(WIDTH, CLASSES, bias=True), features),
    "linear focal": (lambda: fusedloss.LinearCrossEntropyLoss(WIDTH, CLASSES, focal_gamma=2.0), features),
    "linear none": (lambda: fusedloss.LinearCrossEntropyLoss(WIDTH, CLASSES, reduction="none"), features),
    "linear statistics": (lambda: fusedloss.LinearCrossEntropyLoss(WIDTH, CLASSES, return_stats=True), features),
    "cosine": (lambda: fusedloss.LinearCrossEntropyLoss(WIDTH, CLASSES, normalize=True), features),
    "several outputs": (lambda: fusedloss.LinearCrossEntropyLoss(WIDTH, CLASSES, out_features=(2,)),
                        lambda x, y: (x, y[:, None].expand(-1, 2))),
    "arcface": (lambda: fusedloss.ArcFaceLoss(WIDTH, CLASSES), features),
    "arcface, learned scale": (lambda: fusedloss.ArcFaceLoss(WIDTH, CLASSES, scale=learned()), features),
    "arcface, sub-centers": (lambda: fusedloss.ArcFaceLoss(WIDTH, CLASSES, sub_centers=2), features),
    "cosface": (lambda: fusedloss.CosFaceLoss(WIDTH, CLASSES), features),
    "combined": (lambda: fusedloss.CombinedMarginLoss(WIDTH, CLASSES, margin=(1.0, 0.3, 0.2)), features),
    "adaface": (lambda: fusedloss.AdaFaceLoss(WIDTH, CLASSES), features),
    "curricular": (lambda: fusedloss.CurricularFaceLoss(WIDTH, CLASSES), features),
    "arcface head": (lambda: fusedloss.ArcFaceHead(WIDTH, CLASSES), features),
    "supcon": (fusedloss.SupConLoss, features),
    "supcon of views": (fusedloss.SupConLoss, views),
    "simclr": (fusedloss.SupConLoss, lambda x, y: (torch.stack([x, x.flip(1)], 1),)),
    "vace": (lambda: fusedloss.VACELoss(WIDTH, CLASSES), both),
    "fedlas": (lambda: fusedloss.FeDLaSLoss(CLASSES), both),
    "fedlas, margin": (lambda: fusedloss.FeDLaSLoss(CLASSES, base="margin"), both),
    "prototypes": (lambda: fusedloss.PrototypeLoss(WIDTH, CLASSES), features),
    "angular margin on cosines": (
        lambda: fusedloss.CrossEntropyLoss(terms=[AngularMargin(0.3), Scale(8.0)]),
        lambda x, y: (x[:, :CLASSES].tanh(), y),
    ),
}  # fmt: skip


# One of each way through the operations; the others are slow tests.
ALWAYS = {
    "weights and smoothing", "none", "focal probabilities", "images", "learned temperature", "soft cap",
    "dual focal rows", "mixed penalty", "linear statistics", "cosine", "arcface", "adaface", "curricular",
    "supcon of views", "vace", "fedlas", "prototypes",
}  # fmt: skip
assert MODULES.keys() >= ALWAYS


class Counted:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, example_inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(module, example_inputs)


def batch(rows):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, WIDTH, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in MODULES]
)
def test_at_most_two_graphs_over_ten_batch_sizes(name):
    build, arrange = MODULES[name]
    torch.manual_seed(0)
    loss = build()
    torch.manual_seed(0)
    eager = build()
    counted = Counted()

    def step(module, x, y):
        result = module(*arrange(x, y))
        return result[0] if isinstance(result, tuple) else result

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counted)
    for rows in SIZES:
        x, y = batch(rows)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = compiled(loss, ours, y), step(eager, theirs, y)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert counted.graphs <= 2
    for (key, one), two in zip(loss.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, key=key: f"{key}: {text}")
