"""Do the genes matter that come out on top? Rankings of genes, and what a prediction loses without the first of them.

A ranking is worth something if deleting its first genes takes more of the true type's probability away than deleting
others as strongly expressed, and if they alone bring it back. Genes are ranked on training cells, deleted in test cells.

Paper: not in it. Fig. 5 shows genes of high attention and asks no further.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from ..data.cells import open_for
from ..data.checks import check_column, check_known
from ..data.preprocess import library_size, lognormalize
from ..evaluate.metrics import draw_weights
from ..evaluate.significance import decide
from ..model.classifier import Classifier
from ..model.encoder import find_entered
from .interpretability import contrast_types, even_attention, measure_agreement

GROUP = ["judge", "kind"]


def choose_cells(labels: Sequence[str], n: int, seed: int = 0) -> np.ndarray:
    """Return numbers of at most `n` cells of each label, drawn without replacement, in order."""
    random, labels = np.random.default_rng(seed), np.asarray(labels, dtype=str)
    chosen = [random.permutation(np.flatnonzero(labels == label))[:n] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def integrated_gradients(
    classifier: Classifier, adata: anndata.AnnData, labels: Sequence[str], *, n_steps: int = 16, batch_size: int = 8
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Attribute the logit of a label to the genes of each cell, by integrated gradients (captum).

    The path runs in a straight line from all tokens at 0 to the cell as it is. With ``config.expressed_only`` a gene that is
    not expressed is absent, which no token says: so a second input runs along the path, from 0 to 1, by which each gene's
    encoding is multiplied before the head, and what a gene is due is the sum over both.

    `labels`, (cells,), are those whose logit is attributed, such as each cell's true type; `n_steps` the points of the
    Gauss-Legendre rule on the path, each a forward and a backward pass.

    Returns
    -------
    Cells x genes, of either sign, zero where a token is 0. And a row a cell: `sum` of its attributions, and the
    `difference` of the logit between the ends of the path, which the sum should equal. They differ by the rule's error,
    and since the maxima within attention count as constants in its gradients.

    A ValueError if captum is not installed, cells are not tokenized for the model, or a label is unknown.

    Paper: not in it. Sundararajan, Taly and Yan 2017.
    """
    if find_spec("captum") is None:
        raise ValueError("captum is not installed: pip install -c requirements.lock 'scbert-companion[interpret]'.")
    from captum.attr import IntegratedGradients

    cells = open_for(classifier, adata)
    check_known(labels, classifier.labels)
    encoder, device = classifier.encoder, next(classifier.parameters()).device
    target = torch.from_numpy(pd.Index(classifier.labels).get_indexer(list(labels))).to(device)

    def read(x, there, positions, present):  # (cells, positions, dim), (cells, positions) -> (cells, labels)
        run = encoder.run_expressed if encoder.config.expressed_only else lambda x, _: encoder.run_layers(x)
        hidden = encoder.norm(run(x, present)) * there[..., None]
        every = hidden.new_zeros(len(x), encoder.config.n_genes + 1, hidden.shape[2])
        return classifier.head(every.scatter(1, positions[..., None].expand_as(hidden), hidden))

    attribute, parts, sums = IntegratedGradients(read).attribute, [], []
    for start, bins in cells.in_order(batch_size):
        bins = encoder.hide_unseen(bins.to(device))
        if encoder.config.expressed_only:
            positions, present = find_expressed(bins)
            absent = (positions == bins.shape[1] - 1).float()  # of the whole cell the trailing position alone is left
        else:
            positions = torch.arange(bins.shape[1], device=device).expand_as(bins)
            present = torch.ones_like(bins, dtype=torch.bool)
            absent = present.float()
        with torch.no_grad():
            x, empty = (encoder.embed(tokens, positions) for tokens in (bins, torch.zeros_like(bins)))
        (by_token, by_presence), missing = attribute(
            (x, present.float()), (empty, absent), target[start : start + len(bins)], (positions, present),
            n_steps=n_steps, method="gausslegendre", internal_batch_size=max(len(bins), 4 * batch_size),
            return_convergence_delta=True,
        )  # fmt: skip
        values = (by_token.sum(2) + by_presence).masked_fill(~present, 0)  # (cells, positions)
        parts.append(values.new_zeros(*bins.shape).scatter(1, positions, values)[:, :-1].cpu().numpy())
        total = values.sum(1).double().cpu().numpy()
        sums.append(np.stack([total, total - missing.double().cpu().numpy()], axis=1))
    return (
        pd.DataFrame(np.concatenate(parts).astype(np.float64), adata.obs_names, classifier.genes),
        pd.DataFrame(np.concatenate(sums), adata.obs_names, ["sum", "difference"]),
    )


def find_expressed(bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of `bins`, (cells, genes + 1), that enter in the mode ``expressed_only``, and which are not padding.

    Both are (cells, longest): of each cell columns with a non-zero token and the trailing one, in their order, and then,
    up to the longest cell's number, others, for which the boolean is false.
    """
    present, positions = find_entered(bins).sort(dim=1, descending=True, stable=True)
    longest = int(present.any(0).sum())
    return positions[:, :longest], present[:, :longest]


def tabulate_scores(contrast: pd.DataFrame, value: str = "difference") -> pd.DataFrame:
    """Turn the table of `scbert.interpret.contrast_types` into scores, types x genes, in the order of the genes."""
    return contrast.pivot(index="type", columns="gene", values=value)[contrast["gene"].unique()]


def score_by_attention(attention: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """Score genes by what they receive in a type less what in others, types x genes: `contrast_types` without a test."""
    return tabulate_scores(contrast_types(attention, labels, n_permutations=0))


def score_by_weights(adata: anndata.AnnData, label_key: str = "cell_type") -> pd.DataFrame:
    """Score genes by logistic regression: weight of the type x mean log-normalised expression in it, types x genes.

    To first order that is what the type's logit loses, in an average cell of it, when the gene is deleted. `adata` has
    counts of training cells. The regression is multinomial, with an L2 penalty and C = 1; weights are centred over types.
    """
    x, labels = _read(adata, label_key)
    model = LogisticRegression(max_iter=5000).fit(x, labels)
    weights = model.coef_ if len(model.classes_) > 2 else np.vstack([-model.coef_, model.coef_]) / 2
    weights = weights - weights.mean(0)
    means = np.vstack([np.asarray(x[labels == label].mean(0)) for label in model.classes_])
    return pd.DataFrame(weights * means, model.classes_, adata.var_names)


def score_by_expression(adata: anndata.AnnData, label_key: str = "cell_type") -> pd.DataFrame:
    """Score genes by differential expression, types x genes: Wilcoxon's rank-sum statistic, each type against the rest.

    Of `scanpy.tl.rank_genes_groups`, on log-normalised counts of training cells; a type of fewer than two is left out.

    Paper: Methods, "model interpretability" (there by DESeq).
    """
    import scanpy

    x, labels = _read(adata, label_key)
    genes = np.flatnonzero(x.getnnz(0))  # of a gene that no cell expresses there are ties only
    light = anndata.AnnData(x[:, genes], obs=pd.DataFrame({"type": pd.Categorical(labels)}, adata.obs_names))
    light.var_names = adata.var_names[genes]
    light.uns["log1p"] = {"base": None}
    types = [kind for kind, n in pd.Series(labels).value_counts().sort_index().items() if n > 1]
    n_threads = torch.get_num_threads()  # numba, within scanpy, sets those of all of OpenMP to the number of cores
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.PerformanceWarning)  # scanpy's own table
        scanpy.tl.rank_genes_groups(light, "type", groups=types, method="wilcoxon", tie_correct=True)
    torch.set_num_threads(n_threads)
    found = light.uns["rank_genes_groups"]
    rows = {kind: pd.Series(found["scores"][kind], found["names"][kind]) for kind in types}
    return pd.DataFrame(rows).T.reindex(columns=adata.var_names).astype(float).fillna(0.0)


def score_by_gradients(
    classifier: Classifier, adata: anndata.AnnData, label_key: str = "cell_type", n_cells: int = 5
) -> tuple[pd.DataFrame, float]:
    """Score genes by integrated gradients of the true type's logit: their mean in the type less that in other cells.

    Of the tokenized training cells at most `n_cells` of each type are attributed. Returns types x genes; and the share of
    the logits' differences that the attributions miss in sum, small if they can be trusted.
    """
    labels = _read(adata, label_key)[1]
    chosen = choose_cells(labels, n_cells)
    values, sums = integrated_gradients(classifier, adata[chosen].copy(), labels[chosen], n_steps=12)
    missed = (sums["sum"] - sums["difference"]).abs().sum() / sums["difference"].abs().sum()
    return score_by_attention(values, labels[chosen]), float(missed)


def score_genes(
    trained: Mapping[int, Callable],
    adata: anndata.AnnData,
    contrasts: Mapping[int, pd.DataFrame],
    label_key: str = "cell_type",
    n_cells: int = 5,
) -> tuple[pd.DataFrame, pd.Series]:
    """Score genes in five ways, for each training, in one table that all comparisons read.

    "attention" is what a gene receives in a type less what it receives in others; "even" the same, of attention spread
    evenly over the genes a cell expresses; "weights", "expression" and "gradients" are of `score_by_weights`,
    `score_by_expression` and `score_by_gradients`. "even", "weights" and "expression" are the same for each training.

    `trained` is seed -> what `fit_scbert` returned; `adata` are tokenized training cells, of which `n_cells` of each type
    are taken for gradients; `contrasts` is seed -> `contrast_types` of the attention in these cells, whose genes are scored.
    Returns the columns seed, ranking, type, gene, score; and for each seed the share of the logits that gradients miss.
    """
    labels, genes = _read(adata, label_key)[1], next(iter(contrasts.values()))["gene"].unique()
    rivals = {
        "even": score_by_attention(even_attention(adata)[genes], labels),
        "weights": score_by_weights(adata, label_key),
        "expression": score_by_expression(adata, label_key),
    }
    tables, missed = {}, {}
    for seed, contrast in contrasts.items():
        own = {"attention": tabulate_scores(contrast)} | rivals
        own["gradients"], missed[seed] = score_by_gradients(trained[seed].classifier, adata, label_key, n_cells)
        tables |= {(seed, ranking): table.reindex(np.unique(labels), columns=genes) for ranking, table in own.items()}
    table = pd.concat(tables, names=["seed", "ranking", "type"]).fillna(0.0).rename_axis(columns="gene")
    missed = pd.Series(missed, name="missed").rename_axis("seed")
    return table.stack(future_stack=True).rename("score").reset_index(), missed


def split_scores(scores: pd.DataFrame, by: str) -> dict:
    """Return for each value of a column of `score_genes`, such as each "ranking" of one seed, types x genes."""
    return {name: tabulate_scores(part, "score") for name, part in scores.groupby(by, sort=False)}


def compare_rankings(
    scores: pd.DataFrame, layers: Mapping[int, pd.DataFrame], labels: Sequence[str], n: int = 20
) -> pd.DataFrame:
    """Compare scores of attention between trainings and between layers, and all rankings of the first training.

    `scores` are from `score_genes`, and `layers` is layer -> attention of the first training, cells x genes, whose
    types are `labels`. Returns the table of `measure_agreement` for `n` genes on top, ``between`` being "seeds",
    "layers" or "rankings"; without those of which there is one only.
    """
    rankings = split_scores(scores[scores["seed"] == scores["seed"].iloc[0]], "ranking")
    genes = rankings["attention"].columns
    seeds = split_scores(scores[scores["ranking"] == "attention"], "seed")
    groups = {
        "seeds": {f"seed {seed}": table for seed, table in seeds.items()},
        "layers": {f"layer {layer}": score_by_attention(table[genes], labels) for layer, table in layers.items()},
        "rankings": rankings,
    }
    tables = {group: measure_agreement(own, n) for group, own in groups.items() if len(own) > 1}
    return pd.concat(tables, names=["between"]).reset_index("between").reset_index(drop=True)


def _read(adata, label_key):
    check_column(adata, label_key, "The training set", constant_is_fine=False)
    return lognormalize(adata), adata.obs[label_key].astype(str).to_numpy()


def order_genes(scores: pd.DataFrame, n: int) -> dict[str, list[str]]:
    """Return the `n` genes of the largest score of each type, best first: what is deleted."""
    return {kind: list(row.sort_values(ascending=False, kind="stable").index[:n]) for kind, row in scores.iterrows()}


def match_genes(
    ranking: Mapping[str, Sequence[str]],
    adata: anndata.AnnData,
    label_key: str = "cell_type",
    *,
    n_draws: int = 1,
    n_nearest: int = 10,
    seed: int = 0,
) -> list[dict[str, list[str]]]:
    """Draw for each gene of a ranking another one that the type expresses as strongly: what chance would do.

    `ranking` is type -> genes, see `order_genes`; `adata` has counts of training cells. Each is drawn from the `n_nearest`
    genes of the nearest mean expression (log-normalised, in cells of the type) among those that the type's ranking does not
    name and that were not drawn before. Where a ranking takes the strongest genes, those left are weaker.

    Returns
    -------
    For each of `n_draws`, type -> as many genes, in the order of those they stand for. A ValueError if there are too few
    other genes, or no cells of a type.
    """
    x, labels = _read(adata, label_key)
    random, draws = np.random.default_rng(seed), [{} for _ in range(n_draws)]
    for kind, genes in ranking.items():
        if not (labels == kind).any():
            raise ValueError(f"No training cell is {kind}: rank its genes on cells that have the label.")
        level = pd.Series(np.asarray(x[labels == kind].mean(0)).ravel(), adata.var_names)
        if 2 * len(genes) > len(level):
            raise ValueError(f"{len(genes)} of {len(level)} genes leave too few to draw from: rank fewer.")
        for drawn in draws:
            others, drawn[kind] = level.drop(list(genes)), []
            for gene in genes:
                near = (others - level[gene]).abs().nsmallest(n_nearest).index
                drawn[kind].append(str(random.choice(near)))
                others = others.drop(drawn[kind][-1])
    return draws


def delete_genes(
    predict: Callable,
    adata: anndata.AnnData,
    ranking: Mapping[str, Sequence[str]],
    labels: Sequence[str],
    numbers: Sequence[int],
    *,
    others: bool = False,
) -> pd.DataFrame:
    """Set the counts of the first genes of each cell's own type to zero, and see what becomes of its probability.

    `predict` is that of any method, see `scbert.methods`; `adata` are counts of test cells and `labels`, (cells,), their
    true types; `ranking` is type -> genes, the most important first, and `numbers` how many of them to delete. With `others`
    all but these are deleted, so that their counts alone are inserted. All cells are predicted in one call.

    Returns
    -------
    A row a cell and number: cell, type, number, `probability` of the true type, and `intact`, that of the cell as it
    is. Totals of counts stay those of the whole cell, so the tokens of other genes stay as they are.

    A ValueError if a label has no ranking or is unknown to the method, or a gene is lacking.

    Paper: not in it; Extended Data Fig. 1b deletes markers before training, another question.
    """
    labels = np.asarray(labels, dtype=str)
    if len(labels) != adata.n_obs:
        raise ValueError(f"There are {len(labels)} labels for {adata.n_obs} cells: give one for each cell.")
    missing = sorted(set(labels) - set(ranking))
    if missing:
        raise ValueError(f"The ranking has no genes for {', '.join(missing)}: rank each type of these cells.")
    kinds = sorted(set(labels))
    order = [adata.var_names.get_indexer(list(ranking[kind])) for kind in kinds]
    if min(map(len, order)) < max(numbers) or min(numbers) < 1:
        raise ValueError(f"Rankings of {min(map(len, order))} genes can't answer for {list(numbers)}: rank more genes.")
    if any((columns < 0).any() for columns in order):
        raise ValueError("A ranking names a gene that these cells lack: rank the genes of the data.")
    row, columns = pd.Index(kinds).get_indexer(labels), np.concatenate(order)
    rank = np.concatenate([np.arange(len(genes)) for genes in order])  # of each gene in its type's ranking, from 0
    kind = np.repeat(np.arange(len(kinds)), [len(genes) for genes in order])

    def change(values):
        values, versions = sparse.csr_matrix(values), [sparse.csr_matrix(values)]
        for number in numbers:
            first = rank < number
            entries = np.ones(first.sum(), values.dtype), (kind[first], columns[first])
            named = values.multiply(sparse.csr_matrix(entries, shape=(len(kinds), adata.n_vars))[row]).tocsr()
            versions.append(named if others else values - named)
            versions[-1].eliminate_zeros()
        return sparse.vstack(versions, format="csr")

    n_versions = 1 + len(numbers)  # all are predicted in one call, the cells as they are first
    names = [f"{cell}|{number}" for number in (0, *numbers) for cell in adata.obs_names]
    obs = pd.DataFrame({"n_counts": np.tile(library_size(adata), n_versions)}, index=names)
    changed = anndata.AnnData(change(adata.X), obs=obs, var=pd.DataFrame(index=adata.var_names))
    if "bins" in adata.layers:  # the same tokens as anew, since totals stay; and cells may be left without one
        changed.layers["bins"] = change(adata.layers["bins"])
        changed.uns["scbert"] = {"tokenize": dict(adata.uns["scbert"]["tokenize"])}
    probabilities = predict(changed)
    check_known(labels, probabilities.columns)
    column = np.tile(probabilities.columns.get_indexer(labels), n_versions)
    true = probabilities.to_numpy()[np.arange(len(column)), column].reshape(n_versions, -1)  # (versions, cells)
    table = {
        "cell": np.tile(adata.obs_names, len(numbers)), "type": np.tile(labels, len(numbers)),
        "number": np.repeat(numbers, adata.n_obs), "probability": true[1:].ravel(),
        "intact": np.tile(true[0], len(numbers)),
    }  # fmt: skip
    return pd.DataFrame(table)


def judge_rankings(
    judges: Mapping[str, Callable],
    adata: anndata.AnnData,
    rankings: Mapping[str, Sequence[Mapping[str, Sequence[str]]]],
    labels: Sequence[str],
    numbers: Sequence[int],
) -> pd.DataFrame:
    """Delete and insert the genes of several rankings, and ask several judges (name -> predict); see `delete_genes`.

    `rankings` is name -> one or several of type -> genes, such as the draws of `match_genes`. Returns the tables of
    `delete_genes` with the columns judge, ranking, draw and kind, "deletion" or "insertion".
    """
    rows = []
    for judge, predict in judges.items():
        for name, draws in rankings.items():
            for draw, ranking in enumerate(draws):
                for kind in ("deletion", "insertion"):
                    table = delete_genes(predict, adata, ranking, labels, numbers, others=kind == "insertion")
                    rows.append(table.assign(judge=judge, ranking=name, draw=draw, kind=kind))
    return pd.concat(rows, ignore_index=True)


def judge_trainings(
    trained: Mapping[int, Callable],
    regression: Callable,
    scores: pd.DataFrame,
    train: anndata.AnnData,
    cells: anndata.AnnData,
    numbers: Sequence[int],
    label_key: str = "cell_type",
) -> pd.DataFrame:
    """Delete and insert the first genes of each training's rankings, and random ones; ask it and logistic regression.

    `trained` is seed -> what `fit_scbert` returned, and `regression` what `fit_logistic_regression` returned. To the
    rankings of `scores`, from `score_genes`, a ranking "random" is added: two draws of `match_genes` for the genes of
    "attention", by their levels in `train`. `cells` are tested. `numbers` beyond half of the genes are left out.

    Returns the table of `judge_rankings`, judges "scbert" and "logistic_regression", with the column seed.
    """
    truth, curves = cells.obs[label_key].astype(str).to_numpy(), {}
    if max(numbers) > cells.n_vars // 2:
        print(f"Numbers beyond half of the {cells.n_vars} genes are left out.")
        numbers = [number for number in numbers if number <= cells.n_vars // 2] or [1]
    for seed, predict in trained.items():
        own = split_scores(scores[scores["seed"] == seed], "ranking")
        orders = {ranking: [order_genes(table, max(numbers))] for ranking, table in own.items()}
        orders["random"] = match_genes(orders["attention"][0], train, label_key, n_draws=2, seed=seed)
        judges = {"scbert": predict, "logistic_regression": regression}
        curves[seed] = judge_rankings(judges, cells, orders, truth, numbers)
    return pd.concat(curves, names=["seed"]).reset_index("seed")


def measure_areas(
    curves: pd.DataFrame, *, against: str | None = None, by_number: bool = False, seed: int = 0
) -> pd.DataFrame:
    """Measure the share of the true type's probability that is left, averaged over the numbers of genes.

    Small is good for deletion, large for insertion.

    Parameters
    ----------
    curves
        Tables of `judge_rankings`, or of `delete_genes` with the column ranking. Within a judge and kind, all rankings are
        of the same cells and seeds, else a ValueError.
    against
        A ranking: return its area less that of each other ranking, with the interval of the difference.
    by_number
        Return the share at each number, in place of their mean.
    seed
        Fixes the resampling, over cells within types and over seeds, the same for all rankings, see `draw_weights`.

    Returns
    -------
    A row a judge, kind and ranking (and number): value, the mean probability over that of the cells as they are, low, high
    (95 %), n (cells) and seeds. The index names the metric: "scbert:random/deletion_area". With `against` intervals are
    corrected for the number of other rankings, and `verdict` says whether its genes matter more.
    """
    defaults = {"judge": "", "kind": "deletion", "seed": 0}
    curves = curves.assign(**{name: value for name, value in defaults.items() if name not in curves})
    numbers = ["number"] if by_number else []
    rows = []
    for (judge, kind), part in curves.groupby(GROUP, sort=False):
        names, seeds = list(dict.fromkeys(part["ranking"])), part["seed"].unique()
        if against is not None and against not in names:
            raise ValueError(f"There is no ranking {against!r}: there are {', '.join(names)}.")
        means = part.groupby([*numbers, "ranking", "seed", "cell"])[["probability", "intact"]].mean()
        wide = means.unstack("cell")
        if wide.isna().any(axis=None) or len(means.groupby(["ranking", "seed"])) != len(names) * len(seeds):
            raise ValueError("Rankings can be compared on the same cells and seeds only: some are missing in one.")
        types = part.drop_duplicates("cell").set_index("cell")["type"].reindex(wide["intact"].columns)
        strata = pd.factorize(types)[0]
        sizes = types.map(types.value_counts()).to_numpy()
        for number, block in wide.groupby("number") if by_number else [(None, wide)]:
            left, intact = (  # (rankings, seeds, cells), rankings and seeds in the order of their names
                block[column].to_numpy().reshape(len(names), len(seeds), -1) for column in ("probability", "intact")
            )
            order = sorted(names)
            drawn = np.concatenate(
                [_divide(left, intact, *w) for w in draw_weights(strata, sizes, len(seeds), seed, 2000)]
            )  # (resamples, rankings)
            value = _divide(left, intact, np.ones((1, len(types))), np.ones((1, len(seeds))))[0]
            for name in names:
                i = order.index(name)
                here, spread = value[i], drawn[:, i]
                if against is not None:
                    base = order.index(against)
                    here, spread = value[base] - here, drawn[:, base] - spread
                tail = 0.025 if against is None else 0.025 / (len(names) - 1)  # corrected for the number of rivals
                low, high = np.quantile(spread, [tail, 1 - tail])
                row = {"judge": judge, "kind": kind, "ranking": name} | ({"number": number} if by_number else {})
                row |= {"value": here, "low": low, "high": high, "n": len(types), "seeds": len(seeds)}
                if against is not None:  # of what is left, less is more in deletion
                    row["verdict"] = decide(*((-high, -low) if kind == "deletion" else (low, high)))
                rows += [row] if name != against else []
    table = pd.DataFrame(rows)
    named = table["ranking"] if against is None else against
    table.index = table["judge"] + ":" + named + "/" + table["kind"] + "_area"
    if against is not None:
        table.index += "_minus_" + table["ranking"]
    return table.rename_axis("metric")


def _divide(left, intact, of_cells, of_seeds):
    """Weigh cells and seeds, (resamples, cells) and (resamples, seeds): return (resamples, rankings)."""
    sums = (np.einsum("rc,ksc,rs->rk", of_cells, values, of_seeds, optimize=True) for values in (left, intact))
    return np.divide(*sums)


def say_verdicts(areas: pd.DataFrame, differences: pd.DataFrame, judge: str = "scbert") -> str:
    """Say in a sentence whether the first genes of attention matter when deleted, and to which rivals they lose.

    Both tables are from `measure_areas`, `differences` against "attention"; `judge` is whose probabilities are asked.
    """
    left = areas[(areas["judge"] == judge) & (areas["kind"] == "deletion")].set_index("ranking")["value"]
    rivals = differences[(differences["judge"] == judge) & (differences["kind"] == "deletion")].set_index("ranking")
    chance = rivals.loc["random", "verdict"]
    matter = {"ahead": "matter", "behind": "matter less than chance", "not decided": "are not shown to matter"}[chance]
    named = {
        words: ", ".join(rivals.index[(rivals["verdict"] == verdict) & (rivals.index != "random")])
        for verdict, words in (("ahead", "ahead of"), ("not decided", "not decided against"), ("behind", "behind"))
    }
    against = "; ".join(f"{words} {names}" for words, names in named.items() if names)
    return (
        f"The genes of high attention {matter}: deleting them leaves {left['attention']:.2f} of the true type's "
        f"probability, deleting others as strongly expressed {left['random']:.2f}; as a ranking, attention is {against}."
    )
