#!/bin/sh
# anndata 0.11.4 writes a name with a slash without a word, and then can't read its own file; nor can 0.12.19.
#
# Names such as obsm["X_pca/harmony"] or layers["norm/log"] become groups within groups of the file; on reading, a mapping
# stands where an array is due, and the error (AttributeError: 'dict' object has no attribute 'shape') names neither key nor
# file. 0.12.19 still writes such a name, with a warning. All else in the file is sound. What to do: anndata.io.read_elem of
# X, obs and var.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/try.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import anndata
import h5py
import numpy as np

if sys.argv[1] == "write":
    adata = anndata.AnnData(np.ones((2, 3)), obsm={"X_pca/harmony": np.ones((2, 2))})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adata.write_h5ad("x.h5ad")
    print("anndata", version("anndata"), "wrote it and said", [str(warning.message) for warning in said] or "nothing")
    assert not said, "anndata says so: this finding is over"
try:
    anndata.read_h5ad("x.h5ad")
except AttributeError as error:
    print("anndata", version("anndata"), "reads it: AttributeError:", str(error).splitlines()[0])
else:
    raise SystemExit("anndata reads it: this finding is over")
with h5py.File("x.h5ad") as file:
    print("X alone:", anndata.io.read_elem(file["X"]).shape)
PYTHON
cd "$folder"
for step in "0.11.4 write" "0.12.19 read"; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "anndata==${step% *}" "pandas<3"
    "$folder/venv/bin/python" try.py "${step#* }"
done
