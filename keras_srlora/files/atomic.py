"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import tempfile


@contextlib.contextmanager
def written_whole(filepath):
    """Yields the path of an unfinished file, which takes the name at the end.

    Whatever goes wrong before that leaves the old file as it was.
    """
    path = pathlib.Path(filepath)
    refuse_folder(path)
    handle, unfinished = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".unfinished"
    )
    os.close(handle)
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        # `mkstemp` makes files that only their owner reads.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(unfinished, 0o666 & ~mask)
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
