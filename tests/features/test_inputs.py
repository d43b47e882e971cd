"""Reading inputs: class folders, tables, and packed images."""

import numpy as np
import pytest
from feature_files import save_image

from fusedloss.features import (
    read_inputs,
)


def test_class_folders(photos):
    inputs = read_inputs(photos)
    assert inputs.class_names == ("cat", "dog", "emu")
    assert inputs.paths == ["cat/c.jpg", "cat/deep/d.png", "dog/a.png", "dog/b.png", "emu/e.png"]
    assert inputs.labels.tolist() == [0, 0, 1, 1, 2]
    assert inputs.load(0).size == (40, 40) and inputs.load(0).mode == "RGB"
    assert read_inputs(photos, class_names=["emu", "dog", "cat", "yak"]).labels.tolist() == [2, 2, 1, 1, 0]
    unlabelled = read_inputs(photos, labelled=False)
    assert (unlabelled.labels, unlabelled.class_names, unlabelled.paths) == (None, None, inputs.paths)
    assert read_inputs(photos / "dog" / "a.png", labelled=False).paths == ["a.png"]


def test_an_image_list(photos, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("path,label,group\nphotos/dog/a.png,10,p1\nphotos/emu/e.png,9,p0\nphotos/dog/b.png,10,p1\n")
    inputs = read_inputs(table)
    assert inputs.class_names == ("9", "10") and inputs.labels.tolist() == [1, 0, 1]
    assert inputs.groups.tolist() == [1, 0, 1]
    changed = tmp_path / "changed.csv"
    changed.write_text(table.read_text().replace("dog/a", "cat/c").replace("a.png", "c.jpg").replace("c.png", "c.jpg"))
    assert read_inputs(changed).sha256 != inputs.sha256


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'text,label,group\n"one, two",good,4\nthree,bad,7\n'),
        ("t.tsv", "group\ttext\tlabel\n4\tone, two\tgood\n7\tthree\tbad\n"),
        (
            "t.jsonl",
            '{"text": "one, two", "label": "good", "group": 4}\n\n{"text": "three", "label": "bad", "group": 7}\n',
        ),
    ],
)
def test_texts(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    inputs = read_inputs(tmp_path / name)
    assert inputs.kind == "text" and [inputs.load(row) for row in range(2)] == ["one, two", "three"]
    assert inputs.class_names == ("bad", "good") and inputs.labels.tolist() == [1, 0]
    assert inputs.groups.tolist() == [4, 7] and inputs.paths[0] == f"{name}:{1 if name == 't.jsonl' else 2}"


@pytest.mark.parametrize("colour", [False, True])
def test_packed_images(tmp_path, colour):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3) if colour else (3, 8, 8), np.uint8)
    np.savez(tmp_path / "p.npz", images=images, labels=np.array([1, 0, 1]), groups=np.array([5, 6, 5]))
    inputs = read_inputs(tmp_path / "p.npz")
    np.testing.assert_array_equal(
        np.asarray(inputs.load(1)), images[1] if colour else images[1][..., None].repeat(3, 2)
    )
    assert inputs.class_names == ("0", "1") and inputs.groups.tolist() == [5, 6, 5]
    np.savez(tmp_path / "q.npz", images=images, labels=np.array([1, 0, 1]), class_names=np.array(["no", "yes"]))
    assert read_inputs(tmp_path / "q.npz").class_names == ("no", "yes")
    assert read_inputs(tmp_path / "q.npz", class_names=["yes", "no"]).labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "must have rows; got none"),
        ("t.csv", "text,label\n", "must have rows; got none"),
        ("t.csv", "words,label\na,b\n", "must have a column 'path' .* or 'text'"),
        ("t.csv", "text,path,label\na,b,c\n", "not both"),
        ("t.csv", "text\na\n", "must have a column 'label'"),
        ("t.csv", "text,label\na,x\nb\n", "value for 'label' in every row; got none in line 3"),
        ("t.csv", "text,label\na,x,1\n", "got more in line 2 than the header has"),
        ("t.csv", "path,label\nmissing.png,x\n", "1 of 1 images do not exist, the first is .*missing.png"),
        ("t.jsonl", '{"text": "a", "label": "x"}\n{', "line 2 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1 must be an object"),
        ("t.parquet", "x", "path must be a folder of images, or a .csv, .tsv, .jsonl or .npz file; got .*t.parquet"),
        ("t.npz", "x", "cannot be read as .npz"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_inputs(tmp_path / name)


def test_wrong_folders_and_packs_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_inputs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold images .*; got none"):
        read_inputs(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"among the 1 class_names; got 2 in .* that are not, for example 'cat'"):
        read_inputs(photos, class_names=["emu"])
    save_image(photos / "loose.png", 9)
    with pytest.raises(ValueError, match=r"one folder per class; got 1 images in none \(loose.png\)"):
        read_inputs(photos)
    np.savez(tmp_path / "p.npz", images=np.zeros((2, 8, 8), np.float32), labels=np.zeros(2, int))
    with pytest.raises(ValueError, match=r"got float32 \(2, 8, 8\)"):
        read_inputs(tmp_path / "p.npz")
    np.savez(tmp_path / "q.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        read_inputs(tmp_path / "q.npz")
    (photos / "loose.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"row 0: .*loose.png cannot be read as an image"):
        read_inputs(photos / "loose.png", labelled=False).load(0)
