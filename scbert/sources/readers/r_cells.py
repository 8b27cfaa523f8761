"""Cells of R: Seurat objects of any version, SummarizedExperiment and what is built on it, matrices, data frames."""

import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from . import r_objects as r
from .matrices import make_cells
from .names import find_ids, find_rna, rows_are_cells
from .refusal import Refusal

NO_RNA = re.compile(
    r"(adt|htos?|abs?|antibod\w*|prot(ein\w*)?|cite\w*|hash\w*|multiplex\w*|(sc)?atac|peaks?|chromvar|(gene.?)?activity|crispr"
    r"|s?grnas?|guides?|prediction\w*|tcr|bcr|vdj)([._ -].*)?",
    re.I,
)
"""Assays of antibodies, hashtags, chromatin, guides: no genes."""

DERIVED = re.compile(r"(sct|integrated|imputed|magic|alra|scvi|mnn)([._ -].*)?", re.I)
"""Assays that were made from counts: taken only where nothing else is there."""

SYMBOLS = ("Symbol", "symbol", "SYMBOL", "gene_name", "gene_symbol", "feature_symbol", "gene_short_name")


def read_r_cells(path: Path) -> anndata.AnnData:
    """Read the cells of one's own R file: of a Seurat object, a SingleCellExperiment, or a matrix of genes x cells.

    A workspace may hold more: functions and whatever else are passed over. Raises a Refusal if there is nothing of the
    kind, or several and none is called "counts".
    """
    objects = r.open_r(path)
    found = sorted(_find_candidates(objects), key=lambda candidate: candidate[0])
    best = [label for rank, label, *_ in found if rank == found[0][0]]
    named = [label for label in best if label.rsplit("$", 1)[-1].lower() in ("counts", "gene expression")]
    if not found:
        classes = ", ".join(dict.fromkeys(map(r.find_class, objects.values())))
        raise Refusal(
            f"it holds no counts of a form that is read, but {classes}: in R, make them a matrix with genes in rows, and "
            'saveRDS(as(MATRIX, "dgCMatrix"), "counts.rds")'
        )
    if len(best) > 1 and len(named) != 1:
        raise Refusal(
            f'it may be {" or ".join(best)} that holds the counts: in R, saveRDS({best[0]}, "counts.rds"), or another'
        )
    chosen = (named or best)[0]
    if len(found) > 1:
        print(f"{path.name}: {chosen} is read, of {len(found)} objects that hold numbers.")
    return next(read(node, path.name) for _, label, read, node in found if label == chosen)


def read_seurat(path: Path) -> anndata.AnnData:
    """Read the counts of a Seurat object, of an .rds or the first of an .rda, and its cell table."""
    return _read_seurat(next(iter(r.open_r(path).values())), path.name)


def _find_candidates(objects, before="", depth=3):
    """Yield (rank, label, reader, node) of what may hold the counts, best rank first, in the lists of a list too."""
    for name, node in objects.items():
        node, label = node.referenced_object or node, before + name
        slots, kind = r.find_slots(node), r.find_class(node)
        if kind in ("Seurat", "seurat"):
            yield 0, label, _read_seurat, node
        elif {"assays", "colData"} <= set(slots):
            yield 0, label, _read_experiment, node
        elif r.is_matrix(node):
            yield 1 if node.info.type.name == "S4" else 2, label, _read_matrix, node
        elif "row.names" in slots:
            if sum(part.info.type.name in ("INT", "REAL") for part in r.take_apart(node).values()) > 1:
                yield 3, label, _read_frame, node
        elif node.info.type.name == "VEC" and depth:
            yield from _find_candidates(r.take_apart(node), f"{label}$", depth - 1)


def _read_matrix(node, name):
    return _read_either_way(*r.read_matrix(node), name)


def _read_frame(node, name):
    """Read a data frame of numbers, the names of its rows in the one column of text if it is as read.csv leaves it."""
    frame = r.read_frame(node)
    text = [column for column in frame if frame[column].dtype == object]
    if len(text) > 1:
        raise Refusal(f"the columns {', '.join(text[:5])} of its data frame hold text where counts are due: drop them")
    frame = frame.set_index(text[0]) if text else frame
    return _read_either_way(sparse.csr_matrix(frame.to_numpy()), frame.index.astype(str), frame.columns, name)


def _read_either_way(matrix, rows, columns, name):
    if rows is None or columns is None:
        raise Refusal("its matrix has no names of rows or of columns")
    if rows_are_cells(rows, columns):
        print(f"{name}: its rows are cells and its columns genes, and are read so.")
        return make_cells(matrix, rows, columns)
    return make_cells(matrix.T, columns, rows)


def _read_seurat(node, name):
    slots = r.find_slots(node)
    obs, ids = r.read_frame(slots["meta.data"]), None
    if "raw.data" in slots:  # version 2: no assays, and cells that were filtered out since
        counts, genes, cells = r.read_matrix(slots["raw.data"])
        counts, cells = counts[:, _find_rows(cells, obs.index)], obs.index
    else:
        assays = r.take_apart(slots["assays"])
        active = r.convert(slots["active.assay"])[0] if "active.assay" in slots else None
        assay = r.find_slots(assays[_choose_assay(assays, active, name)])
        counts, genes, cells = _read_layers(assay) if "layers" in assay else r.read_matrix(assay["counts"])
        beside = assay.get("meta.features", assay.get("meta.data"))
        ids = None if beside is None else find_ids(genes, r.read_frame(beside))
    # R numbers the repeats of a row name (x, x.1, ...), where the counts may have x each time.
    if len(obs) != len(cells) or any(not row.startswith(cell) for row, cell in zip(obs.index, cells, strict=True)):
        obs = obs.iloc[_find_rows(obs.index, cells)]
    return make_cells(counts.T, obs.index, genes, obs, ids)


def _find_rows(names, wanted):
    names = pd.Index(names)
    places = names.get_indexer(wanted) if names.is_unique else np.array([-1])
    if (places < 0).any():
        raise Refusal("the cell table of the Seurat object does not name the cells of its counts")
    return places


def _choose_assay(assays, active, name):
    """Return the assay to read: the active one if it may be RNA, else one called RNA, else the first that may be."""
    order = sorted(assays, key=lambda assay: (assay != active, assay.lower() != "rna"))
    counted = [assay for assay in order if not NO_RNA.fullmatch(assay) and _has_counts(r.find_slots(assays[assay]))]
    chosen = [assay for assay in counted if not DERIVED.fullmatch(assay) and r.find_class(assays[assay]) != "SCTAssay"]
    if not counted:
        raise Refusal(
            f"its assays ({', '.join(assays)}) hold no counts of RNA: in R, add them by "
            'x[["RNA"]] <- CreateAssayObject(counts = COUNTS)'
        )
    chosen = (chosen or counted)[0]
    if len(assays) > 1 or DERIVED.fullmatch(chosen):
        print(f"{name}: the assay {chosen} is read, of {', '.join(assays)}.")
    return chosen


def _has_counts(assay):
    if "layers" in assay:
        return any(layer.split(".")[0] == "counts" for layer in r.take_apart(assay["layers"]))
    slots = r.find_slots(assay["counts"]) if "counts" in assay else {"Dim": None}
    size = slots.get("Dim", slots.get("dim"))  # none where the matrix is of a class that is not read: said later
    return "counts" in assay and (size is None or bool(np.prod(r.convert(size))))


def _read_layers(assay):
    """Return the counts of an Assay5, its layers put together: their names stand beside, for all layers at once."""
    layers, axes = r.take_apart(assay["layers"]), []
    for axis in ("features", "cells"):
        names, of_layers = map(r.find_names, r.take_apart(r.find_slots(assay[axis])["dimnames"]).values())
        is_in = np.asarray(assay[axis].value, bool).reshape(len(names), len(of_layers), order="F")
        axes.append((names, dict(zip(of_layers, map(np.flatnonzero, is_in.T), strict=True))))
    (genes, genes_of), (cells, cells_of) = axes
    counts, seen = sparse.csr_matrix((len(genes), len(cells))), np.zeros(len(cells), int)
    for layer in ["counts"] if "counts" in layers else [layer for layer in layers if layer.startswith("counts.")]:
        part = r.read_matrix(layers[layer])[0].tocoo()
        where = genes_of[layer][part.row], cells_of[layer][part.col]
        counts += sparse.csr_matrix((part.data, where), shape=counts.shape)
        seen[cells_of[layer]] += 1
    if (seen > 1).any():
        raise Refusal('its layers of counts share cells: in R, x[["RNA"]] <- JoinLayers(x[["RNA"]]), and saveRDS again')
    return counts, genes, cells


def _read_experiment(node, name):
    """Read a SummarizedExperiment, a SingleCellExperiment, or what is built on them."""
    slots = r.find_slots(node)
    main = r.find_names(r.take_apart(slots["int_metadata"]).get("mainExpName")) if "int_metadata" in slots else None
    if main is not None and NO_RNA.fullmatch(main[0]):
        raise Refusal(f'its main experiment is {main[0]}, no RNA: in R, saveRDS(swapAltExp(x, "RNA"), "cells.rds")')
    held = r.find_slots(slots["assays"])
    assays = r.take_apart((r.take_apart(held[".xData"]) if ".xData" in held else held)["data"])  # .xData: before 2019
    if "counts" not in assays and len(assays) != 1:
        raise Refusal(f"its assays are {', '.join(assays) or 'none'}, and none is counts: in R, counts(x) <- COUNTS")
    matrix, genes, cells = r.read_matrix(assays.get("counts", next(iter(assays.values()))))
    names, table = _read_genes(slots)
    genes, obs = names if genes is None else genes, r.read_frame(slots["colData"])
    if genes is None:
        raise Refusal("its genes have no names: in R, rownames(x) <- rowData(x)$ID")
    if cells is None and "Barcode" in obs and obs["Barcode"].is_unique:  # as DropletUtils leaves it
        obs = obs.set_index("Barcode")
    cells = obs.index.astype(str) if cells is None else cells
    kept = find_rna(table.get("Type", table.get("feature_type")))
    if kept is not None:
        matrix, genes, table = matrix[kept], genes[kept], table[kept]
    ids, symbols = find_ids(genes, table), next((table[name] for name in SYMBOLS if name in table), None)
    if symbols is not None and find_ids(genes, {"names": genes}) is not None:  # identifiers are the names
        ids, genes = genes, symbols.where(symbols.notna() & (symbols != ""), genes).astype(str)
    return make_cells(matrix.T, cells, genes, obs, ids)


def _read_genes(slots):
    """Return the names of genes, or None, and the table of what is known of them."""
    if "rowRanges" not in slots:
        return r.find_names(slots.get("NAMES")), r.read_frame(slots["elementMetadata"])
    ranges = r.find_slots(slots["rowRanges"])
    names = r.find_slots(ranges["partitioning" if "partitioning" in ranges else "ranges"]).get("NAMES")
    return r.find_names(names), r.read_frame(ranges["elementMetadata"])
