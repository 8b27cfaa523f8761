#!/bin/sh
# scanpy 1.11.5: of molecule_info.h5, which Cell Ranger writes beside its matrix, read_10x_h5 says that it holds many genomes.
#
# Any .h5 without a group "matrix" is taken for one of Cell Ranger 2, in which each group is a genome: the columns of the
# table of molecules are offered as genomes to choose from, and choosing one ends in another error. Nothing says that it is
# another file of the same run. What to do: take filtered_feature_bc_matrix.h5.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scanpy==1.11.5 anndata==0.12.19 h5py==3.16.0 "pandas<3"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import h5py
import numpy as np
import scanpy

print("scanpy", version("scanpy"))

# The layout that 10x documents for molecule_info.h5 of Cell Ranger 3 and newer: a row a molecule.
with h5py.File("molecule_info.h5", "w") as file:
    for key in ("barcode_idx", "feature_idx", "umi", "count", "gem_group", "library_idx"):
        file[key] = np.zeros(4, "u4")
    file["barcodes"] = np.array(["AAACCTGAACGTACGT"], "S")
    file["features/id"] = file["features/name"] = np.array(["ENSG00000167286"], "S")
messages = []
for genome in (None, "umi"):
    try:
        scanpy.read_10x_h5("molecule_info.h5", genome=genome)
        messages.append("read")
    except Exception as error:
        messages.append(f"{type(error).__name__}: {str(error).strip()[:300]}")
    print(f"genome={genome!r}: {messages[-1]}")
assert "more than one genome" in messages[0] and "'barcode_idx'" in messages[0], "the message is another one: this finding is over"
assert messages[1] != "read"
PYTHON
