"""Which layer of an encoder still says what a cell is: linear probes, as if the network ended there.

    SCBERT_MIRROR=... python tests/measure_layers.py layers.csv [--encoders pbmc-small random] [--cells 10 25] [--seeds 10]

Cells are drawn as in `measure_heads`, and no weight of the encoder is trained. By layer (0: the embeddings of gene and token):
test accuracy of logistic regression on the mean over a cell's genes, on one number a gene (a random direction, which is what
the head of scBERT reads; mean of three) and on the tokens themselves; how much of a gene's own token is left in its vector
(R2 of ridge regression, between genes of test cells, beyond what the gene's mean token says); in how many directions the
vectors vary (participation ratio), and their length before the last norm's scale. Two minutes a thousand rows.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from measure_heads import LABEL, draw
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scbert

KEY = ["encoder", "cells a label", "seed", "layer"]


def read_cells(encoder, adata, directions):
    """Return of each cell the mean vector, one number a gene by direction, and vectors and tokens of all that entered."""
    means, numbers, vectors, tokens, genes = [], [], [], [], []
    for _, bins in scbert.cells.CellDataset(adata).in_order(16):
        with torch.inference_mode():
            hidden, entered = encoder.encode_expressed(bins)
        cell, gene = entered.nonzero().T
        is_gene = gene < bins.shape[1] - 1
        for i in range(len(bins)):
            means.append(hidden[(cell == i) & is_gene].mean(0))
        read = torch.zeros(*bins.shape, directions.shape[1])
        read[entered] = hidden @ directions
        numbers.append(read)
        vectors.append(hidden[is_gene])
        tokens.append(bins[entered][is_gene])
        genes.append(gene[is_gene])
    numbers = torch.cat(numbers).numpy()
    return torch.stack(means).numpy(), numbers, *(torch.cat(each).numpy() for each in (vectors, tokens, genes))


def probe(train, truth, test, expected, strength):
    """Return the accuracy of logistic regression."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, C=strength))
    return float((model.fit(train, truth).predict(test) == expected).mean())


def measure_token(vectors, tokens, genes):
    """Return the share of a token's variance around its gene's mean that the vector says, on every second position."""
    own = tokens - pd.Series(tokens).groupby(genes).transform("mean").to_numpy()
    inside = vectors - pd.DataFrame(vectors).groupby(genes).transform("mean").to_numpy()
    return float(RidgeCV(np.logspace(-2, 4, 7)).fit(inside[::2], own[::2]).score(inside[1::2], own[1::2]))


def measure_cells(name, encoder, adata, split, n, seed):
    """Return a row a layer of one encoder and one draw of cells."""
    train, _, test = draw(adata, split, n, seed)
    truth, expected = (cells.obs[LABEL].astype(str).to_numpy() for cells in (train, test))
    directions = torch.randn(encoder.config.dim, 3, generator=torch.Generator().manual_seed(seed))
    tokens = probe(
        *[x for cells, y in ((train, truth), (test, expected)) for x in (cells.layers["bins"].toarray(), y)], 0.01
    )
    rows, layers = [], encoder.performer.net.layers
    for layer in range(encoder.config.depth + 1):
        short = copy.deepcopy(encoder)
        short.performer.net.layers = layers[:layer]
        (means, one, *_), (others, other, *positions) = (
            read_cells(short, cells, directions) for cells in (train, test)
        )
        spread = np.linalg.eigvalsh(np.cov(positions[0].T)).clip(0)
        rows.append(
            dict(zip(KEY, (name, n, seed, layer), strict=True))
            | {
                "mean of genes": probe(means, truth, others, expected, 1),
                "one number a gene": np.mean(
                    [probe(one[..., i], truth, other[..., i], expected, 0.01) for i in range(3)]
                ),
                "tokens": tokens,
                "own token": measure_token(*positions),
                "directions": spread.sum() ** 2 / (spread**2).sum(),
                "length": np.linalg.norm(positions[0], axis=1).mean(),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--encoders", nargs="+", default=["pbmc-small", "random"])
    parser.add_argument("--cells", nargs="+", type=int, default=[10, 25])
    parser.add_argument("--seeds", type=int, default=10)
    chosen = parser.parse_args()
    adata = scbert.datasets.load("zheng_facs")
    (split,) = scbert.protocols.split_cells(adata, "zheng_facs", label_key=LABEL, seed=0)
    shipped = scbert.load_encoder(next((name for name in chosen.encoders if name != "random"), "pbmc-small"))
    shipped.set_expressed_only(True)
    adata = scbert.preprocess.tokenize(adata, genes=shipped.genes)
    rows = []
    for n in chosen.cells:
        for seed in range(chosen.seeds):
            for name in chosen.encoders:
                drawn = scbert.ScBert(shipped.config, genes=shipped.genes, seed=seed)
                rows += measure_cells(name, (drawn if name == "random" else shipped).eval(), adata, split, n, seed)
            pd.DataFrame(rows).round(4).to_csv(chosen.file, index=False)
    table = pd.DataFrame(rows)
    print(table.groupby([KEY[0], KEY[1], KEY[3]], sort=False).mean().drop(columns="seed").round(3).to_string())


if __name__ == "__main__":
    main()
