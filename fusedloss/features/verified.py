"""Which files of a bank have been compared with the manifest's hashes, so that only changed ones are read again."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fusedloss.atomic_io import sha256_of_file, write_bytes
from fusedloss.features.manifest import BankError

VERIFIED_FILE = "verified.json"
# A file that is written again within a tick of the file system's clock may keep its times.
CLOCK_TICK_NS = 50_000_000


@dataclass
class Verified:
    """What ``verified.json`` holds: size, times and inode of each file when its sha256 was right, and which it was.

    A hint, not a proof: whoever changes a file and puts its size and times back is found by ``verify=True`` alone.
    """

    files: dict[str, list[int]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    # Nanoseconds since 1970, before the files were read
    checked_at: int = 0
    fingerprint: str | None = None

    @classmethod
    def of(cls, folder: Path, hashes: Mapping[str, str]) -> Verified:
        """The files as they are now."""
        return cls({name: _state(folder / name) for name in hashes}, dict(hashes), time.time_ns())

    @classmethod
    def read(cls, folder: Path) -> Verified:
        """What the folder says; nothing where it says nothing that can be read."""
        try:
            values = cls(**json.loads((folder / VERIFIED_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()
        sound = (
            isinstance(values.files, dict) and isinstance(values.hashes, dict) and isinstance(values.checked_at, int)
        )
        return values if sound and isinstance(values.fingerprint, str | None) else cls()

    def write(self, folder: Path) -> None:
        """Keep it beside the bank, where that can be written to."""
        with contextlib.suppress(OSError):
            write_bytes(folder / VERIFIED_FILE, (json.dumps(asdict(self)) + "\n").encode())

    def unchanged(self, folder: Path, hashes: Mapping[str, str]) -> list[str]:
        """Names of the files that are as they were, against these hashes."""
        return [
            name
            for name, digest in hashes.items()
            if self.hashes.get(name) == digest
            and (folder / name).is_file()
            and self.files.get(name) == (state := _state(folder / name))
            and max(state[1], state[2]) < self.checked_at - CLOCK_TICK_NS
        ]


def verify_files(folder: Path, hashes: Mapping[str, str], checked: Iterable[str] = ()) -> None:
    """Raise BankError unless each file but the `checked` has its sha256."""
    for name, expected in hashes.items():
        if name not in checked and sha256_of_file(folder / name) != expected:
            raise BankError(f"{folder / name} must have the sha256 of the manifest; got another (damaged or edited?)")


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
