"""``pytest bench --benchmark-only``: the cases of ``python -m bench`` as pytest-benchmark groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.cases import OPERATIONS, Case, Contest, cases_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a few small cases")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [case for name in OPERATIONS for case in cases_of(name, metafunc.config.getoption("quick"))]
    metafunc.parametrize("case", cases, ids=[case.name for case in cases], indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def contest(case: Case) -> Iterator[Contest]:
    """The case's tensors; nothing is timed unless the values are right."""
    made = case.prepare()
    made.check()
    yield made
