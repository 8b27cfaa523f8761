"""A file of selected genes: its cells' totals are found where the file has them, asked for where not, and nothing else is said."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scbert
from scbert.sources import totals

FAMILIES = ("CD", "IL", "KRT", "SLC", "ZNF", "TMEM")
RIBOSOMAL = [f"RPL{i}" for i in range(3, 42)] + [f"RPS{i}" for i in range(2, 30)]


@pytest.fixture
def whole():
    """40 cells of 67 genes of ribosomal proteins and 120 others."""
    genes = [*RIBOSOMAL, *(f"{family}{i}" for family in FAMILIES for i in range(1, 21))]
    counts = np.random.default_rng(0).poisson(2, (40, len(genes))).astype(np.float32)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(40)])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))


def select(adata):
    return adata[:, len(RIBOSOMAL) : len(RIBOSOMAL) + 100].copy()


@pytest.fixture
def selected(whole):
    """The same cells, with 100 of the other genes."""
    return select(whole)


@pytest.fixture
def sums(whole):
    return np.asarray(whole.X.sum(1)).ravel()


def hear(adata):
    """Return what is warned of."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        totals.supply_totals(adata, "mine.h5ad")
    return [str(warning.message) for warning in heard]


@pytest.mark.parametrize("place", ["total_counts", "nCount_RNA", "nUMI", "n_umis", "raw_sum", "sum", ".raw"])
def test_tokens_of_a_selection_are_those_of_the_whole_file_where_it_has_the_totals(
    tmp_path, whole, selected, sums, place, capsys
):
    source = place if place == ".raw" else f"obs[{place!r}]"
    if place == ".raw":
        selected.raw = whole
    else:
        selected.obs[place] = sums.astype(int)
    selected.write_h5ad(tmp_path / "mine.h5ad")
    adata = scbert.datasets.load(tmp_path / "mine.h5ad")
    assert f"are those of {source}, 1.9 times the counts" in capsys.readouterr().out
    assert adata.uns["scbert"]["totals"] == source
    bins = [
        scbert.preprocess.tokenize(each).layers["bins"].toarray() for each in (select(adata_of(whole, sums)), adata)
    ]
    assert (bins[0] == bins[1]).all()
    alone = scbert.preprocess.tokenize(select(whole)).layers["bins"].toarray()
    assert (alone != bins[1]).mean() > 0.2  # what the totals are worth
    assert hear(adata) == []


def adata_of(adata, sums):
    adata = adata.copy()
    adata.obs["n_counts"] = sums
    return adata


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nCount_RNA", lambda values, own: own),  # counted anew on the selection
        ("total_counts", lambda values, own: np.full(40, 10_000)),  # of normalised values
        ("total_counts", lambda values, own: np.where(np.arange(40) == 7, own - 1, values)),  # of other counts
        ("total_counts", lambda values, own: values + 0.5),
        ("total_counts", lambda values, own: np.where(np.arange(40) == 7, np.nan, values)),
        ("sum", lambda values, own: values.astype(str)),
        ("total_counts_mt", lambda values, own: values),
        ("nCount_ADT", lambda values, own: values),
    ],
)
def test_what_are_no_totals_is_not_taken(selected, sums, name, change):
    selected.obs[name] = change(sums.astype(float), np.asarray(selected.X.sum(1)).ravel())
    assert len(hear(selected)) == 1
    assert "n_counts" not in selected.obs
    assert "scbert" not in selected.uns


def test_raw_that_is_normalised_or_of_the_same_genes_is_not_taken(whole, selected):
    for raw in (whole, selected):
        other = raw.copy()
        if raw is whole:
            other.X = other.X.log1p()
        selected.raw = other
        assert len(hear(selected)) == 1
        assert "n_counts" not in selected.obs


@pytest.mark.parametrize(
    ("sign", "message"),
    [
        ("names", "0 of some 80 ribosomal ones"),
        ("symbols", "0 of some 80 ribosomal ones"),
        ("highly_variable", "var['highly_variable'] marks all"),
        ("n_genes_by_counts", "obs['n_genes_by_counts'] counts more a cell than are here"),
        ("nFeature_RNA", "obs['nFeature_RNA'] counts more a cell than are here"),
    ],
)
def test_a_selection_without_totals_is_warned_of_in_a_sentence_that_says_what_to_do(whole, selected, sign, message):
    if sign == "symbols":  # as CELLxGENE has them
        selected.var["feature_name"] = selected.var_names
    if sign != "names":
        selected.var_names = [f"ENSG{i:011}" for i in range(100)]
    if sign == "highly_variable":
        selected.var[sign] = True
    elif sign.startswith("n"):
        selected.obs[sign] = whole.X.getnnz(1)
    (said,) = hear(selected)
    assert said.startswith("mine.h5ad seems to hold a selection of its genes (100; ")
    assert message in said
    assert "put these totals into obs['n_counts']" in said


def test_nothing_is_said_of_whole_files_nor_of_names_that_are_not_known(whole, selected, sums, make_cells):
    whole.var["highly_variable"] = np.arange(whole.n_vars) < 50
    whole.obs["nCount_RNA"], whole.obs["nFeature_RNA"] = sums, whole.X.getnnz(1)
    assert hear(whole) == []
    toy = make_cells()
    del toy.obs["n_counts"]
    assert hear(toy) == []
    assert hear(adata_of(selected, sums)) == []
    few = selected[:, :30].copy()
    assert hear(few) == []
    for adata in (whole, toy, few):
        assert "n_counts" not in adata.obs


def test_a_file_of_very_many_genes_is_whole_whatever_stands_beside(monkeypatch, selected, sums):
    monkeypatch.setattr(totals, "WHOLE", 100)
    selected.obs["total_counts"] = sums  # of before counts were corrected, say
    assert hear(selected) == []
    assert "n_counts" not in selected.obs


def test_reading_and_annotating_warn_and_a_set_of_the_catalogue_does_not(tmp_path, selected, sums, make_cells):
    selected.write_h5ad(tmp_path / "mine.h5ad")
    for read in (scbert.datasets.read, scbert.datasets.load):
        with pytest.warns(UserWarning, match=r"mine\.h5ad seems to hold a selection"):
            read(tmp_path / "mine.h5ad")
    scbert.datasets.load("pbmc68k_reduced")  # any warning is an error here
    selected.obs["cell_type"] = np.array(["a", "b"])[np.arange(40) % 2]
    reference = scbert.preprocess.tokenize(adata_of(selected, sums))
    encoder = scbert.ScBert(scbert.ScBertConfig(n_genes=100, dim=8, depth=1, heads=2, dim_head=4))
    options = {"n_epochs": 1, "companions": False, "accelerator": "cpu", "progress": False}
    classifier = scbert.finetune(encoder, reference, **options)
    with pytest.warns(UserWarning, match="adata seems to hold a selection"):
        scbert.annotate(selected, classifier)
    selected.obs["nCount_RNA"] = sums
    scbert.annotate(selected, classifier)
    assert selected.uns["scbert"]["totals"] == "obs['nCount_RNA']"
    assert (selected.obs["n_counts"] == sums).all()
    assert "annotate" in selected.uns["scbert"]


def test_a_backed_file_gets_its_totals_too(tmp_path, selected, sums):
    selected.obs["total_counts"] = sums
    selected.write_h5ad(tmp_path / "mine.h5ad")
    adata = scbert.datasets.load(tmp_path / "mine.h5ad", backed=True)
    assert adata.isbacked
    assert (adata.obs["n_counts"] == sums).all()
