"""Rebuild glyphs.npz, the Noto script-identification images, from Debian's fonts-noto-core package.

    python examples/glyphs/build.py               # downloads the package with apt-get, writes glyphs.npz
    python examples/glyphs/build.py --deb FILE    # uses a package that is already here
    python examples/glyphs/build.py --check       # compares with glyphs.npz instead of writing it

Needs pillow, fonttools, numpy, and dpkg-deb (with apt-get unless --deb is given).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fontTools import unicodedata
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

PACKAGE = "fonts-noto-core"
VERSION = "20201225-1"
SHA256 = "58f4f0bb6720f919f92096b3508e1412a0f1544424ade6c5b5bf1eb694dd64ba"
SHARED_SCRIPTS = {"Zyyy", "Zinh", "Zzzz"}  # Common, Inherited, Unknown: not the name of a script
SMALLEST_CLASS = 16  # a script with fewer images in the pool is left out, and no class is thinned below this
SHARE = 0.14544  # of a class's images that is kept where that is more
EDGE, FONT_SIZE, LARGEST_GLYPH = 64, 40, 58  # pixels
GREY_STEP = 17  # 16 levels of grey: 0, 17, ..., 255


class Sample(NamedTuple):
    """One image to draw: a character in a font face."""

    script: str
    codepoint: int
    face: str

    @property
    def path(self) -> str:
        return f"{self.script}/U+{self.codepoint:04X}/{self.face}"


def fetch_package(folder: Path) -> Path:
    subprocess.run(["apt-get", "download", f"{PACKAGE}={VERSION}"], cwd=folder, check=True, stdout=sys.stderr)
    return next(folder.glob(f"{PACKAGE}_*.deb"))


def unpack_package(package: Path, folder: Path) -> Path:
    """Check the package's version and sha256, unpack it and return the folder of the fonts."""
    version = subprocess.run(
        ["dpkg-deb", "-f", package, "Version"], check=True, capture_output=True, text=True
    ).stdout.strip()
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    if (version, digest) != (VERSION, SHA256):
        raise SystemExit(
            f"build.py: {package.name} is version {version} with sha256 {digest}; "
            f"the images come from {VERSION}, {SHA256}"
        )
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder / "usr/share/fonts/truetype/noto"


def letters_and_numbers(fonts: Path) -> Iterator[Sample]:
    """Every (character, face) pair of the package whose character is a letter or a number of one script."""
    for file in sorted(fonts.glob("*.ttf")):
        with TTFont(file, lazy=True) as face:
            codepoints = sorted(face.getBestCmap())
        for codepoint in codepoints:
            script = unicodedata.script(chr(codepoint))
            if unicodedata.category(chr(codepoint))[0] in "LN" and script not in SHARED_SCRIPTS:
                yield Sample(script, codepoint, file.stem)


def choose(pool: list[Sample]) -> list[Sample]:
    """Thin every class by one factor, which keeps the tail's shape, but to no fewer than SMALLEST_CLASS.

    Within a class the samples with the smallest sha256 of their path are kept: a fixed, shuffled-looking
    choice.
    """
    by_script: dict[str, list[Sample]] = defaultdict(list)
    for sample in pool:
        by_script[sample.script].append(sample)
    chosen: list[Sample] = []
    for script in sorted(by_script):
        samples = by_script[script]
        if len(samples) >= SMALLEST_CLASS:
            quota = max(SMALLEST_CLASS, round(SHARE * len(samples)))
            ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.path.encode()).digest())
            chosen += sorted(ranked[:quota], key=lambda sample: (sample.face, sample.codepoint))
    return chosen


def ink(character: str, font: Path, size: int) -> Image.Image:
    """White glyph on black, cut to its ink."""
    face = ImageFont.truetype(font, size, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = face.getbbox(character)
    margin = EDGE  # getbbox counts the origin in and may leave out a pixel of blur
    canvas = Image.new("L", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin), 0)
    ImageDraw.Draw(canvas).text((margin - left, margin - top), character, font=face, fill=255)
    return canvas.crop(canvas.getbbox())


def draw(sample: Sample, fonts: Path) -> np.ndarray:
    """Black glyph on white with its ink centred, in smaller type where it would not fit."""
    character, font = chr(sample.codepoint), fonts / f"{sample.face}.ttf"
    glyph = ink(character, font, FONT_SIZE)
    if max(glyph.size) > LARGEST_GLYPH:
        glyph = ink(character, font, int(FONT_SIZE * LARGEST_GLYPH / max(glyph.size)))
    image = Image.new("L", (EDGE, EDGE), 0)
    image.paste(glyph, ((EDGE - glyph.width) // 2, (EDGE - glyph.height) // 2))
    levels = (255 - np.asarray(image).astype(np.int64) + GREY_STEP // 2) // GREY_STEP
    return (levels * GREY_STEP).astype(np.uint8)


def build_arrays(fonts: Path) -> dict[str, np.ndarray]:
    samples = choose(list(letters_and_numbers(fonts)))
    scripts = sorted({sample.script for sample in samples})
    label = {script: index for index, script in enumerate(scripts)}
    return {
        "images": np.stack([draw(sample, fonts) for sample in samples]),
        "labels": np.array([label[sample.script] for sample in samples], np.int16),
        "groups": np.array([sample.codepoint for sample in samples], np.int32),
        "class_names": np.array([unicodedata.script_name(script).replace("_", " ") for script in scripts]),
        "paths": np.array([sample.path for sample in samples]),
    }


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """The .npz file; unlike numpy.savez it carries no time of writing, so equal arrays give equal bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return file.getvalue()


def compare(arrays: dict[str, np.ndarray], content: bytes, kept: Path) -> int:
    if content == kept.read_bytes():
        print(f"{kept.name}: the same {len(content)} bytes")
        return 0
    with np.load(kept) as old:
        differing = [name for name in arrays if name not in old or not np.array_equal(arrays[name], old[name])]
    print(
        f"{kept.name}: "
        + (f"differs in {', '.join(differing)}" if differing else "the same arrays, compressed differently")
    )
    return 1 if differing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deb", type=Path, help=f"{PACKAGE}_{VERSION}_all.deb; default: apt-get download")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).with_name("glyphs.npz"),
        help="default: in the folder of this file",
    )
    parser.add_argument("--check", action="store_true", help="compare with the output file instead of writing it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        package = options.deb or fetch_package(Path(folder))
        arrays = build_arrays(unpack_package(package, Path(folder)))
    content = packed(arrays)
    if options.check:
        return compare(arrays, content, options.output)
    options.output.write_bytes(content)
    counts = Counter(arrays["labels"].tolist()).values()
    print(
        f"{options.output}: {len(arrays['labels'])} images, "
        f"{len(counts)} classes of {max(counts)} to {min(counts)}, "
        f"{len(set(arrays['groups'].tolist()))} characters, {len(content)} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
