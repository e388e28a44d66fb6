"""Files that outlive the program, in its state folder."""

from __future__ import annotations

import os


def blocking_save(path: str, text: str) -> None:
    """Write a file that only its owner can read, as a whole or not at all. Raises OSError.

    The folder is made where there is none. For worker threads: it waits for the disk.
    """
    folder = os.path.dirname(path)
    if folder and not os.path.exists(folder):
        os.makedirs(folder, 0o700, exist_ok=True)
    half = f"{path}.new"
    try:
        with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except OSError:
        try:
            os.unlink(half)  # a full disk shouldn't keep it
        except OSError:
            pass
        raise
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the name, too
    finally:
        os.close(descriptor)
