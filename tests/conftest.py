"""Small cells and small models, made in milliseconds. A test may change what it is given."""

import copy

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scbert

torch.set_num_threads(1)  # tensors of this size are slower on two, and far slower on a busy machine

LABELS = ("B", "Monocyte", "T/NK")  # a slash, as in the labels of Zheng68K


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of this project without notebooks, which the package seems to lie in, and which is the current folder."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "scbert-companion"\n')
    monkeypatch.setattr(scbert.paths, "__file__", str(tmp_path / "scbert" / "paths.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def make_cells():
    """Return a function that makes cells of labels which a third of the genes each tells apart."""

    def make(n_cells: int = 60, n_genes: int = 24, seed: int = 0, labels=LABELS) -> anndata.AnnData:
        random = np.random.default_rng(seed)
        label = np.arange(n_cells) % len(labels)
        marks = np.arange(n_genes) % len(labels) == label[:, None]  # (cells, genes)
        counts = random.poisson(np.where(marks, 6, 1)).astype(np.float32)
        counts[:, 0] += 1  # no empty cell
        obs = pd.DataFrame(
            # One count is 5 per 10,000, token 2; seven are 35, token 5.
            {"cell_type": pd.Categorical(np.array(labels)[label]), "batch": "b1", "n_counts": 2000.0},
            index=[f"cell{i}" for i in range(n_cells)],
        )
        var = pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)])
        return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)

    return make


@pytest.fixture
def cells(make_cells):
    """60 tokenized cells of 24 genes and 3 labels, 20 cells a label."""
    return scbert.preprocess.tokenize(make_cells())


@pytest.fixture
def more_cells(make_cells):
    """30 other tokenized cells of the same labels."""
    return scbert.preprocess.tokenize(make_cells(30, seed=1))


@pytest.fixture
def config():
    """A model of 24 genes and two layers."""
    return scbert.ScBertConfig(n_genes=24, dim=8, depth=2, heads=2, dim_head=4)


@pytest.fixture
def encoder(config):
    """An untrained encoder."""
    return scbert.ScBert(config)


@pytest.fixture
def bins(cells):
    """The tokens of ten cells, (10, 25)."""
    return scbert.cells.CellDataset(cells).batch(range(10))


@pytest.fixture(scope="session")
def trained(make_cells):
    cells = scbert.preprocess.tokenize(make_cells(seed=2))
    encoder = scbert.ScBert(scbert.ScBertConfig(n_genes=24, dim=8, depth=2, heads=2, dim_head=4))
    return scbert.finetune(encoder, cells, n_epochs=4, learning_rate=1e-2, accelerator="cpu", progress=False)


@pytest.fixture
def classifier(trained):
    """A trained classifier, surer of some cells than of others."""
    return copy.deepcopy(trained)
