"""Checkpoints of training: written in one step, the last two kept, read as tensors and plain values only."""

import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from ..paths import remove, replace_whole


def find_before(path: str | Path) -> Path:
    """Return where the checkpoint before the newest is kept: ``a.before.pt`` beside ``a.pt``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.before{path.suffix}")


def read_checkpoint(path: str | Path | None, identity: str) -> tuple[Path | None, dict]:
    """Return the newest sound checkpoint of the same call, the file and its state on the CPU; None and {} without any.

    The path is that of the newest, None if nothing is kept. A damaged file warns, and the one before it is read.
    ``torch.load`` verifies no checksum, so all are verified first; nothing in a file is run.
    """
    if not path:
        return None, {}
    files = [file for file in (Path(path), find_before(path)) if file.exists()]
    for number, file in enumerate(files):
        try:
            with zipfile.ZipFile(file) as archive:
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"its part {broken} is not what was written")
            state = torch.load(file, map_location="cpu", weights_only=True)
            if state["identity"] == identity:
                return file, state
        except Exception as error:  # a damaged file raises one of many types
            rest = f"going on from {files[-1].name}" if number + 1 < len(files) else "starting from the beginning"
            warnings.warn(f"The checkpoint {file} is damaged ({type(error).__name__}): {rest}.", stacklevel=3)
    return None, {}


def write_checkpoint(path: str | Path | None, write: Callable[[Path], None]) -> None:
    """Write a checkpoint in one step, nothing if the path is None, and keep the one it takes the place of.

    Where that fails, for want of disk say, the two checkpoints that are there stay, and training goes on with a warning.
    """
    if not path:
        return
    path = Path(path)
    try:
        for left in path.parent.glob(
            f"{path.name}.*.tmp"
        ):  # of a writer that was killed: large, and this is the only one
            remove(left)
        with replace_whole(path) as temporary:
            write(temporary)
            if path.exists():
                os.replace(path, find_before(path))
    except (OSError, RuntimeError) as error:
        warnings.warn(f"The checkpoint {path} was not written ({error}): training goes on without.", stacklevel=3)
