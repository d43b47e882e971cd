"""Class names given on the command line, as a file or as another bank."""

from __future__ import annotations

from pathlib import Path


def read_class_names(origin: Path) -> list[str]:
    """The class names of a bank, or the lines of a text file; ValueError for duplicates or none at all."""
    if origin.is_dir():
        from fusedloss.features.bank import FeatureBank

        return list(FeatureBank.open(origin).class_names)
    if not origin.is_file():
        raise ValueError(f"classes must be a feature bank or a file with one class name per line; got {origin}")
    try:
        names = [line.strip() for line in origin.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"classes must be a UTF-8 text file; got {origin}, which cannot be read: {error}") from error
    if not names or len(set(names)) != len(names):
        got = "none" if not names else f"{max(names, key=names.count)!r} more than once"
        raise ValueError(f"{origin} must hold one class name per line, at least one and each only once; got {got}")
    return names
