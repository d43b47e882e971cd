"""Losses on logits under torch.compile: one graph each, at most two over many batch sizes."""

import pytest
import torch

import fusedloss

COUNTS = torch.arange(1, 11)
MAKES = {
    "cross-entropy": lambda: fusedloss.CrossEntropyLoss(torch.rand(10), label_smoothing=0.1),
    "focal": fusedloss.FocalLoss,
    "LDAM": lambda: fusedloss.LDAMLoss(COUNTS),
    "balanced softmax": lambda: fusedloss.BalancedSoftmaxLoss(COUNTS),
    "MbLS": lambda: fusedloss.MbLSLoss(1.0),
    "poly": fusedloss.PolyLoss,
    "FLSD-53": fusedloss.FLSD53Loss,
    "dual focal": fusedloss.DualFocalLoss,
    "dual focal, weights, prior": lambda: fusedloss.DualFocalLoss(
        weight=torch.rand(10), terms=[fusedloss.Prior(torch.rand(10).log_softmax(0))]
    ),
    "dual focal, rows": lambda: fusedloss.DualFocalLoss(reduction="none"),
    "entropy penalty": fusedloss.ECPLoss,
    "ACLS": lambda: fusedloss.ACLSLoss(margin=1.0),
}


@pytest.mark.parametrize("name", MAKES)
def test_at_most_two_graphs_over_ten_batch_sizes(name):
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    loss = MAKES[name]()
    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 3, 5, 8, 13, 1, 21, 34, 55, 89):
        logits = torch.randn(rows, 10).tanh().requires_grad_()
        labels = torch.randint(10, (rows,))
        values = [run(logits, labels) for run in (compiled, loss)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value.sum(), logits)[0] for value in values))
    assert len(graphs) <= 2
