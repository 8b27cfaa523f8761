"""What a model says of a block of cells, kept as it comes: work that was killed goes on from there."""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from ..paths import replace_whole


def hash_model(*parts: torch.nn.Module) -> str:
    """Return a hash of the weights of an encoder, with its config, and of a head."""
    digest = hashlib.sha256(f"{parts[0].config} {torch.__version__}".encode())
    for part in parts:
        for name, tensor in part.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_block(folder: Path, model: str, bins: sparse.csr_matrix) -> Path:
    """Return the file of a block, named by all that its content depends on: the model's hash and the cells' tokens."""
    digest = hashlib.sha256(model.encode())
    for array in (bins.indptr.astype(np.int64), bins.indices.astype(np.int64), bins.data):
        digest.update(array.tobytes())
    return folder / f"{digest.hexdigest()[:32]}.npz"


def read_block(file: Path) -> list[np.ndarray] | None:
    """Return the arrays of a block, None if it is not there; of a damaged one, which zip's checksums tell, too."""
    try:
        with open(file, "rb") as opened, np.load(opened) as arrays:
            found = [arrays[name] for name in arrays]
        return found if found and all(isinstance(array, np.ndarray) for array in found) else None
    except Exception:  # a damaged file raises one of many types
        return None


def write_block(file: Path, arrays: list[np.ndarray]) -> bool:
    """Write a block in one step; return whether that went well, and warn, with a word on what it means, if not."""
    try:
        with replace_whole(file) as temporary, open(temporary, "wb") as opened:
            np.savez(opened, *arrays)
        return True
    except OSError as error:
        warnings.warn(f"{file.parent} can't be written ({error}): killed from here on, nothing is kept.", stacklevel=2)
        return False
