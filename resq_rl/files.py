"""Writing result files so that a killed run never leaves a half-written one."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from resq_rl.errors import ResultsError

__all__ = ["write_atomic"]


def write_atomic(path: Path, content: bytes | str) -> Path:
    """Write `content` to `path` through a temporary file in the same folder and a rename.

    As with any other way of writing, a new file has the permissions that the user's umask leaves, and one that there
    was keeps its own.

    Raises:
        ResultsError: the folder cannot be made or written, or the disk is full. The previous file stays as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.parent / f".write-{secrets.token_hex(8)}"  # a longer name than the file's own may be too long
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            with suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ResultsError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose a writable folder."
        ) from error
    finally:  # of a write that failed or was interrupted
        with suppress(OSError):
            temporary.unlink()
    return path
