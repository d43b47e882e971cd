"""bench.host: Triton's launches run over a driver that stands in, and are counted."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench import host

pytest.importorskip("triton")
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler on Linux"
)


@needs_compiler
def test_cross_entropy_is_launched_and_timed(capsys, tmp_path):
    path = tmp_path / "host.csv"
    assert host.main(["--match", "cross_entropy plain", "--seconds", "0.05", "--csv", str(path)]) == 0
    head, line = path.read_text().splitlines()
    assert head.split(",") == list(host.COLUMNS)
    found = dict(zip(host.COLUMNS, line.split(","), strict=True))
    assert int(found["triton_launches"]) >= 1
    assert (
        int(found["eager_operations"]) == 5
    )  # log_softmax, nll_loss and their backwards, and the ones they start from
    assert float(found["fused_us"]) > 0 and float(found["ratio"]) > 0
    assert found["case"] in capsys.readouterr().out


def test_a_match_without_a_case_is_an_error(capsys):
    with pytest.raises(SystemExit):
        host.main(["--match", "no such case"])
    assert "--match: no case's name holds 'no such case'" in capsys.readouterr().err


def test_a_compiler_that_fails_says_so(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no room on this device' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(RuntimeError, match="no room on this device"):
        host.build(tmp_path)
