"""One process at a time writes into a folder; the operating system frees the lock of a process that was killed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from fusedloss.atomic_io import StorageError

LOCK_FILE = ".lock"


class FolderLock:
    """The right to write into a folder, held from ``acquire`` to ``release``; readers need none.

    Raises:
        StorageError: from ``acquire``, where another process (or another lock of this one) holds it, or where the
            folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Of this object, whichever thread calls: a run may be finished by another thread than began it.
        self._lock = FileLock(folder / LOCK_FILE, timeout=0, thread_local=False)

    def acquire(self) -> FolderLock:
        """Take the lock at once or not at all; the folder is made if need be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise StorageError(
                f"folder must be written by one process at a time; got {self.folder}, which another process is writing "
                "(wait for it, or use another folder)"
            ) from None
        except OSError as error:
            raise StorageError(
                error.errno, f"{error.strerror}: {self.folder} could not be locked; nothing was changed there"
            ) from error
        return self

    def release(self) -> None:
        """Let others write; twice does no harm."""
        if self._lock.is_locked:
            # Removed while it is held: whoever has opened it meanwhile sees that it has no name, and opens it again.
            with contextlib.suppress(OSError):
                (self.folder / LOCK_FILE).unlink()
            self._lock.release()

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
