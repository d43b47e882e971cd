"""The checks of arguments: what each takes, and the one form of what it says."""

import math
import re
import warnings

import numpy as np
import pytest
import torch

from fusedloss.core import checks
from fusedloss.core.user_warnings import warn_user

NAN, INF = math.nan, math.inf
GRAMMAR = re.compile(r"^[\w: .]+ must .*; got ", re.DOTALL)

BAD = [
    (TypeError, "x must be a number; got str", lambda: checks.check_number("x", "1")),
    (TypeError, "x must be a number; got bool", lambda: checks.check_number("x", True)),
    (TypeError, "x must be a number; got bool", lambda: checks.check_number("x", np.bool_(True))),
    (TypeError, "x must be a number; got Tensor", lambda: checks.check_number("x", torch.tensor(1.0))),
    (TypeError, "x must be a number; got ndarray", lambda: checks.check_number("x", np.ones(1))),
    (TypeError, "x must be a number; got complex", lambda: checks.check_number("x", 1j)),
    (TypeError, "x must be a number; got NoneType", lambda: checks.check_number("x", None)),
    (ValueError, "x must be finite; got nan", lambda: checks.check_number("x", NAN)),
    (ValueError, "x must be finite; got -inf", lambda: checks.check_number("x", -INF)),
    (ValueError, "x must be finite and at least 0; got inf", lambda: checks.check_number("x", INF, at_least=0)),
    (ValueError, "x must be finite and above 0; got 0", lambda: checks.check_number("x", 0, above=0)),
    (ValueError, "x must be in [0, 1]; got 1.5", lambda: checks.check_number("x", 1.5, at_least=0, at_most=1)),
    (ValueError, "x must be in [0, 1); got 1", lambda: checks.check_number("x", 1, at_least=0, below=1)),
    (ValueError, "x must be in (0, 1); got nan", lambda: checks.check_number("x", NAN, above=0, below=1)),
    (ValueError, "x must be finite and at most 1; got 2.0", lambda: checks.check_number("x", np.float32(2), at_most=1)),
    (TypeError, "n must be an integer; got float", lambda: checks.check_integer("n", 1.0)),
    (TypeError, "n must be an integer; got bool", lambda: checks.check_integer("n", False)),
    (TypeError, "n must be an integer; got Tensor", lambda: checks.check_integer("n", torch.tensor(1))),
    (ValueError, "n must be at least 1; got 0", lambda: checks.check_integer("n", 0, at_least=1)),
    (ValueError, f"ignore_index must fit in 64 bits; got {2**63}", lambda: checks.check_ignore_index(2**63)),
    (TypeError, "b must be True or False; got int", lambda: checks.check_bool("b", 1)),
    (ValueError, "c must be 'a', 'b' or 'd'; got 'e'", lambda: checks.check_choice("c", "e", ("a", "b", "d"))),
    (ValueError, "c must be 'a' or 'b'; got None", lambda: checks.check_choice("c", None, ("a", "b"))),
    (ValueError, "c must be 'a' or 'b'; got ['a']", lambda: checks.check_choice("c", ["a"], ("a", "b"))),
    (TypeError, "t must be a floating-point tensor; got list", lambda: checks.check_tensor("t", [1.0])),
    (
        TypeError,
        "t must be a floating-point tensor; got torch.int64",
        lambda: checks.check_tensor("t", torch.ones(2).long()),
    ),
    (TypeError, "t must be a dense tensor; got layout", lambda: checks.check_tensor("t", torch.eye(2).to_sparse())),
    (ValueError, "t must have shape (B, 4); got (2, 3)", lambda: checks.check_tensor("t", torch.ones(2, 3), ("B", 4))),
    (ValueError, "t must have shape (K,); got ()", lambda: checks.check_tensor("t", torch.ones(()), ("K",))),
    (
        ValueError,
        "t must be on the device of x, meta; got cpu",
        lambda: checks.check_tensor("t", torch.ones(2), like=torch.ones(1, device="meta"), of="x"),
    ),
    (
        TypeError,
        "y must be a tensor of integers; got torch.bool",
        lambda: checks.check_integer_tensor("y", torch.ones(2).bool()),
    ),
    (TypeError, "y must be a tensor of integers; got list", lambda: checks.check_integer_tensor("y", [1])),
    (
        ValueError,
        "w must be at least 0 for every class; got",
        lambda: checks.check_class_weight("w", torch.tensor([NAN])),
    ),
    (ValueError, "w must have shape (K,); got (1, 1)", lambda: checks.check_class_weight("w", torch.ones(1, 1))),
    (
        ValueError,
        "y must have shape (3,) for input of shape (3, 5); got (3, 5) (one-hot? pass y.argmax(1), or probabilities as",
        lambda: checks.check_label_shape("y", torch.ones(3, 5).long(), (3,), (3, 5)),
    ),
    (TypeError, "a must be a tensor or an array of numbers; got str", lambda: checks.as_tensor("a", "abc")),
    (TypeError, "a must be a tensor or an array of numbers; got NoneType", lambda: checks.as_tensor("a", None)),
    (TypeError, "a must be a tensor or an array of numbers; got list", lambda: checks.as_tensor("a", [[1], [1, 2]])),
    (TypeError, "a must be a tensor or an array of numbers; got <U1", lambda: checks.as_tensor("a", np.array(["a"]))),
    (TypeError, "a must be a dense tensor of real numbers; got torch.complex64", lambda: checks.as_tensor("a", [1j])),
    (ValueError, "a must hold values; got", lambda: checks.as_tensor("a", torch.ones(2, device="meta"))),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[bad[1] for bad in BAD])
def test_what_is_refused_is_said_in_one_form(error, message, call):
    with pytest.raises(error, match="^" + re.escape(message)) as caught:
        call()
    assert GRAMMAR.match(str(caught.value))


def test_what_is_taken():
    assert type(checks.check_number("x", np.float32(0.5), at_least=0)) is float
    assert type(checks.check_number("x", np.int64(2))) is float
    assert type(checks.check_integer("n", np.int32(3), at_least=3)) is int
    assert checks.check_number("x", 0, at_least=0, at_most=0) == 0
    reverse = np.arange(4.0)[::-1]
    assert checks.as_tensor("a", reverse).tolist() == [3.0, 2.0, 1.0, 0.0]
    locked = np.arange(3)
    locked.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checks.as_tensor("a", locked).tolist() == [0, 1, 2]
    assert checks.as_tensor("a", torch.ones(2, requires_grad=True)).requires_grad is False


def test_labels():
    labels = torch.tensor([[0, -100], [7, 1]])
    with pytest.raises(IndexError, match="got label 7 at row 2"):
        checks.check_labels(labels, 5, -100)
    with pytest.raises(IndexError, match="got label -100 at row 1"):
        checks.check_labels(labels, 8, None)
    checks.check_labels(labels, 8, -100)
    checks.check_labels(torch.zeros(0, dtype=torch.int64), 1, None)


def test_a_warning_points_at_the_first_line_outside_of_the_package():
    inner = {"__name__": "fusedloss.inner", "warn_user": warn_user}
    exec("def called(): warn_user('look', RuntimeWarning)", inner)
    outer = {"__name__": "torch.nn.outer", "called": inner["called"]}
    exec("def outer(): called()", outer)
    with pytest.warns(RuntimeWarning, match="look") as caught:
        outer["outer"]()
    assert caught[0].filename == __file__
