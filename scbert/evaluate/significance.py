"""What a difference between methods is worth: tests over few trainings, corrections, ranks, and what can't be decided."""

import math

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from .metrics import check_predictions, resample_paired, score_trainings


def compare_all(
    predictions: pd.DataFrame,
    reference: str = "scbert",
    metric: str = "accuracy",
    *,
    test_train_ratio: float | str | None = None,
    sizes: pd.Series | None = None,
    rare: int = 20,
    level: float = 0.05,
    seed: int = 0,
    n_resamples: int = 5000,
) -> pd.DataFrame:
    """Compare a method with each other one, on the same cells and trainings.

    Three looks at each difference: the paired bootstrap of `scbert.metrics.score`, and over trainings, a pair a repeat
    and fold, `corrected_t_test` and `wilcoxon_test`. The verdict is that of the bootstrap, at the level divided by the
    number of comparisons (Bonferroni): it counts cells, where the Wilcoxon test of five pairs can't fall below 0.0625.
    The limits that are returned are those of the verdict. With one repeat it is about these trained models alone; the t-test
    asks about other trainings.

    Parameters
    ----------
    predictions, sizes, rare
        As in `scbert.metrics.score`.
    reference, metric
        The method that is compared with all others, and one of `scbert.metrics.METRICS`.
    test_train_ratio
        Test cells per training cell, or the column of `predictions` that holds it (its mean is taken), for the
        t-test. 1 / (folds - 1) if None, and no t-test where there is one fold.
    level, seed, n_resamples
        Of the verdict, and of the bootstrap: an adjusted interval has few resamples beyond it, so take thousands.

    Returns
    -------
    A row for each other method: value (reference minus other), low, high (corrected), n (cells), repeats, trainings, t_p,
    t_p_holm, wilcoxon_p, wilcoxon_p_holm, wilcoxon_p_smallest (of so many pairs), and verdict, said of the reference, see
    `decide`. A test that is not defined is NaN and no part of Holm's correction. ``.attrs``: reference, metric, level.

    A ValueError if the methods were not tested on the same cells, or there is only one.

    Paper: Fig. 2a and Results, where P values are far below what a Wilcoxon test of five folds can reach.
    """
    table = check_predictions(predictions)
    methods = list(table["method"].unique())
    others = [method for method in methods if method != reference]
    if methods == [reference]:
        raise ValueError(f"There is only {reference}: nothing to compare it with.")
    options = {"sizes": sizes, "rare": rare, "seed": seed, "n_resamples": n_resamples}
    values, drawn = resample_paired(table, [reference, *methods], metric, **options)
    trainings = score_trainings(table, sizes=sizes, rare=rare)
    trainings = trainings.pivot(index=["repeat", "fold"], columns="method", values=metric).dropna()
    ratio = test_train_ratio
    if isinstance(ratio, str):
        ratio = float(table[ratio].mean())
    elif ratio is None:
        n_folds = table.groupby("repeat")["fold"].nunique().min()
        ratio = 1 / (n_folds - 1) if n_folds > 1 else math.nan
    rows = {}
    tails = level / len(others) / 2
    for other in others:
        difference = drawn[reference] - drawn[other]
        low, high = np.nanquantile(difference, [tails, 1 - tails])
        pairs = (trainings[reference] - trainings[other]).to_numpy()
        rows[other] = {
            "value": values[reference] - values[other],
            "low": low,
            "high": high,
            "n": table["cell"].nunique(),
            "repeats": table["repeat"].nunique(),
            "trainings": len(pairs),
            "t_p": corrected_t_test(pairs, ratio),
            "wilcoxon_p": wilcoxon_test(pairs),
            "wilcoxon_p_smallest": smallest_wilcoxon_p(len(pairs)),
            "verdict": decide(low, high),
        }
    found = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    for column in ("t_p", "wilcoxon_p"):
        found.insert(found.columns.get_loc(column) + 1, f"{column}_holm", correct_by_holm(found[column]))
    found.attrs = {"reference": reference, "metric": metric, "level": level}
    return found


def decide(low: float, high: float) -> str:
    """Say "ahead" or "behind" of a difference whose interval excludes zero, else "not decided"; the one rule of all notebooks.

    The interval is over cells and, where there are several, trainings, corrected for the number of rivals shown.
    """
    return "ahead" if low > 0 else "behind" if high < 0 else "not decided"


def corrected_t_test(differences: np.ndarray, test_train_ratio: float) -> float:
    """Return the two-sided p of the corrected resampled t-test; NaN for one difference, or if all are the same.

    Trainings share cells, so the variance of their mean is taken as (1/k + test cells / training cells) times that
    between them, in place of 1/k times (Nadeau and Bengio 2003, Machine Learning 52:239-281).
    """
    k = len(differences)
    if k < 2 or np.ptp(differences) < 1e-12:
        return math.nan
    variance = (1 / k + test_train_ratio) * np.var(differences, ddof=1)
    return float(2 * stats.t.sf(abs(np.mean(differences)) / math.sqrt(variance), k - 1))


def wilcoxon_test(differences: np.ndarray) -> float:
    """Return the exact two-sided p of the Wilcoxon signed-rank test; NaN for one difference, or if all are zero.

    Zeros are left out and ties share their mean rank. The p is exact with ties too, and accuracies of folds have many.
    ``scipy.stats.wilcoxon`` gives the same, but counts the signs one by one where ranks are tied: with scipy 1.17, 0.7 s for
    12 pairs, 170 s for 20; by default its normal approximation is up to five times off. Here sums of ranks are counted.
    """
    differences = np.round(differences, 12)  # equal shares of cells are equal
    kept = differences[differences != 0]
    if len(differences) < 2 or not len(kept):
        return math.nan
    ranks = np.round(2 * stats.rankdata(np.abs(kept))).astype(int)  # doubled, so whole with ties
    ways = np.zeros(ranks.sum() + 1)  # of each sum of ranks, as a share of all signs
    ways[0] = 1
    for rank in ranks:
        ways[rank:] = ways[rank:] / 2 + ways[:-rank] / 2
        ways[:rank] /= 2
    positive = ranks[kept > 0].sum()
    return float(min(1, 2 * ways[: min(positive, ranks.sum() - positive) + 1].sum()))


def smallest_wilcoxon_p(n_pairs: int) -> float:
    """Return 2 / 2**n_pairs, the two-sided p where all differences have one sign; NaN for one pair."""
    return 2.0 ** (1 - n_pairs) if n_pairs > 1 else math.nan


def correct_by_holm(p: pd.Series) -> np.ndarray:
    """Return p values corrected for their number by Holm's method; NaN stays, and counts for nothing."""
    corrected, known = np.full(len(p), math.nan), p.notna().to_numpy()
    if known.any():
        corrected[known] = multipletests(p[known], method="holm")[1]
    return corrected


def rank_methods(scores: pd.DataFrame, *, level: float = 0.05) -> pd.DataFrame:
    """Rank methods over blocks, with the Friedman test and Nemenyi's critical difference.

    Scores are blocks (sets, studies or splits that share no cells) x methods, higher is better; none may be missing.

    Returns
    -------
    A row a method, best first: mean_rank (1 is best, ties share), first (blocks in which no other is better).
    ``.attrs``: blocks; friedman_p (NaN for two methods or one block); friedman_p_smallest, that of blocks which all
    agree; critical_difference between mean ranks; largest_difference there can be, methods - 1; blocks_needed, the
    fewest with which a critical difference can be exceeded at all; and level.

    Demsar 2006, Journal of Machine Learning Research 7:1-30.
    """
    blocks, methods = scores.shape
    if methods < 2:
        raise ValueError("One method cannot be ranked: give a column for each of several.")
    if scores.isna().any(axis=None) or not blocks:
        missing = scores.columns[scores.isna().any()] if blocks else scores.columns
        raise ValueError(f"No score of {', '.join(map(str, missing))} in some block: drop the block or the method.")
    ranks = scores.round(12).rank(axis=1, ascending=False)
    friedman = smallest = math.nan
    if methods > 2 and blocks > 1:
        smallest = float(stats.chi2.sf(blocks * (methods - 1), methods - 1))
        if (ranks.nunique(axis=1) > 1).any():
            friedman = float(stats.friedmanchisquare(*ranks.to_numpy().T).pvalue)
    quantile = stats.studentized_range.ppf(1 - level, methods, math.inf) / math.sqrt(2)
    spread = quantile**2 * methods * (methods + 1) / 6
    found = pd.DataFrame({"mean_rank": ranks.mean(), "first": ranks.eq(ranks.min(axis=1), axis=0).sum()})
    found = found.rename_axis("method").sort_values("mean_rank", kind="stable")
    found.attrs = {
        "blocks": blocks,
        "friedman_p": friedman,
        "friedman_p_smallest": smallest,
        "critical_difference": float(math.sqrt(spread / blocks)),
        "largest_difference": methods - 1,
        "blocks_needed": math.floor(spread / (methods - 1) ** 2) + 1,
        "level": level,
    }
    return found


def say_limits(comparison: pd.DataFrame) -> str:
    """Say in words what a table of `compare_all` decides, and which differences its cells and trainings can't show.

    The smallest difference that can be told from zero is half the width of its adjusted interval.
    """
    metric, reference = comparison.attrs["metric"].replace("_", " ").replace("f1", "F1"), comparison.attrs["reference"]
    row, many = comparison.iloc[0], len(comparison)
    halves = (comparison["high"] - comparison["low"]) / 2
    halves = halves[halves > 0].sort_values()
    over = f" over {many} comparisons" if many > 1 else ""
    trainings = f"{row['trainings']} training{'s' if row['trainings'] > 1 else ''} a method"
    sentences = [f"{row['n']:,} test cells and {trainings}"]
    if len(halves):
        sizes = dict.fromkeys(f"{half:.2g}" for half in (halves.iloc[0], halves.iloc[-1]))
        sizes = " to ".join(sizes) + (" (by method)" if len(sizes) > 1 else "")
        sentences[0] += f": a difference in {metric} below about {sizes} can't be told from zero{over}"
    smallest = row["wilcoxon_p_smallest"]
    if np.isnan(smallest):
        sentences[0] += "; one pair allows no test over trainings."
    else:
        corrected = f", and {min(1, smallest * many):.3g} after Holm's correction" if many > 1 else ""
        sentences[0] += f"; {row['trainings']} pairs give a Wilcoxon p no smaller than {smallest:.3g}{corrected}."
    words = {"ahead": "ahead of", "behind": "behind", "not decided": "not decided against"}
    found = {verdict: ", ".join(comparison.index[comparison["verdict"] == verdict]) for verdict in words}
    decided = "; ".join(f"{words[verdict]} {names}" for verdict, names in found.items() if names)
    sentences.append(f"At {1 - comparison.attrs['level']:.0%}{over}, {reference} is {decided}.")
    if row["repeats"] == 1:
        sentences.append(
            "Without repeats this is about these trained models, not about what another training would give."
        )
    return " ".join(sentences)
