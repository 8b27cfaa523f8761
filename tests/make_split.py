"""How the saved split of zheng_facs was made, by names and labels alone: a test makes it again.

SCBERT_MIRROR=... python tests/make_split.py zheng_facs zheng_facs.csv.gz
"""

import hashlib
import sys

import anndata
import numpy as np
import pandas as pd

import scbert
from scbert import hygiene
from scbert.data.checks import check_column, check_unique


def make_split(
    adata: anndata.AnnData, *, label_key: str = "cell_type", test_share: float = 0.3, seed: int = 0
) -> pd.DataFrame:
    """Assign each cell to training or test, label by label: a row a cell, by name, "train" or "test" in column "part".

    The cells of a label are put in the order of the sha256 of seed and cell name, and the first of them are tested:
    the split depends on names and labels alone, not on the order of the cells, the machine or a library's version. The
    share is rounded to whole cells, at least one on either side. Duplicated names, a missing or incomplete label column,
    a label of one cell, or a `test_share` that is none raise a ValueError.
    """
    check_unique(adata.obs_names, "Cell names")
    check_column(adata, label_key, "adata", constant_is_fine=True)
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, not {test_share}.")
    parts = pd.Series("train", index=adata.obs_names.rename("cell"), name="part")
    labels = adata.obs[label_key].astype(str).to_numpy()
    for label in np.unique(labels):
        cells = sorted(
            adata.obs_names[labels == label], key=lambda cell: hashlib.sha256(f"{seed} {cell}".encode()).digest()
        )
        if len(cells) < 2:
            raise ValueError(f"Label {label!r} has one cell only, which cannot be split: drop or merge it.")
        parts[cells[: min(max(round(test_share * len(cells)), 1), len(cells) - 1)]] = "test"
    return parts.sort_index().to_frame()


if __name__ == "__main__":
    hygiene.save_split(make_split(scbert.datasets.load(sys.argv[1])), sys.argv[2])
