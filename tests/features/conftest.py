"""A small bank, images in class folders, and tiny networks with random weights."""

import warnings

import numpy as np
import pytest
import torch
from feature_files import CLASSES, ROWS, WIDTH, save_image

from fusedloss.features import (
    FeatureBank,
)


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return generator.normal(size=(ROWS, WIDTH)).astype(np.float32), np.arange(ROWS) % CLASSES


@pytest.fixture
def bank(arrays):
    features, labels = arrays
    names = ["ant", "bee", "cat", "dog", "élan"]
    paths = [f"image {row}.png" for row in range(ROWS)]
    return FeatureBank.from_arrays(features, labels, groups=labels * 7, class_names=names, paths=paths)


@pytest.fixture
def photos(tmp_path):
    for seed, name in enumerate(["dog/b.png", "dog/a.png", "cat/c.jpg", "cat/deep/d.png", "emu/e.png"]):
        save_image(tmp_path / "photos" / name, seed)
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory):
    """Random weights of timm's smallest networks, as files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import timm

    folder = tmp_path_factory.mktemp("weights")
    for name in ("test_vit", "test_resnet"):
        torch.manual_seed(0)
        torch.save(timm.create_model(name, pretrained=False).state_dict(), folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A two-layer BERT with random weights, saved with its tokenizer as a model folder."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "good", "bad", "film"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
