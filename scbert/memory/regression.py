"""Logistic regression as arrays: fitted by scikit-learn, its penalty chosen on validation cells, and what it says of cells.

The arrays: ``logistic_regression`` (labels, genes + 1), weights and the intercept last; ``one_vs_rest`` (), whether each
label was fitted against the rest. They are all that prediction needs, in a bundle as in a benchmark.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.special import expit, log_expit, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.multiclass import OneVsRestClassifier

PENALTIES, STRENGTHS = ("l1", "l2"), (0.01, 0.1, 1.0, 10.0)


def fit_regression(
    x: sparse.csr_matrix,
    y: np.ndarray,
    x_validation: sparse.csr_matrix,
    truth: np.ndarray,
    *,
    penalties: Sequence[str] = PENALTIES,
    strengths: Sequence[float] = STRENGTHS,
    class_weight: str | None = None,
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], str]:
    """Fit logistic regression on log-normalised counts, penalty and strength C chosen on validation cells.

    Labels are numbers from 0, (cells,), each of which is among `y`. L1 is one label against the rest by liblinear, as in
    Boiarsky et al. 2023; L2 is multinomial. The best macro-F1 on validation cells wins, ties go to the smaller loss.
    Returns the arrays, and the choice in words.
    """
    best = None
    for penalty in penalties:
        for strength in strengths:
            options = {"C": strength, "class_weight": class_weight}
            if penalty == "l1":
                model = LogisticRegression(penalty="l1", solver="liblinear", random_state=seed, **options)
                model = OneVsRestClassifier(model)
            else:
                model = LogisticRegression(max_iter=1000, **options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # validation judges the fit, converged or not
                model.fit(x, y)
            parts = model.estimators_ if penalty == "l1" else [model]
            weights = np.vstack([np.hstack([part.coef_, part.intercept_[:, None]]) for part in parts])
            if len(weights) == 1:  # two labels: one row stands for both
                weights = np.vstack([-weights if penalty == "l1" else 0 * weights, weights])
            arrays = {"logistic_regression": weights, "one_vs_rest": np.array(penalty == "l1")}
            probabilities = predict_regression(arrays, x_validation)
            loss = -np.log(probabilities[np.arange(len(truth)), truth].clip(1e-12)).mean()
            macro_f1 = score_labels(truth, probabilities.argmax(1))[1]
            if best is None or (macro_f1, -loss) > best[0]:
                best = (macro_f1, -loss), arrays, f"{penalty}, C={strength:g}"
    return best[1:]


def read_logits(arrays: dict[str, np.ndarray], x: sparse.csr_matrix) -> np.ndarray:
    """Return logits, (cells, labels); of each label against the rest, the logarithm of its "yes".

    Their softmax is what `predict_regression` returns.
    """
    decision = _decide(arrays, x)
    return log_expit(decision) if arrays["one_vs_rest"] else decision


def predict_regression(arrays: dict[str, np.ndarray], x: sparse.csr_matrix) -> np.ndarray:
    """Return probabilities, (cells, labels), of log-normalised counts (cells, genes)."""
    decision = _decide(arrays, x)
    if not arrays["one_vs_rest"]:
        return softmax(decision, axis=1)
    shares = expit(decision)
    return shares / np.maximum(shares.sum(1, keepdims=True), 1e-300)


def _decide(arrays, x):
    weights = np.asarray(arrays["logistic_regression"])
    return x @ weights[:, :-1].T + weights[:, -1]


def score_labels(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Return accuracy and macro-F1, over the labels that are true somewhere, of predicted labels."""
    macro_f1 = f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
    return float(accuracy_score(truth, predicted)), float(macro_f1)
