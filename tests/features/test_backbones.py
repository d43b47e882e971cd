"""Backbones of timm and transformers, and extraction with them."""

import csv
import sys

import numpy as np
import pytest
import torch

from fusedloss.features import (
    FeatureSource,
    backbone_of,
    compute_features,
    extract,
    load_backbone,
    read_inputs,
)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_features_are_what_the_classifier_reads(photos, tmp_path, timm_weights, name):
    import timm

    backbone = load_backbone(
        f"timm:{name}", weights=timm_weights / f"{name}.pth", image_size=64, crop=1.0, device="cpu"
    )
    bank = extract(read_inputs(photos), backbone, tmp_path / "bank", dtype="float32", batch_size=2, progress=False)
    model = timm.create_model(name, pretrained=False)
    model.load_state_dict(torch.load(timm_weights / f"{name}.pth", weights_only=True))
    if name == "test_vit":
        model.set_input_size(img_size=(64, 64))
    seen = []
    model.get_classifier().register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    images = torch.stack([backbone.prepare(read_inputs(photos).load(row)) for row in range(5)])
    assert images.shape == (5, 3, 64, 64)
    with torch.no_grad():
        model.eval()(images)
    torch.testing.assert_close(torch.tensor(bank.features), seen[0], rtol=1e-4, atol=1e-5)
    source = bank.manifest.source
    assert (source.backbone, source.pooling, source.image_size, source.crop) == (
        f"timm:{name}",
        "pre_logits",
        64,
        1.0,
    )
    assert bank.class_names == ("cat", "dog", "emu") and bank.paths[0] == "cat/c.jpg"
    again = compute_features(read_inputs(photos), backbone_of(source, device="cpu"), batch_size=2, progress=False)
    np.testing.assert_array_equal(again, bank.features)


def test_normalised_features_and_reduced_precision(photos, timm_weights):
    inputs, file = read_inputs(photos), timm_weights / "test_resnet.pth"
    plain = load_backbone("timm:test_resnet", weights=file, image_size=32, device="cpu")
    unit = load_backbone("timm:test_resnet", weights=file, image_size=32, normalize=True, device="cpu")
    half = load_backbone("timm:test_resnet", weights=file, image_size=32, precision="bfloat16", device="cpu")
    exact, scaled, rough = (compute_features(inputs, one, progress=False) for one in (plain, unit, half))
    np.testing.assert_allclose(scaled, exact / np.linalg.norm(exact, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(rough, exact)
    np.testing.assert_allclose(rough, exact, rtol=0.1, atol=0.1 * np.abs(exact).max())
    assert plain.source.differences(half.source) == ["precision is 'float32', not 'bfloat16'"]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_features_do_not_depend_on_padding(tmp_path, tiny_bert, pooling):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["a good film", 1], ["bad", 0], ["a b c d e f g h i j", 0]])
    inputs = read_inputs(tmp_path / "t.csv")
    backbone = load_backbone(f"hf:{tiny_bert}", pooling=pooling, device="cpu")
    bank = extract(inputs, backbone, tmp_path / "bank", dtype="float32", batch_size=3, progress=False)
    alone = compute_features(inputs, backbone, batch_size=1, progress=False)
    np.testing.assert_allclose(bank.features, alone, rtol=1e-4, atol=1e-5)
    tokens = backbone.processor(["a good film"], return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model(**tokens).last_hidden_state[0]
    expected = hidden.mean(dim=0) if pooling == "mean" else hidden[0]
    np.testing.assert_allclose(bank.features[0], expected, rtol=1e-4, atol=1e-5)
    again = backbone_of(bank.manifest.source, device="cpu")
    np.testing.assert_array_equal(compute_features(inputs, again, batch_size=3, progress=False), bank.features)


def test_long_texts_are_cut(tmp_path, tiny_bert):
    (tmp_path / "t.csv").write_text(f"text,label\n{'a ' * 100},0\n{'a ' * 6},0\n")
    inputs = read_inputs(tmp_path / "t.csv")
    features = compute_features(inputs, load_backbone(f"hf:{tiny_bert}", max_length=8, device="cpu"), progress=False)
    np.testing.assert_allclose(features[0], features[1], rtol=1e-5, atol=1e-6)
    whole = compute_features(inputs, load_backbone(f"hf:{tiny_bert}", device="cpu"), progress=False)
    assert not np.allclose(whole[0], whole[1])
    with pytest.raises(ValueError, match=r"max_length must be at most 24 for hf:.*; got 25"):
        load_backbone(f"hf:{tiny_bert}", max_length=25)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_transformers_image_features(photos, tiny_vit, pooling):
    inputs = read_inputs(photos)
    backbone = load_backbone(f"hf:{tiny_vit}", pooling=pooling, device="cpu")
    features = compute_features(inputs, backbone, progress=False)
    pixels = backbone.processor(images=[inputs.load(row) for row in range(5)], return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model(**pixels).last_hidden_state
    np.testing.assert_allclose(
        features, hidden[:, 0] if pooling == "cls" else hidden[:, 1:].mean(1), rtol=1e-4, atol=1e-5
    )


def test_local_weights_of_a_transformers_network(photos, tiny_vit, tmp_path):
    import transformers

    torch.manual_seed(1234)
    other = transformers.ViTModel(transformers.ViTConfig.from_pretrained(tiny_vit))
    torch.save(other.state_dict(), tmp_path / "other.pth")
    original = load_backbone(f"hf:{tiny_vit}", device="cpu")
    replaced = load_backbone(f"hf:{tiny_vit}", weights=tmp_path / "other.pth", device="cpu")
    assert original.source.pooling == "cls"
    assert [line.split()[0] for line in original.source.differences(replaced.source)] == ["weights_sha256"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet10t", {}, "must be timm:NAME or hf:NAME; got 'resnet10t'"),
        ("keras:a", {}, "must be timm:NAME or hf:NAME"),
        ("timm:test_vitt", {}, "backbone must be a model of timm; got 'test_vitt' .close: test_vit"),
        ("timm:test_vit", {"pooling": "cls"}, "pooling must be pre_logits for timm backbones; got 'cls'"),
        (
            "timm:test_vit",
            {"precision": "int8"},
            "precision must be one of float32, bfloat16, float16; got 'int8'",
        ),
        ("timm:test_vit", {"image_size": 0}, "image_size must be at least 1; got 0"),
        ("timm:test_vit", {"crop": 1.5}, r"crop must be in \(0, 1\]; got 1.5"),
        ("timm:test_vit", {"device": "abacus"}, "device must be auto, cpu, cuda or cuda:N; got 'abacus'"),
        ("hf:nowhere", {"image_size": 32}, "image_size must be None for hf backbones"),
    ],
)
def test_wrong_backbones_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(name, **options)


def test_wrong_poolings_and_kinds_are_refused(photos, tiny_bert, tmp_path):
    with pytest.raises(ValueError, match="pooling must be one of cls, mean for hf backbones; got 'max'"):
        load_backbone(f"hf:{tiny_bert}", pooling="max")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"hf:.* cannot be loaded"):
        load_backbone(f"hf:{tmp_path}")
    backbone = load_backbone(f"hf:{tiny_bert}", device="cpu")
    with pytest.raises(ValueError, match=r"inputs must be texts for hf:.*; got images"):
        compute_features(read_inputs(photos), backbone, progress=False)
    with pytest.raises(ValueError, match="must be labelled to become a bank"):
        extract(read_inputs(photos, labelled=False), backbone, tmp_path / "bank")


def test_a_backbone_with_other_weights_is_not_the_same(timm_weights, tmp_path):
    source = load_backbone("timm:test_resnet", weights=timm_weights / "test_resnet.pth", device="cpu").source
    state = torch.load(timm_weights / "test_resnet.pth", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=r"source must describe .* as it is now; got another: weights_sha256 is"):
        backbone_of(source, weights=tmp_path / "changed.pth", device="cpu")
    with pytest.raises(ValueError, match="no backbone is known"):
        backbone_of(FeatureSource())


@pytest.mark.parametrize("error", [ImportError("no module"), RuntimeError("operator torchvision::nms does not exist")])
def test_a_missing_library_says_how_to_install_it(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("timm", "transformers"):
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name, library in (("timm:test_vit", "timm"), ("hf:bert", "transformers")):
        with pytest.raises(ImportError, match=rf"needs {library}, .*pip install 'fusedloss\[features\]'"):
            load_backbone(name)
