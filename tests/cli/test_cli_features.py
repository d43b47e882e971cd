"""`fusedloss extract`, `fusedloss import`, and the command line around them."""

import gzip
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fusedloss.cli.main import COMMANDS, run
from fusedloss.features import FeatureBank, load_backbone

ROWS, WIDTH = 12, 4


@pytest.fixture
def arrays():
    features = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    return {"features": features, "labels": np.arange(ROWS) % 3, "groups": np.arange(ROWS) // 2}


def call(capsys, *arguments):
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, *arguments):
    """The one line that a user's error is."""
    status, _, errors = call(capsys, *arguments)
    assert status == 2 and errors.startswith("fusedloss: ") and errors.count("\n") == 1, errors
    return errors


# the command line itself


def test_help_lists_every_command_and_imports_none(capsys):
    program = (
        "import sys; from fusedloss.cli.main import run; status = run(['--help']);"
        "heavy = {'timm', 'transformers', 'matplotlib', 'PIL', 'fusedloss.cli.extract'} & set(sys.modules);"
        "assert status == 0 and not heavy, (status, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", ["extract", "import"])
def test_help_of_a_command_has_examples_and_defaults(capsys, name):
    status, text, _ = call(capsys, name, "--help")
    assert status == 0 and "Examples:" in text and f"  fusedloss {name} " in text
    options = text.split("Options:")[1].split("--help")[0]
    assert options.count("\n  --") == options.count("default:") + options.count("[required]") + options.count(
        "--normalize"
    )


def test_mistyped_commands_are_told_apart(capsys):
    status, _, errors = call(capsys, "extrat")
    assert status == 2 and "Did you mean 'extract'?" in errors
    assert call(capsys, "extract")[0] == 2


def test_a_missing_command_line_library_is_named():
    program = (
        "import sys, runpy; sys.modules['typer'] = None; sys.argv = ['fusedloss', *sys.argv[1:]];"
        "runpy.run_module('fusedloss', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program, "train"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "fusedloss: the command line needs typer: pip install 'fusedloss[train]'\n"
    done = subprocess.run([sys.executable, "-c", program, "info"], capture_output=True, text=True)
    assert done.returncode == 0 and "softmax_ce" in done.stdout, done.stderr


def test_a_traceback_can_be_asked_for(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDLOSS_TRACEBACK", "1")
    status, _, errors = call(capsys, "import", tmp_path / "none.npy", tmp_path / "bank")
    assert status == 2 and "Traceback" in errors and "none.npy, which does not exist" in errors


# import


def save_npz(folder, arrays):
    np.savez(folder / "all.npz", **arrays)
    return [folder / "all.npz"]


def save_npy(folder, arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [folder / "features.npy", "--labels", folder / "labels.npy", "--groups", folder / "groups.npy"]


def save_pt(folder, arrays):
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / "all.pt")
    return [folder / "all.pt"]


def save_safetensors(folder, arrays):
    from safetensors.numpy import save_file

    save_file(arrays, folder / "all.safetensors")
    return [folder / "all.safetensors"]


def csv_text(arrays):
    rows = zip(arrays["labels"], arrays["features"], arrays["groups"], strict=True)
    lines = [f"{label},{','.join(map(repr, map(float, row)))},{group}" for label, row, group in rows]
    return "\n".join(["label,a,b,c,d,group", *lines]) + "\n"


def save_csv(folder, arrays):
    (folder / "all.csv").write_text(csv_text(arrays))
    return [folder / "all.csv"]


def save_csv_gz(folder, arrays):
    (folder / "all.csv.gz").write_bytes(gzip.compress(csv_text(arrays).encode()))
    return [folder / "all.csv.gz"]


def save_mixed(folder, arrays):
    torch.save(torch.from_numpy(arrays["features"]), folder / "features.pt")
    (folder / "labels.csv").write_text("\n".join(["label", *map(str, arrays["labels"])]))
    np.save(folder / "groups.npy", arrays["groups"])
    return [folder / "features.pt", "--labels", folder / "labels.csv", "--groups", folder / "groups.npy"]


@pytest.mark.parametrize("save", [save_npz, save_npy, save_pt, save_safetensors, save_csv, save_csv_gz, save_mixed])
def test_import_reads_every_kind_of_file(capsys, tmp_path, arrays, save):
    given = save(tmp_path, arrays)
    status, text, errors = call(capsys, "import", given[0], tmp_path / "bank", *given[1:])
    assert status == 0, errors
    assert "bank: 12 rows, 4 features, 3 classes" in text
    bank = FeatureBank.open(tmp_path / "bank", verify=True)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(bank, name), array)
    assert bank.class_names == ("0", "1", "2") and bank.features.dtype == np.float32


def test_import_numbers_names(capsys, tmp_path, arrays):
    names = np.array(["owl", "ant", "elk"])[arrays["labels"]]
    patients = np.array([f"p{group}" for group in arrays["groups"]])
    np.savez(tmp_path / "all.npz", features=arrays["features"], labels=names, groups=patients)
    assert call(capsys, "import", tmp_path / "all.npz", tmp_path / "a")[0] == 0
    bank = FeatureBank.open(tmp_path / "a")
    assert bank.class_names == ("ant", "elk", "owl") and bank.labels.tolist()[:3] == [2, 0, 1]
    np.testing.assert_array_equal(bank.groups, arrays["groups"])
    (tmp_path / "names.txt").write_text("owl\nant\nelk\nyak\n")
    given = ("--classes", tmp_path / "names.txt", "--dtype", "float16", "--backbone", "mine")
    assert call(capsys, "import", tmp_path / "all.npz", tmp_path / "b", *given)[0] == 0
    bank = FeatureBank.open(tmp_path / "b")
    assert (bank.num_classes, bank.labels.tolist()[:3], bank.features.dtype) == (4, [0, 1, 2], np.float16)
    assert bank.manifest.source.backbone == "mine"
    assert call(capsys, "import", tmp_path / "all.npz", tmp_path / "c", "--classes", tmp_path / "b")[0] == 0
    assert FeatureBank.open(tmp_path / "c").class_names == bank.class_names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": np.full(ROWS, 3), "class_names": np.array(["a", "b"])},
            r"labels must lie in \[0, 2\); got 12 that do not",
        ),
        ({"labels": np.zeros(5, int)}, r"labels must have shape \(12,\)"),
        ({"labels": np.zeros(ROWS)}, "labels must be integers; got float64"),
        (
            {"features": np.full((ROWS, 2), np.nan)},
            "NaN or infinite values in 12 rows: row 0, row 1",
        ),
        ({"features": np.zeros((ROWS, 2, 2))}, r"features must have shape \(N, D\)"),
    ],
)
def test_import_writes_nothing_when_anything_is_wrong(capsys, tmp_path, arrays, change, message):
    np.savez(tmp_path / "all.npz", **{**arrays, **change})
    errors = refused(capsys, "import", tmp_path / "all.npz", tmp_path / "bank")
    assert re.search(message, errors), errors
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]


def test_import_explains_what_it_cannot_read(capsys, tmp_path, arrays):
    def error(name, content, *options):
        (tmp_path / name).write_bytes(content)
        return refused(capsys, "import", tmp_path / name, tmp_path / "bank", *options)

    np.save(tmp_path / "only.npy", arrays["features"])
    assert "labels must be in " in refused(capsys, "import", tmp_path / "only.npy", tmp_path / "bank")
    assert "bad.npy cannot be read" in error("bad.npy", b"nothing")
    assert "bad.npz cannot be read" in error("bad.npz", b"nothing")
    assert "bad.pt cannot be read" in error("bad.pt", b"nothing")
    assert "bad.safetensors cannot be read" in error("bad.safetensors", b"nothing")
    assert "bad.csv.gz cannot be read" in error("bad.csv.gz", b"nothing")
    assert "must be in a file: .npy, .npz, .csv" in error("bad.parquet", b"nothing")
    assert "line 3: 2 values, the header has 3" in error("a.csv", b"label,a,b\n0,1,2\n0,1\n")
    assert "row 0: could not convert string to float: 'x'" in error("b.csv", b"label,a\n0,x\n")
    assert "must have rows below its header; got none" in error("c.csv", b"label,a\n")
    assert "dtype must be one of float16, float32; got 'int8'" in error("d.csv", b"label,a\n0,1\n", "--dtype", "int8")
    assert "got 1 rows that overflow it, the first is row 1" in error(
        "e.csv", b"label,a\n0,1\n0,1e6\n", "--dtype", "float16"
    )
    (tmp_path / "twice.txt").write_text("a\na\n")
    assert "each only once" in error("f.csv", b"label,a\n0,1\n", "--classes", tmp_path / "twice.txt")
    torch.save({"features": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")
    assert "code.pt cannot be read" in refused(capsys, "import", tmp_path / "code.pt", tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_import_leaves_an_existing_folder_alone(capsys, tmp_path, arrays):
    given = save_npz(tmp_path, arrays)
    assert call(capsys, "import", *given, tmp_path / "bank")[0] == 0
    assert "path must be a new folder; got" in refused(capsys, "import", *given, tmp_path / "bank")


# extract


@pytest.fixture
def packed(tmp_path):
    """Packed images, and weights for timm's smallest network."""
    import timm

    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16), np.uint8)
    np.savez(tmp_path / "p.npz", images=images, labels=np.arange(9) % 3, class_names=np.array(["x", "y", "z"]))
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "w.pth")
    return [
        tmp_path / "p.npz",
        tmp_path / "bank",
        "--backbone",
        "timm:test_resnet",
        "--weights",
        tmp_path / "w.pth",
    ]


def test_extract_makes_a_bank(capsys, tmp_path, packed):
    options = [
        "--image-size",
        "32",
        "--crop",
        "1",
        "--dtype",
        "float32",
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    status, text, errors = call(capsys, "extract", *packed, *options)
    assert status == 0, errors
    bank = FeatureBank.open(tmp_path / "bank", verify=True)
    assert f"bank: 9 rows, {bank.in_features} features, 3 classes" in text
    source = bank.manifest.source
    assert (source.backbone, source.image_size, source.crop) == ("timm:test_resnet", 32, 1.0)
    assert source == load_backbone("timm:test_resnet", weights=packed[-1], image_size=32, crop=1.0, device="cpu").source
    assert call(capsys, "extract", *packed, *options)[0] == 0
    changed = refused(capsys, "extract", *packed, *options, "--normalize")
    assert "normalized False, not True" in changed and "path must be a new folder" in changed


def test_extract_with_the_classes_of_another_bank(capsys, tmp_path, packed):
    assert call(capsys, "extract", *packed, "--image-size", "32")[0] == 0
    np.savez(tmp_path / "q.npz", images=np.zeros((1, 16, 16), np.uint8), labels=[0], class_names=np.array(["z"]))
    options = ["--image-size", "32", "--classes", tmp_path / "bank"]
    assert call(capsys, "extract", tmp_path / "q.npz", tmp_path / "test", *packed[2:], *options)[0] == 0
    test = FeatureBank.open(tmp_path / "test")
    assert test.class_names == ("x", "y", "z") and test.labels.tolist() == [2]
    FeatureBank.open(tmp_path / "bank").require_compatible(test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone", "vgg"], "backbone must be timm:NAME or hf:NAME; got 'vgg'"),
        (["--backbone", "timm:vggg16"], "backbone must be a model of timm; got 'vggg16' (close: vgg16"),
        (["--weights", "nowhere.pth"], "weights must be a file; got nowhere.pth, which does not exist"),
        (["--dtype", "int8"], "dtype must be one of float16, float32; got 'int8'"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--device", "abacus"], "device must be auto, cpu, cuda or cuda:N"),
        (["--precision", "int8"], "precision must be one of float32, bfloat16, float16"),
        (
            ["--classes", "nowhere.txt"],
            "classes must be a feature bank or a file with",
        ),
    ],
)
def test_extract_refuses_in_one_line(capsys, packed, options, message):
    assert message in refused(capsys, "extract", *packed, *options)
