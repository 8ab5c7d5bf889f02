"""Writing result files so that a killed run never leaves a half-written one."""

import os
import tempfile
from pathlib import Path

from resq_rl.errors import ResultsError

__all__ = ["write_atomic"]


def write_atomic(path: Path, content: bytes | str) -> Path:
    """Write `content` to `path` through a temporary file in the same folder and a rename.

    Raises:
        ResultsError: the folder cannot be made or written, or the disk is full. The previous file stays as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise ResultsError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose a writable folder."
        ) from error
    return path
