#!/bin/sh
# anndata 0.12.19: of a file that mudata 0.3.10 wrote, read_h5ad raises an IORegistryError, and advises to update anndata.
#
# No version of anndata reads it: it is of another package. And the error is neither a ValueError, KeyError nor OSError, so
# that code which catches those for "no h5ad file" ends in a traceback. What to do: anndata.io.read_elem(file["mod/rna"]).
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mudata==0.3.10 anndata==0.12.19 "pandas<3"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd

print("anndata", version("anndata"), "and mudata", version("mudata"))
cells = pd.DataFrame(index=["a", "b"])
rna, antibodies = (anndata.AnnData(np.ones((2, 1)), cells, pd.DataFrame(index=[name])) for name in ("CD3D", "CD3"))
mudata.MuData({"rna": rna, "prot": antibodies}).write_h5mu("x.h5mu")
try:
    anndata.read_h5ad("x.h5mu")
    raise SystemExit("anndata reads MuData: this finding is over")
except Exception as error:
    print(f"{type(error).__module__}.{type(error).__name__}: {error}")
    assert "update" in str(error), "the message is another one: this finding is over"
    assert not isinstance(error, ValueError | KeyError | OSError), "it is a usual error now: this finding is over"
with h5py.File("x.h5mu") as file:
    print("mod/rna alone:", anndata.io.read_elem(file["mod/rna"]))
PYTHON
