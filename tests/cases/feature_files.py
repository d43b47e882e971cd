"""Sizes of the small banks that tests make, and files for them."""

import numpy as np

ROWS, WIDTH, CLASSES = 40, 6, 5


def contents(folder):
    """Every file of a bank but the manifest, which holds the time."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "manifest.json"}


def save_image(path, seed, edge=40):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (edge, edge, 3), np.uint8)).save(path)
