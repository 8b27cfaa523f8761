"""Which files of which tools are read, how fast, and with how much memory: the table of docs/data.md. Run by hand.

    python tests/measure_formats.py write FOLDER     # a file of each kind, by each tool that is here
    python tests/measure_formats.py read FOLDER      # each in a process of its own, and the files of SCBERT_MIRROR

To write needs anndata alone, and writes more with more: the packages mudata, loompy and kb_python, and on the PATH
Rscript (with Seurat, SingleCellExperiment and DropletUtils), STAR, featureCounts and htseq-count. What no tool
is here for is written by this script, in its form. Pipelines run on reads of 60 genes, made here; all else is
3,000 cells x 20,000 genes, 5 % of the counts above 0, text of R 500 cells. Seconds are of one
CPU, MB the peak; both beyond those of imports.
"""

import contextlib
import gzip
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mmwrite

OURS = "this script, in its form"
MIRROR = {  # file of SCBERT_MIRROR -> kind, and who wrote it
    "panc8_small.rda": (".rda, Seurat object", "SeuratObject 4.0.4 (bbknnR)"),
    "ifnb1k.rda": (".rda, Seurat object", "SeuratObject 5.1.0 (seuratTools)"),
    "pancreas.RData": (".RData, Seurat object", "SeuratObject 4.0.3 (CIDER)"),
    "pbmc.rda": (".rda, Seurat object", "tidyseurat (bioceurope2020)"),
    "example_sce.rda": (".rda, SingleCellExperiment", "Bioconductor (muscat)"),
    "1k_PBMC_v3_filt.rds": (".rds, dgCMatrix", "R's Matrix (scWGParis)"),
    "pbmcA.rda": (".rda, dgCMatrix", "R's Matrix (MUDAN)"),
    "PBMC.raw.rda": (".rda, dense matrix, 1,000 x 58,828", "R (PISCES)"),
    "pbmc14k_expression.eset.rda": (".rda, ExpressionSet", "R (scMINER)"),
    "pbmc_stim.RData": (".RData, two matrices", "R (harmony)"),
    "FetalThymus2_dge.txt.gz": (".txt.gz, 10,000 cells x 17,657", "Microwell-seq (HCL)"),
    "heart_sub.h5ad": (".h5ad, selected genes", "anndata (scBC)"),
}
R = r"""
suppressMessages({library(Matrix); library(SeuratObject); library(Seurat); library(SingleCellExperiment); library(DropletUtils)})
setwd(commandArgs(TRUE)[1])
m <- as(readMM("in/matrix.mtx"), "CsparseMatrix")
dimnames(m) <- list(readLines("in/genes.txt"), readLines("in/cells.txt"))
ids <- readLines("in/ids.txt")
say <- function(kind, path, ...) {
  tools <- sapply(c(...), function(p) paste(p, if (p == "R") getRversion() else packageVersion(p)))
  cat(kind, path, paste(tools, collapse = ", "), sep = "\t", file = "r.tsv", append = TRUE); cat("\n", file = "r.tsv", append = TRUE)
}
unlink(c("r.tsv", "v2", "v3", "v3.h5"), recursive = TRUE)
saveRDS(m, "dgCMatrix.rds"); say(".rds, dgCMatrix", "dgCMatrix.rds", "Matrix")
helper <- function(x) x + 1; counts <- m; save(helper, counts, file = "workspace.RData")
say(".RData, workspace with a function", "workspace.RData", "R", "Matrix")
few <- as.matrix(m[, 1:500]); storage.mode(few) <- "integer"
saveRDS(few, "dense.rds"); say(".rds, dense matrix, 500 cells", "dense.rds", "R")
saveRDS(as.data.frame(few), "frame.rds"); say(".rds, data.frame, 500 cells", "frame.rds", "R")
write.csv(few, "r.csv"); say(".csv, 500 cells", "r.csv", "R")
write.table(few, "r.tsv.gz.tmp", sep = "\t", quote = FALSE); system("gzip -cn r.tsv.gz.tmp > table.tsv.gz; rm r.tsv.gz.tmp")
say(".tsv.gz, 500 cells", "table.tsv.gz", "R")
x <- suppressWarnings(CreateSeuratObject(m, min.cells = 3))
saveRDS(x, "seurat.rds"); say(".rds, Seurat object", "seurat.rds", "SeuratObject")
x <- ScaleData(FindVariableFeatures(NormalizeData(x, verbose = FALSE), verbose = FALSE), verbose = FALSE)
x <- RunPCA(x, verbose = FALSE, npcs = 20)
save(x, file = "seurat.RData"); say(".RData, Seurat object, normalised, scaled, PCA", "seurat.RData", "Seurat")
saveRDS(x[VariableFeatures(x), ], "variable.rds"); say(".rds, Seurat object, 2,000 variable genes", "variable.rds", "Seurat")
sce <- SingleCellExperiment(list(counts = m), rowData = DataFrame(ID = ids, Symbol = rownames(m)))
logcounts(sce) <- log1p(m); saveRDS(sce, "sce.rds"); say(".rds, SingleCellExperiment", "sce.rds", "SingleCellExperiment")
ten <- list(gene.id = ids, gene.symbol = rownames(m), barcodes = colnames(m))
do.call(write10xCounts, c(list("v3.h5", m, version = "3", type = "HDF5"), ten)); say("10x .h5", "v3.h5", "DropletUtils")
do.call(write10xCounts, c(list("v3", m, version = "3"), ten)); say("10x folder, .mtx.gz", "v3", "DropletUtils")
do.call(write10xCounts, c(list("v2", m, version = "2"), ten)); say("10x folder, .mtx", "v2", "DropletUtils")
saveRDS(read10xCounts("v3"), "droplets.rds"); say(".rds, SingleCellExperiment of a 10x folder", "droplets.rds", "DropletUtils")
"""


def make_cells(n_cells: int = 3000, n_genes: int = 20_000, seed: int = 0) -> anndata.AnnData:
    """Return random counts under barcodes and symbols."""
    random = np.random.default_rng(seed)
    families = ("ZNF", "SLC", "TMEM", "CD", "KRT", "FAM", "CCDC", "IL")
    genes = [f"{families[i % 8]}{i // 8 + 1}" if i % 2 else f"AL{i:06}.1" for i in range(n_genes)]
    counts = sparse.random(n_cells, n_genes, 0.05, "csr", np.float32, rng=random)
    counts.data = np.ceil(random.gamma(0.5, 3, counts.nnz)).astype(np.float32)
    letters = random.choice(list("ACGT"), (n_cells, 16))
    obs = pd.DataFrame({"donor": "a"}, index=[f"{''.join(row)}-1" for row in letters])
    ids = [f"ENSG{i:011}" for i in range(n_genes)]
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame({"gene_ids": ids}, index=genes))


def write(folder: Path) -> None:
    """Write a file of each kind into a folder, and ``kinds.json``: of each its kind, name and tool."""
    folder.mkdir(parents=True, exist_ok=True)
    cells, kinds = make_cells(), []

    def note(kind, name, tool):
        kinds.append((kind, name, tool))
        (folder / "kinds.json").write_text(json.dumps(kinds, indent=1))
        print(f"{kind}: {name}, {tool}", flush=True)

    for step in (write_by_anndata, write_by_others, write_by_script, write_by_r, write_by_pipelines):
        step(folder, cells, note)


def write_by_anndata(folder, cells, note):
    tool = f"anndata {version('anndata')}"
    cells.write_h5ad(folder / "cells.h5ad")
    cells.write_h5ad(folder / "packed.h5ad", compression="gzip")
    with open(folder / "cells.h5ad", "rb") as plain, gzip.open(folder / "cells.h5ad.gz", "wb", 1) as packed:
        shutil.copyfileobj(plain, packed)
    cells.write_zarr(folder / "cells.zarr")
    for kind, name in ((".h5ad", "cells.h5ad"), (".h5ad, compressed", "packed.h5ad"), (".h5ad.gz", "cells.h5ad.gz")):
        note(kind, name, tool)
    note(".zarr", "cells.zarr", f"{tool}, zarr {version('zarr')}")
    dense, pandas = cells.to_df().astype(np.int32), f"pandas {pd.__version__}"
    dense.T.to_csv(folder / "cells.csv")
    dense.iloc[:500].to_csv(folder / "turned.tsv", sep="\t")
    note(".csv", "cells.csv", pandas)
    note(".tsv, cells in rows, 500 cells", "turned.tsv", pandas)
    sparse.save_npz(folder / "cells.npz", sparse.csr_matrix(cells.X))
    note(".npz", "cells.npz", "scipy")


def write_by_others(folder, cells, note):
    """Write what packages write that may be lacking."""
    with contextlib.suppress(ImportError):
        mudata = importlib.import_module("mudata")
        proteins = anndata.AnnData(
            np.ones((cells.n_obs, 5), np.float32), cells.obs[[]], pd.DataFrame(index=list("abcde"))
        )
        mudata.MuData({"rna": cells, "prot": proteins}).write_h5mu(folder / "cells.h5mu")
        note(".h5mu", "cells.h5mu", f"mudata {version('mudata')}")
    with contextlib.suppress(ImportError):
        loompy = importlib.import_module("loompy")
        (folder / "cells.loom").unlink(missing_ok=True)
        rows, columns = (
            {"Gene": cells.var_names.to_numpy(), "Accession": cells.var["gene_ids"].to_numpy()},
            {"CellID": cells.obs_names.to_numpy()},
        )
        loompy.create(str(folder / "cells.loom"), sparse.coo_matrix(cells.X.T), rows, columns)
        note(".loom", "cells.loom", f"loompy {version('loompy')}")


def write_by_script(folder, cells, note):
    """Write in the form of pipelines whose tools are never here."""
    parse = folder / "parse" / "DGE_filtered"
    parse.mkdir(parents=True, exist_ok=True)
    mmwrite(parse / "count_matrix.mtx", sparse.coo_matrix(cells.X.astype(np.int32)))
    genes = pd.DataFrame({"gene_id": cells.var["gene_ids"], "gene_name": cells.var_names, "genome": "hg38"})
    genes.to_csv(parse / "all_genes.csv", index=False)
    cells.obs.rename_axis("bc_wells").to_csv(parse / "cell_metadata.csv")
    note("Parse folder", "parse/DGE_filtered", OURS)
    table = cells[:500].to_df().astype(np.int32).set_axis(range(1000, 1500)).rename_axis("Cell_Index")
    with open(folder / "bd_RSEC_MolsPerCell.csv", "w") as file:
        file.write("####################\n## BD Rhapsody Analysis Pipeline Version 1.11\n####################\n")
        table.to_csv(file)
    note("BD Rhapsody .csv, 500 cells", "bd_RSEC_MolsPerCell.csv", OURS)
    quants = folder / "alevin" / "quants"
    quants.mkdir(parents=True, exist_ok=True)
    mmwrite(quants / "quants_mat.mtx", sparse.coo_matrix(cells.X.astype(np.int32)))
    (quants / "quants_mat_rows.txt").write_text("\n".join(cells.obs_names.str[:-2]) + "\n")
    (quants / "quants_mat_cols.txt").write_text("\n".join(cells.var_names) + "\n")
    note("alevin-fry folder", "alevin/quants", OURS)


def write_by_r(folder, cells, note):
    """Write R's objects and what Bioconductor writes, where R is here."""
    if not shutil.which("Rscript"):
        return print("Rscript is not here.")
    (folder / "in").mkdir(exist_ok=True)
    mmwrite(folder / "in" / "matrix.mtx", sparse.coo_matrix(cells.X.T.astype(np.int32)))
    for name, values in {"genes": cells.var_names, "cells": cells.obs_names, "ids": cells.var["gene_ids"]}.items():
        (folder / "in" / f"{name}.txt").write_text("\n".join(values) + "\n")
    (folder / "write.R").write_text(R)
    subprocess.run(["Rscript", folder / "write.R", folder], check=True)
    for line in (folder / "r.tsv").read_text().splitlines():
        note(*line.split("\t"))
    return None


def write_reads(folder):
    """Write a genome of 60 genes, its annotation, and reads of 40 cells as 10x's chemistry v3 has them."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    draw = lambda n: "".join(random.choice(list("ACGT"), n))  # noqa: E731
    names = ["CD3D", "MS4A1", "LYZ", "NKG7", "GNLY", "CD8A", *(f"SLC{i}A1" for i in range(1, 55))]
    genome, genes, gtf = draw(500), {}, []
    for i, name in enumerate(names):
        genes[name], start = draw(1000), len(genome) + 1
        genome += genes[name] + draw(500)
        own = f'gene_id "ENSG{i:011}"; gene_name "{name}"; gene_biotype "protein_coding";'
        of_transcript = f'{own} transcript_id "ENST{i:011}";'
        for kind, about in (("gene", own), ("transcript", of_transcript), ("exon", of_transcript)):
            gtf.append(f"chr1\tx\t{kind}\t{start}\t{start + 999}\t.\t+\t.\t{about}")
    (folder / "genome.fa").write_text(f">chr1\n{genome}\n")
    (folder / "genes.gtf").write_text("\n".join(gtf) + "\n")
    (folder / "cdna.fa").write_text("".join(f">ENST{i:011}\n{genes[name]}\n" for i, name in enumerate(names)))
    (folder / "t2g.tsv").write_text("".join(f"ENST{i:011}\tENSG{i:011}\n" for i in range(len(names))))
    barcodes = [draw(16) for _ in range(40)]
    (folder / "whitelist.txt").write_text("\n".join(barcodes) + "\n")
    with gzip.open(folder / "R1.fastq.gz", "wt", 1) as first, gzip.open(folder / "R2.fastq.gz", "wt", 1) as second:
        for i in range(40_000):
            at, own = random.integers(500, 900), genes[names[random.integers(len(names))]]
            first.write(f"@r{i}\n{barcodes[random.integers(40)]}{draw(12)}\n+\n{'I' * 28}\n")
            second.write(f"@r{i}\n{own[at : at + 91]}\n+\n{'I' * 91}\n")


def write_by_pipelines(folder, cells, note):
    """Count reads by each tool that is here."""
    at = folder / "reads"
    write_reads(at)

    def call(*words, check=True):
        return subprocess.run(list(map(str, words)), cwd=at, check=check, capture_output=True, text=True)

    if shutil.which("STAR"):
        tool = f"STAR {call('STAR', '--version').stdout.strip()}"
        call("STAR", "--runMode", "genomeGenerate", "--genomeDir", "star", "--genomeFastaFiles", "genome.fa", "--sjdbGTFfile", "genes.gtf", "--genomeSAindexNbases", 6)  # fmt: skip
        call("STAR", "--genomeDir", "star", "--readFilesIn", "R2.fastq.gz", "R1.fastq.gz", "--readFilesCommand", "zcat", "--soloType", "CB_UMI_Simple", "--soloCBwhitelist", "whitelist.txt", "--soloUMIlen", 12, "--outSAMtype", "BAM", "SortedByCoordinate", "--outFileNamePrefix", "solo_", "--quantMode", "GeneCounts")  # fmt: skip
        note("STARsolo folder", "reads/solo_Solo.out/Gene/raw", tool)
        bam = "solo_Aligned.sortedByCoord.out.bam"
        if shutil.which("featureCounts"):
            shutil.copy(at / bam, at / "other.bam")
            said = call("featureCounts", "-a", "genes.gtf", "-o", "counts.txt", bam, "other.bam").stderr
            note(
                "featureCounts .txt, 2 samples",
                "reads/counts.txt",
                f"featureCounts {re.search(r'v(2[.0-9]+)', said)[1]}",
            )
        if shutil.which("htseq-count"):
            header = ["-f", "bam", "-r", "pos", "--with-header", "-c"]
            call("htseq-count", *header, "htseq.tsv", bam, "other.bam", "genes.gtf")
            note(
                "htseq-count .tsv, 2 samples",
                "reads/htseq.tsv",
                f"htseq-count {call('htseq-count', '--version').stdout.strip()}",
            )
    if shutil.which("kb"):
        tool = f"kb {re.search(r'kb_python ([0-9.]+)', call('kb', 'info', check=False).stdout)[1]}"
        call(
            "kb",
            "ref",
            "-i",
            "kb.idx",
            "-g",
            "kb_t2g.txt",
            "-f1",
            "kb_cdna.fa",
            "genome.fa",
            "genes.gtf",
            "--overwrite",
        )
        call("kb", "count", "-i", "kb.idx", "-g", "kb_t2g.txt", "-x", "10xv3", "-w", "whitelist.txt", "--h5ad", "--overwrite", "-o", "kb", "R1.fastq.gz", "R2.fastq.gz")  # fmt: skip
        note("kallisto\\|bustools folder", "reads/kb/counts_unfiltered", tool)
        note(".h5ad of kb", "reads/kb/counts_unfiltered/adata.h5ad", tool)


def read_one(path: str) -> None:
    """Read a file in this process, and print what came of it as JSON."""
    import rdata  # noqa: F401 (imported libraries do not count)
    import scanpy  # noqa: F401

    from scbert import datasets
    from scbert.paths import measure_peak_memory_mb

    before, start, said = measure_peak_memory_mb(), time.process_time(), io.StringIO()
    with warnings.catch_warnings(record=True) as heard, contextlib.redirect_stdout(said):
        warnings.simplefilter("always", UserWarning)
        try:
            adata = datasets.read(Path(path))
            result = f"{adata.n_obs:,} x {adata.n_vars:,}"
        except ValueError as error:
            result = "refused: " + str(error).split("not read: ")[-1].replace(path, Path(path).name)
    row = {"result": result, "seconds": time.process_time() - start, "mb": measure_peak_memory_mb() - before}
    row["said"] = said.getvalue() + "; ".join(str(warning.message) for warning in heard)
    print("\n" + json.dumps(row))


def read(folder: Path) -> None:
    """Print the table in Markdown; what was said of a file goes to the standard error."""
    files = [(kind, folder / name, tool) for kind, name, tool in json.loads((folder / "kinds.json").read_text())]
    mirror = sorted(Path(os.environ["SCBERT_MIRROR"]).rglob("*")) if "SCBERT_MIRROR" in os.environ else []
    files += [(*MIRROR[path.name][:1], path, MIRROR[path.name][1]) for path in mirror if path.name in MIRROR]
    print("| file | written by | cells x genes | seconds | MB |\n|---|---|---|---|---|")
    for kind, path, tool in files:
        done = subprocess.run([sys.executable, __file__, "one", path.resolve()], capture_output=True, text=True)
        if done.returncode:
            print(f"| {kind} | {tool} | FAILED: {done.stderr.strip().splitlines()[-1]} | | |", flush=True)
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {kind} | {tool} | {row['result']} | {row['seconds']:.1f} | {row['mb']:,.0f} |", flush=True)
        print(f"    {path.name}: {row['said'].strip()}", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        read_one(sys.argv[2])
    elif len(sys.argv) == 3 and sys.argv[1] in ("write", "read"):
        {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]).resolve())
    else:
        sys.exit(__doc__)
