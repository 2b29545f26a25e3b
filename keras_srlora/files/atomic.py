"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import uuid


@contextlib.contextmanager
def written_whole(filepath):
    """Yields the path of an unfinished file, which takes the name at the end.

    Whatever goes wrong before that leaves the old file as it was.
    """
    path = pathlib.Path(filepath)
    refuse_folder(path)
    unfinished = str(
        path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")
    )
    # As `open` does it: `tempfile` makes files that only their owner reads.
    open(unfinished, "xb").close()
    try:
        yield unfinished
        # Windows writes out only what is open for writing.
        with open(unfinished, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def refuse_folder(path):
    """Raises `IsADirectoryError` where a path is that of a folder."""
    if path.is_dir():
        raise IsADirectoryError(
            f"{str(path)!r} is a folder: pass the path of a file in it."
        )
