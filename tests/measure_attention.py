"""Is it attention? FAVOR+ and exact softmax, pretrained alike: hidden tokens, distance from even attention, few labels.

    SCBERT_MIRROR=... python tests/measure_attention.py attention.csv encoders/ [--arms softmax favor favor_longer favor_eps]
        [--seeds 3]

Cells are those of `zheng_facs`: of its training 70 % all but 600 are pretrained on, the 1,000 genes that vary most, those
that a cell expresses; the 600 are measured. `favor_longer` has as many epochs as take the time of softmax, `favor_eps` the
constant 1e-9 in place of 1e-4 that FAVOR+ adds to each feature. Distance is total variation from even attention over the
genes that enter, a mean over queries, heads and 50 cells, by layer; and that of exact softmax with the same weights.
Few labels: ten a type, as in `measure_heads.py`, sound head, accuracy on 400 test cells. Encoders that are in the folder
are not trained again; rows that the file has are not made again.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from measure_heads import LABEL, train

import scbert
from scbert import interpret
from scbert.model import attention

ARMS = {"softmax": ("softmax", 8), "favor": ("favor", 8), "favor_longer": ("favor", 13), "favor_eps": ("favor", 8)}


def set_eps(eps):
    """Let FAVOR+ add another constant: both functions have it as a default."""
    attention.close_summary.__defaults__ = (eps,)
    getattr(attention.attend, "__wrapped__", attention.attend).__defaults__ = (eps, None)
    interpret.EPS = eps


@torch.no_grad()
def measure_distance(encoder, cells, kind):
    """Return the mean total variation from even attention, by layer."""
    encoder.config, found = replace(encoder.config, attention=kind), []
    for _, bins in scbert.cells.CellDataset(cells).in_order(1):
        _, layers = interpret._read_features(encoder, bins[0])
        rows = [interpret._form_rows(q, k, kind) for q, k in layers]
        found.append([float((part - 1 / part.shape[2]).abs().sum(2).mean() / 2) for part in rows])
    return np.mean(found, axis=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    adata = scbert.datasets.load("zheng_facs")
    (split,) = scbert.protocols.split_cells(adata, "zheng_facs", label_key=LABEL, seed=0)
    pool = np.random.default_rng(0).permutation([*split.train, *split.validation])
    genes = scbert.genes.choose_genes(adata[list(pool)].copy(), "1000")
    tokens = scbert.preprocess.tokenize(adata, genes=genes)
    learn, held_out = tokens[list(pool[600:])].copy(), tokens[list(pool[:600])].copy()
    rows = pd.read_csv(chosen.file).to_dict("records") if chosen.file.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    for seed, arm in ((seed, arm) for seed in range(chosen.seeds) for arm in chosen.arms):
        if (arm, seed) in done:
            continue
        kind, n_epochs = ARMS[arm]
        set_eps(1e-9 if arm == "favor_eps" else 1e-4)
        place = chosen.folder / f"{arm}_{seed}_{n_epochs}"
        if not place.exists():
            mode = {"expressed_only": True, "attention": kind}
            config = scbert.ScBertConfig(len(genes), dim=32, depth=2, heads=4, dim_head=16, **mode)
            encoder, start = scbert.ScBert(config, genes=genes, seed=seed), time.process_time()
            options = {"n_epochs": n_epochs, "learning_rate": 3e-3, "seed": seed, "progress": False}
            history = scbert.pretrain(encoder, learn, validation=held_out, **options)
            history.assign(cpu=time.process_time() - start).to_csv(f"{place}.csv", index=False)
            encoder.save(place)
        encoder, history = scbert.load_encoder(str(place)), pd.read_csv(f"{place}.csv").iloc[-1]
        n_steps = n_epochs * -(-learn.n_obs // 16)
        row = {"arm": arm, "seed": seed, "epochs": n_epochs, "masked accuracy": history["val_accuracy"]}
        row |= {"masked loss": history["val_loss"], "cpu seconds a step": history["cpu"] / n_steps}
        few = train(arm, "sound", 10, seed, tokens, split, encoder)
        row |= {"accuracy, 10 a type": few["test accuracy"], "state": few["state"]}
        for name in dict.fromkeys((kind, "softmax")):
            distance = measure_distance(encoder, held_out[:50].copy(), name)
            what = "distance" if name == kind else "softmax distance"
            row |= {f"{what}, layer {layer + 1}": value for layer, value in enumerate(distance)}
        rows.append(row)
        pd.DataFrame(rows).round(4).to_csv(chosen.file, index=False)
        print(row, flush=True)
    table = pd.DataFrame(rows).drop(columns=["seed", "state"])
    print(table.groupby("arm", sort=False).agg(["mean", "min", "max"]).round(3).T.to_string())


if __name__ == "__main__":
    main()
