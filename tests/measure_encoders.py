"""How well encoders name the same hidden tokens of cells that none of them has met.

    SCBERT_MIRROR=... python tests/measure_encoders.py encoders.csv [--encoders pbmc-small pbmc-large] [--cells 1500]

Cells are those that notebook 02's large profile holds out of `zheng_facs` (its test 30 %) and of `kang_pbmc` (two donors):
all encoders that ship were trained on others. Of each cell 15 % of the non-zero tokens of genes that all encoders read are
hidden, the same for all; what else an encoder reads it sees. Beside each stand tables of the cell, of the gene and of both,
counted on the large profile's training cells: rows of `tests/expected/encoders.csv`, with intervals over cells, and each
encoder minus the first.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from measure_scaling import POOL

import scbert
from scbert import masks, pretraining
from scbert.data.cells import CellDataset
from scbert.data.masking import mask_bins

SETS, LABEL = ("zheng_facs", "kang_pbmc"), "cell_type"


def score(encoder, held_out, learn, common, batch_size=16):
    """Return masked tokens, those named rightly and summed losses by cell: of the encoder, and of the three tables."""
    cells = CellDataset(scbert.preprocess.tokenize(held_out, genes=encoder.genes))
    table = masks.count_tokens(scbert.preprocess.tokenize(learn, genes=encoder.genes))
    shares = masks._share_tokens(table, (len(encoder.genes) + 1, encoder.config.n_bins))
    columns, parts = torch.from_numpy(pd.Index(encoder.genes).get_indexer(common)), []
    for start, bins in cells.in_order(batch_size):
        where = torch.zeros_like(bins, dtype=torch.bool)
        seeds = [(0, start + i) for i in range(len(bins))]
        where[:, columns] = mask_bins(bins[:, columns], encoder.config.mask_token, seeds, replace_share=1)[1]
        with torch.inference_mode():
            logits = encoder(bins.masked_fill(where, encoder.config.mask_token))[where].float()
        sums = masks._score_batch(logits, bins, where, encoder.config.n_bins, *shares)
        parts.append({name: values.reshape(len(bins), -1).sum(1) for name, values in sums.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def resample(numerator, denominator, n=1000):
    """Return a ratio of sums over cells, with the 95 % interval of the bootstrap over cells."""
    random, size = np.random.default_rng(0), len(denominator)
    drawn = [random.integers(size, size=size) for _ in range(n)]
    low, high = np.percentile([numerator[rows].sum() / denominator[rows].sum() for rows in drawn], [2.5, 97.5])
    return {"value": numerator.sum() / denominator.sum(), "low": low, "high": high}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--encoders", nargs="+", default=["pbmc-small", "pbmc-large"])
    parser.add_argument("--cells", type=int, default=1500)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sets = pretraining.load_sets(POOL, label_key=LABEL)
    learn, held_out = pretraining.join_sets(sets, label_key=LABEL, genes="published 20000")
    encoders = {name: scbert.load_encoder(name).eval() for name in chosen.encoders}
    common = sorted(set.intersection(*(set(encoder.genes) for encoder in encoders.values())) & set(held_out.var_names))
    print(f"{learn.n_obs:,} cells train, {held_out.n_obs:,} are held out; {len(common)} genes are read by all")
    rows = []
    for name in SETS:
        cells = np.flatnonzero((held_out.obs["set"] == name).to_numpy())
        cells = np.sort(np.random.default_rng(0).permutation(cells)[: chosen.cells])
        found = {who: score(encoder, held_out[cells].copy(), learn, common) for who, encoder in encoders.items()}
        (first, base), *_ = found.items()
        for who, sums in found.items():
            rivals = {"encoder": "", "cell": "cell_", "gene": "gene_", "cell and gene": "both_"}
            for rival, prefix in rivals.items():
                for measure, column in (("accuracy", "correct"), ("cross-entropy", "loss")):
                    row = {"set": name, "encoder": who, "who": rival, "measure": measure, "n cells": len(cells)}
                    rows.append(row | resample(sums[f"{prefix}{column}"], sums["n_masked"]))
                    if rival == "encoder" and who != first:
                        minus = sums[column] - base[column]
                        rows.append(row | {"who": f"minus {first}"} | resample(minus, sums["n_masked"]))
        pd.DataFrame(rows).round(4).to_csv(chosen.file, index=False)
    print(pd.DataFrame(rows).round(3).to_string())


if __name__ == "__main__":
    main()
