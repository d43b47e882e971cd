"""torch.autograd.gradcheck of cross_entropy in float64, on each CPU backend (SIMD levels: test_simd.py)."""

import pytest
from softmax_battery import check_gradients, gradient_cases

import fusedloss
from fusedloss.backends.cpp import unavailable_reason

CPP = pytest.param("cpp", marks=pytest.mark.skipif(unavailable_reason("cpu") is not None, reason="no compiled module"))


@pytest.mark.parametrize("backend", ["reference", CPP])
@pytest.mark.parametrize("name, case", [pytest.param(name, case, id=name) for name, case in gradient_cases()])
def test_gradients(backend, name, case):
    with fusedloss.backend(backend):
        check_gradients(case)
