"""Files that are whole or absent."""

import pytest
import torch

from fusedloss import atomic_io


def test_a_replaced_file_is_old_or_new(tmp_path):
    file = tmp_path / "file"
    atomic_io.write_bytes(file, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_io.replacing(file) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(atomic_io.StorageError, match=r"file.name could not be written; what was complete before"):
        atomic_io.write_bytes(tmp_path / "file" / "name", b"new")
    atomic_io.write_bytes(tmp_path / "new" / "folder" / "name", b"new")
    assert (tmp_path / "new" / "folder" / "name").read_bytes() == b"new"


def test_json_is_strict(tmp_path):
    file = tmp_path / "values.json"
    atomic_io.write_json(file, {"a": [float("nan"), 1.5, float("inf")]})
    assert atomic_io.read_json(file) == {"a": [None, 1.5, None]}
    for content in (b"{", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(atomic_io.StorageError, match=r"values.json is not JSON"):
            atomic_io.read_json(file)
    with pytest.raises(atomic_io.StorageError, match=r"No such file or directory: .*none.json"):
        atomic_io.read_json(tmp_path / "none.json")


def test_tensors_survive_and_damage_is_named(tmp_path):
    file = tmp_path / "tensors.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.zeros(0, dtype=torch.int64)}
    atomic_io.write_tensors(file, tensors)
    torch.testing.assert_close(atomic_io.read_tensors(file), tensors)
    file.write_bytes(b"short")
    with pytest.raises(atomic_io.StorageError, match="is not a safetensors file"):
        atomic_io.read_tensors(file)
    with pytest.raises(atomic_io.StorageError, match="No such file"):
        atomic_io.read_tensors(tmp_path / "none.safetensors")
