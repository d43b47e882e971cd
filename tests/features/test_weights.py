"""Loading a backbone's weights from a file."""

import pytest
import torch

from fusedloss.features import weights


def tiny_network(width=3):
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 2))


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_weights_load_by_name_or_in_order(tmp_path, nested, prefix):
    given, network = tiny_network(), tiny_network()
    state = {prefix + name: tensor for name, tensor in given.state_dict().items()}
    torch.save({nested: state} if nested else state, tmp_path / "w.pth")
    weights.load_weights(network, tmp_path / "w.pth")
    assert weights.sha256_of_weights(network) == weights.sha256_of_weights(given)


def test_safetensors_and_a_new_classifier(tmp_path):
    from safetensors.torch import save_file

    given, network = tiny_network(), tiny_network()
    state = {name: tensor for name, tensor in given.state_dict().items() if not name.startswith("2.")}
    save_file({**state, "2.weight": torch.zeros(9, 3), "2.bias": torch.zeros(9)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"'2.*' must have shape"):
        weights.load_weights(network, tmp_path / "w.safetensors")
    weights.load_weights(network, tmp_path / "w.safetensors", unused=("2",))
    assert weights.sha256_of_weights(network, ("2",)) == weights.sha256_of_weights(given, ("2",))
    assert weights.sha256_of_weights(network) != weights.sha256_of_weights(given)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    def check(content, message, name="w.pth"):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            weights.load_weights(tiny_network(), tmp_path / name)

    wide = {f"net.{name}": tensor for name, tensor in tiny_network(width=5).state_dict().items()}
    check(wide, r"tensor 0 is '0.weight' \(3, 4\); got 'net.0.weight' \(5, 4\)")
    short = [(f"net.{name}", tensor) for name, tensor in tiny_network().state_dict().items()][:-1]
    check(dict(short), "must hold 9 tensors, as the backbone has; got 8")
    check({**tiny_network().state_dict(), "extra": torch.zeros(1)}, "got 1 others, the first is 'extra'")
    check([1, 2], "must hold a state dict")
    check({"a": 1}, "must hold a state dict")
    check(tiny_network(), "cannot be read as weights .*weights_only=True")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        weights.read_state_dict(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        weights.read_state_dict(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        weights.read_state_dict(tmp_path / "none.pth")
