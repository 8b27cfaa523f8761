"""Measure what the data layer does: run by hand, python tests/measure_data.py sets|alignment|cross|totals.

sets       each set of the small profile from its original files: shape, labels, whole or not, genes, seconds, memory
alignment  10,000 cells x 20,000 genes to the published vocabulary, against a loop over columns, in the same run
cross      logistic regression on tokens: the 70 % of zheng_facs against its 30 %, pbmc3k and pbmc68k_reduced
totals     of which files of SCBERT_MIRROR `scbert.totals` says that they hold a selection of genes: as they are, with few
           and shallow cells (none should be named), and with their most variable genes only (all should)

All need the original files: fetched, or in SCBERT_MIRROR.
"""

import contextlib
import io
import itertools
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from scbert import datasets, genes, hygiene, metrics, preprocess, protocols, totals
from scbert.experiments.performance import measure_peak
from scbert.paths import measure_peak_memory_mb
from scbert.sources.readers import read_cells


def measure_set(name):
    """Load one set in this process and print a line about it."""
    import rdata  # noqa: F401 (imported libraries do not count)
    import scanpy  # noqa: F401

    before, start = measure_peak_memory_mb(), time.perf_counter()
    adata = datasets.load(name)
    seconds, peak = time.perf_counter() - start, measure_peak_memory_mb() - before
    whole = bool((adata.X.data == np.rint(adata.X.data)).all())
    report = genes.rename_genes(adata, genes.load_vocabulary()).uns["scbert"]["genes"]
    labels = adata.obs["cell_type"].value_counts() if "cell_type" in adata.obs else {}
    print(
        f"{name} | {adata.n_obs:,} x {adata.n_vars:,} | {'whole' if whole else 'fractional'} | "
        f"{report['share_before']:.2%} -> {report['share_after']:.2%} | {seconds:.2f} s | {peak:.0f} MB | "
        + ", ".join(f"{label} {n}" for label, n in labels.items())
    )


def measure_sets():
    """Measure each set in a process of its own."""
    for name, entry in datasets.CATALOGUE.items():
        if entry["kind"] == "cells" and entry["profile"] != "paper":
            subprocess.run([sys.executable, __file__, "set", name], check=True)


def make_alignment_cells(n_cells=10_000, n_genes=20_000, density=0.05):
    """Return random counts under three quarters of the vocabulary's names, shuffled among others."""
    random, vocabulary = np.random.default_rng(0), genes.load_vocabulary()
    known = random.choice(vocabulary, len(vocabulary) * 3 // 4, replace=False)
    names = random.permutation([*known, *(f"other{i}" for i in range(n_genes - len(known)))])
    counts = sparse.random(n_cells, n_genes, density, "csr", np.float32, rng=random)
    counts.data = np.ceil(counts.data * 9)
    return anndata.AnnData(counts, var=pd.DataFrame(index=names)), vocabulary


def align_by_columns(adata, vocabulary):
    """Fill an empty matrix gene by gene, looking each name up in a list: what one writes first."""
    names, source = list(adata.var_names), adata.X.tocsc()
    aligned = sparse.lil_matrix((adata.n_obs, len(vocabulary)), dtype=np.float32)
    for column, gene in enumerate(vocabulary):
        if gene in names:
            aligned[:, column] = source[:, names.index(gene)]
    return aligned.tocsr()


def measure_alignment(n_turns=5):
    """Time `preprocess.tokenize`'s alignment and the loop over columns, and compare their results."""
    adata, vocabulary = make_alignment_cells()
    print(f"{adata.n_obs:,} cells x {adata.n_vars:,} genes, {adata.X.nnz:,} non-zeros, to {len(vocabulary):,} genes")
    seconds, results = [], {}
    for _ in range(n_turns):
        start = time.perf_counter()
        results["ours"] = preprocess.align(adata.X, adata.var_names, vocabulary)
        seconds.append(time.perf_counter() - start)
    del results["ours"]

    def run_ours():
        results["ours"] = preprocess.align(adata.X, adata.var_names, vocabulary)

    def run_loop():
        start = time.perf_counter()
        results["loop"] = align_by_columns(adata, vocabulary)
        results["seconds"] = time.perf_counter() - start

    print(f"sparse product: median {np.median(seconds):.3f} s of {n_turns}, {measure_peak(run_ours):.0f} MB")
    print(f"loop over columns: {measure_peak(run_loop):.0f} MB, {results['seconds']:.1f} s")
    print(
        f"ratio {results['seconds'] / np.median(seconds):.0f}, same result: {(results['ours'] != results['loop']).nnz == 0}"
    )


def fit_on_tokens(train, validation, label_key):
    """Fit L2 logistic regression on tokens, its strength chosen on validation cells."""
    best = None
    for strength in (1e-4, 1e-3, 1e-2, 0.1):
        model = LogisticRegression(C=strength, max_iter=500)
        model.fit(train.layers["bins"].astype(np.float64), train.obs[label_key].astype(str))
        predicted = model.predict(validation.layers["bins"].astype(np.float64))
        score = metrics.macro_f1(validation.obs[label_key].astype(str).to_numpy(), predicted)
        if best is None or score > best[0]:
            best = (score, model, strength)
    return best[1:]


def measure_cross():
    """Train on zheng_facs, test on its saved test cells and on other sets, on the genes and labels that both share."""
    vocabulary, reference = genes.load_vocabulary(), datasets.load("zheng_facs")
    reference = genes.rename_genes(reference, vocabulary)
    (split,) = protocols.split_cells(reference, "zheng_facs")
    for name, label_key in {
        "zheng_facs": "cell_type",
        "pbmc68k_reduced": "cell_type",
        "pbmc3k": "cell_type_broad",
    }.items():
        other = (
            reference[split.test].copy()
            if name == "zheng_facs"
            else genes.rename_genes(datasets.load(name), vocabulary)
        )
        if name != "zheng_facs":
            met = hygiene.find_duplicates(other, reference)
            print(f"{name}: {len(met)} cells in zheng_facs too, {met.attrs['by_chance']} share a barcode by chance")
        shared = [g for g in vocabulary if g in set(reference.var_names) & set(other.var_names)]
        cells = preprocess.tokenize(reference.copy(), genes=shared)
        model, strength = fit_on_tokens(cells[split.train], cells[split.validation], label_key)
        known = other.obs[label_key].isin(model.classes_).to_numpy()
        tested = preprocess.tokenize(other[known].copy(), genes=shared)
        truth = tested.obs[label_key].astype(str).to_numpy()
        predicted = model.predict(tested.layers["bins"].astype(np.float64))
        commonest = cells.obs[label_key][split.train].mode()[0]
        print(
            f"zheng_facs -> {name}, {label_key}: {len(shared):,} genes, {known.sum():,} of {other.n_obs:,} cells have one "
            f"of {len(set(truth))} shared labels; C = {strength}"
        )
        for method, labels in {"logistic_regression": predicted, "majority": np.full(len(truth), commonest)}.items():
            for metric, statistic in {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1}.items():
                names = pd.Index(sorted({*truth, *labels}))
                codes = names.get_indexer(truth), names.get_indexer(labels)
                options = {"labels": np.unique(codes[0])} if metric == "macro_f1" else {}
                row = metrics.bootstrap(lambda t, p, axis, s=statistic, o=options: s(t, p, axis, **o), *codes)
                print(f"  {method} {metric} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], n = {row['n']}")
        if not known.all():
            rest = preprocess.tokenize(other[~known].copy(), genes=shared)
            became = pd.Series(model.predict(rest.layers["bins"].astype(np.float64))).value_counts()
            print(
                f"  cells of other labels ({', '.join(sorted(set(other.obs[label_key][~known])))}) became: {became.to_dict()}"
            )
        print(f"  {datasets.CATALOGUE[name]['caveat']}")


def measure_totals():
    """Print a line a file: what is said of it, of how many shallow parts of it, and of which selections."""
    import scanpy

    flavors = ("seurat", "cell_ranger", "pearson_residuals")
    summed = {f"{of}{end}": 0 for of in ("parts", *flavors) for end in ("", " named")}
    for path in sorted(Path(os.environ["SCBERT_MIRROR"]).rglob("*")):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                adata = read_cells(path, round_counts=True) if path.stat().st_size > 200_000 else None
        except (OSError, ValueError):  # a folder, or no counts
            continue
        if adata is None or not adata.var_names.is_unique:
            continue
        whole = adata.n_vars >= totals.WHOLE
        found = dict.fromkeys(summed, 0)
        for n_cells, depth in itertools.product((50, 200, 500), (300, 1000, 3000)) if whole else ():
            part = adata[np.random.default_rng(0).permutation(adata.n_obs)[:n_cells]].copy()
            scanpy.pp.filter_cells(part, min_counts=1)
            scanpy.pp.downsample_counts(part, counts_per_cell=depth, random_state=0)
            scanpy.pp.filter_genes(part, min_cells=3)
            found["parts"] += 1
            found["parts named"] += bool(say(part))
        said = say(adata) or "nothing is said"
        scanpy.pp.filter_genes(adata, min_cells=3)
        log = scanpy.pp.log1p(scanpy.pp.normalize_total(adata, copy=True), copy=True)
        for flavor, n in itertools.product(flavors, (1000, 2000, 5000)) if whole else ():
            options = {"flavor": flavor, "n_top_genes": n, "inplace": False}
            if flavor == "pearson_residuals":
                chosen = scanpy.experimental.pp.highly_variable_genes(adata, **options)
            else:
                chosen = scanpy.pp.highly_variable_genes(log, **options)
            selected = adata[:, chosen.index[chosen["highly_variable"]]]
            found[flavor] += 1
            found[f"{flavor} named"] += bool(say(anndata.AnnData(selected.X, var=selected.var[[]])))
        print(f"{path.name}: {adata.n_obs:,} x {adata.n_vars:,} in 3 cells and more; {said}; {found}")
        summed = {key: n + found[key] for key, n in summed.items()}
    print(f"all: {summed}")


def say(adata):
    """Return what `supply_totals` says of cells, in print or as a warning."""
    with warnings.catch_warnings(record=True) as heard, contextlib.redirect_stdout(io.StringIO()) as printed:
        warnings.simplefilter("always", UserWarning)
        totals.supply_totals(adata, "it")
    return printed.getvalue().strip() + "; ".join(str(warning.message)[:90] for warning in heard)


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    steps = {"sets": measure_sets, "alignment": measure_alignment, "cross": measure_cross, "totals": measure_totals}
    if what == "set":
        measure_set(sys.argv[2])
    elif what in steps:
        steps[what]()
    else:
        sys.exit(__doc__)
