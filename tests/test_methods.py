"""Methods that behave: they learn what can be learnt and nothing else."""

import logging
import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import anndata
import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

import scbert
from scbert import benchmark, methods, tuning

ONCE = scbert.Recipe(until_converged=False)  # the epochs that were asked for, from one head
METHODS = ["logistic_regression", "nearest_centroid", "knn_pca", "knn_harmony", "celltypist", "singler", "scanvi"]
ODD = {"B": "B/plasma | 50 %", "Monocyte": " CD14+ 'mono', naïve", "T/NK": "_1.0"}


@pytest.fixture
def parts(make_cells):
    """Training, validation and test cells of labels that are easily told apart."""
    return [scbert.preprocess.tokenize(make_cells(n, seed=seed)) for seed, n in enumerate((60, 24, 30))]


@pytest.fixture(params=METHODS)
def fit(request):
    """Each method that learns; CI has none of the optional packages."""
    module, package, _ = methods.NEEDS.get(request.param, ("sklearn", "scikit-learn", ""))
    if find_spec(module) is None:
        pytest.skip(f"{package} is not installed")
    options = {
        "logistic_regression": {"strengths": (0.1, 1.0)},
        "scanvi": {"max_epochs": (30, 30)},
    }.get(request.param, {})
    return partial(methods.FITS[request.param], label_key="cell_type", **options)


def accuracy_of(predict, adata):
    return (predict(adata).idxmax(axis=1).to_numpy() == adata.obs["cell_type"].to_numpy()).mean()


def test_lognormalize_is_log1p_of_counts_per_10000_of_all_measured_genes(parts):
    expected = np.log1p(parts[0].X.toarray() / 2000 * 10_000)
    assert scbert.preprocess.lognormalize(parts[0]).toarray() == pytest.approx(expected)


def test_the_majority_says_the_commonest_label_with_its_share(parts):
    train, validation, test = parts
    train = train[np.flatnonzero((train.obs["cell_type"] == "Monocyte") | (np.arange(60) < 30))]
    predict = methods.fit_majority(train, validation, label_key="cell_type")
    assert set(predict(test).idxmax(axis=1)) == {"Monocyte"}
    assert predict(test).drop_duplicates().to_dict("records") == [{"Monocyte": 0.5, "B": 0.25, "T/NK": 0.25}]


def test_logistic_regression_learns_labels_that_can_be_told_apart(parts):
    train, validation, test = parts
    predict = methods.fit_logistic_regression(train, validation, label_key="cell_type")
    assert accuracy_of(predict, test) > 0.95
    assert predict(test).sum(axis=1).tolist() == pytest.approx([1] * 30)
    assert predict.chosen.split(", C=")[0] in ("l1", "l2")


def test_each_method_learns_labels_that_can_be_told_apart(parts, fit):
    train, validation, test = parts
    probabilities = fit(train, validation)(test)
    assert list(probabilities.columns) == ["B", "Monocyte", "T/NK"]
    assert list(probabilities.index) == list(test.obs_names)
    assert (probabilities.idxmax(axis=1).to_numpy() == test.obs["cell_type"].to_numpy()).mean() > 0.9


def test_no_method_learns_labels_drawn_by_lot(make_cells, fit):
    parts = [scbert.preprocess.tokenize(make_cells(n, seed=seed)) for seed, n in enumerate((60, 24, 150))]
    for seed, adata in enumerate(parts):
        adata.obs["cell_type"] = np.random.default_rng(seed).permutation(adata.obs["cell_type"].to_numpy())
    train, validation, test = parts
    assert 0.2 < accuracy_of(fit(train, validation), test) < 0.47  # a third, and 3.5 standard errors


def test_probabilities_of_each_method_are_some_and_sum_to_one_even_of_a_cell_without_counts(parts, fit):
    train, validation, test = parts
    test.X = test.X.toarray() * (np.arange(30) != 3)[:, None]
    probabilities = fit(train, validation)(test).to_numpy()
    assert (probabilities >= 0).all()
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(30), abs=1e-9)


def test_each_method_comes_to_the_same_probabilities_with_the_same_seed(parts, fit):
    train, validation, test = parts
    first = fit(train.copy(), validation, seed=3)(test)
    np.random.random(5)
    pd.testing.assert_frame_equal(first, fit(train, validation, seed=3)(test))


def test_each_method_leaves_the_cells_it_is_given_as_they_were(parts, fit):
    train, validation, test = parts
    before = [adata.copy() for adata in parts]
    fit(train, validation)(test)
    for adata, was in zip(parts, before, strict=True):
        pd.testing.assert_frame_equal(adata.obs, was.obs)
        assert (adata.X != was.X).nnz == 0
        assert list(adata.uns) == list(was.uns)
        assert list(adata.var) == list(was.var)


def test_each_method_still_names_a_label_that_no_validation_cell_has(parts, fit):
    train, validation, test = parts
    predict = fit(train, validation[(validation.obs["cell_type"] != "B").to_numpy()].copy())
    assert accuracy_of(predict, test) > 0.9


def test_each_method_can_do_with_a_single_training_cell_of_a_label(parts, fit):
    train, validation, test = parts
    is_b = (train.obs["cell_type"] == "B").to_numpy()
    probabilities = fit(train[~is_b | (is_b.cumsum() == 1)].copy(), validation)(test)
    assert list(probabilities.columns) == ["B", "Monocyte", "T/NK"]
    known = (test.obs["cell_type"] != "B").to_numpy()
    guess = probabilities.idxmax(axis=1).to_numpy()
    assert (guess == test.obs["cell_type"].to_numpy())[known].mean() > 0.8


def test_each_method_can_do_with_a_gene_that_only_test_cells_express(parts, fit):
    train, validation, test = parts
    for adata in (train, validation):
        adata.X = adata.X.toarray() * (np.arange(24) != 7)
    assert accuracy_of(fit(train, validation), test) > 0.9


def test_each_method_gives_labels_with_odd_characters_back_as_they_are(parts, fit):
    for adata in parts:
        adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).map(ODD)
    train, validation, test = parts
    probabilities = fit(train, validation)(test)
    assert list(probabilities.columns) == sorted(ODD.values())
    assert (probabilities.idxmax(axis=1).to_numpy() == test.obs["cell_type"].to_numpy()).mean() > 0.9


def test_each_method_tells_two_labels_apart(parts, fit):
    train, validation, test = (adata[(adata.obs["cell_type"] != "B").to_numpy()].copy() for adata in parts)
    predict = fit(train, validation)
    assert list(predict(test).columns) == ["Monocyte", "T/NK"]
    assert accuracy_of(predict, test) > 0.9


def test_each_method_says_what_is_wrong_with_labels(parts, fit):
    train, validation, _ = parts
    with pytest.raises(ValueError, match="The training set has no column 'celltype' in obs"):
        fit(train, validation, label_key="celltype")
    with pytest.raises(ValueError, match=r"has one value only \(B\): there is nothing to tell apart"):
        fit(train[(train.obs["cell_type"] == "B").to_numpy()], validation)


@pytest.mark.parametrize("name", ["logistic_regression", "nearest_centroid"])
def test_validation_cells_that_cannot_choose_are_refused(parts, name):
    train, validation, _ = parts
    fit = partial(methods.FITS[name], label_key="cell_type")
    with pytest.raises(ValueError, match="Validation cells have labels that no training cell has: B"):
        fit(train[(train.obs["cell_type"] != "B").to_numpy()], validation)
    with pytest.raises(ValueError, match="There are no validation cells"):
        fit(train, validation[:0])


def test_balanced_logistic_regression_finds_more_of_the_rare_label(make_cells):
    train, validation, test = (make_cells(n, seed=seed, labels=("rare", "common")) for seed, n in enumerate((80,) * 3))
    for adata in (train, validation, test):
        adata.X = np.random.default_rng(0).binomial(adata.X.toarray().astype(int), 0.05)  # hard to tell apart
    train = train[(train.obs["cell_type"] == "common").to_numpy() | (np.arange(80) < 16)]
    for penalty in ("l1", "l2"):
        fit = partial(
            methods.fit_logistic_regression, train, validation, label_key="cell_type", penalties=[penalty],
            strengths=[0.1],
        )  # fmt: skip
        found = [(fit(class_weight=weight)(test).idxmax(axis=1) == "rare").sum() for weight in (None, "balanced")]
        assert found[0] < 0.6 * found[1]


def test_nearest_centroid_measures_the_cosine_with_the_mean_profile(parts, monkeypatch):
    train, validation, test = parts
    monkeypatch.setattr(methods, "TEMPERATURES", [0.1])
    predict = methods.fit_nearest_centroid(train, validation, label_key="cell_type")
    x, label = np.log1p(train.X.toarray() * 5.0, dtype=np.float64), train.obs["cell_type"].to_numpy()
    cell = np.log1p(test.X[0].toarray().ravel() * 5.0, dtype=np.float64)
    means = [x[label == name].mean(0) for name in ("B", "Monocyte", "T/NK")]
    cosines = np.array([cell @ mean / np.linalg.norm(cell) / np.linalg.norm(mean) for mean in means])
    expected = np.exp(cosines / 0.1) / np.exp(cosines / 0.1).sum()
    assert predict(test).iloc[0].to_numpy() == pytest.approx(expected)


def test_the_temperature_is_the_one_of_least_log_loss_on_validation_cells(parts, monkeypatch):
    train, validation, test = parts
    fit = partial(methods.fit_nearest_centroid, train, validation, label_key="cell_type")
    column = pd.Index(["B", "Monocyte", "T/NK"]).get_indexer(validation.obs["cell_type"])
    losses, labels, chosen, temperatures = {}, [], fit().chosen, methods.TEMPERATURES
    for temperature in temperatures:
        monkeypatch.setattr(methods, "TEMPERATURES", [temperature])
        predict = fit()
        losses[temperature] = -np.log(predict(validation).to_numpy()[np.arange(24), column]).mean()
        labels.append(list(predict(test).idxmax(axis=1)))
    assert chosen == f"temperature={min(losses, key=losses.get)}"
    monkeypatch.setattr(methods, "TEMPERATURES", temperatures[::-1])
    assert fit().chosen == chosen
    assert all(other == labels[0] for other in labels)  # it moves no cell to another label


def test_labels_drawn_by_lot_choose_the_temperature_that_is_least_sure(parts):
    train, validation, _ = parts
    validation.obs["cell_type"] = np.random.default_rng(0).permutation(validation.obs["cell_type"].to_numpy())
    predict = methods.fit_nearest_centroid(train, validation, label_key="cell_type")
    assert predict.chosen == "temperature=1"


def test_neighbours_vote_where_the_encoder_puts_cells_and_validation_cells_choose_how_many(parts, config):
    train, validation, test = parts
    encoder = scbert.ScBert(config, genes=list(train.var_names)).eval()
    chosen = benchmark.choose_methods("knn_scbert", encoder)["knn_scbert"]
    predict = chosen(train, validation, label_key="cell_type")
    number = int(predict.chosen.removeprefix("neighbours="))
    there, here, asked = (scbert.embed(encoder, adata) for adata in (train, test, validation))
    labels = train.obs["cell_type"].astype(str).to_numpy()

    def vote(cell, n):
        nearest = np.argsort(((there - cell) ** 2).sum(1))[:n]
        return pd.Series(labels[nearest]).value_counts(normalize=True)

    for i in range(3):
        shares = predict(test).iloc[i]
        assert shares[shares > 0].sort_index().to_dict() == pytest.approx(vote(here[i], number).to_dict())
    names = np.array(sorted(set(labels)))
    reached = {}
    for n in methods.NEIGHBOURS:
        said = [names[np.argmax([vote(cell, n).get(name, 0) for name in names])] for cell in asked]
        reached[n] = f1_score(validation.obs["cell_type"].astype(str), said, average="macro")
    assert number == max(reached, key=reached.get)
    with pytest.raises(ValueError, match="knn_scbert needs an encoder that is pretrained before"):
        benchmark.choose_methods("knn_scbert", config)


def test_neighbours_in_pca_are_those_of_scikit_learn(parts):
    train, validation, test = parts
    predict = methods.fit_neighbours(train, validation, label_key="cell_type")
    pca = PCA(23, random_state=0).fit(scbert.preprocess.lognormalize(train).toarray())
    there, here = (pca.transform(scbert.preprocess.lognormalize(adata).toarray()) for adata in (train, test))
    number = int(predict.chosen.removeprefix("neighbours="))
    own = KNeighborsClassifier(number).fit(there, train.obs["cell_type"].astype(str))
    assert predict(test).to_numpy() == pytest.approx(own.predict_proba(here))


def test_celltypist_is_celltypists_own_model_with_probabilities_that_share_one(parts):
    pytest.importorskip("celltypist")
    import celltypist

    train, validation, test = parts
    predict = methods.fit_celltypist(train, validation, label_key="cell_type")
    cells = [anndata.AnnData(np.log1p(adata.X.toarray() * 5), adata.obs[["cell_type"]]) for adata in (train, test)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = celltypist.train(cells[0], labels="cell_type", check_expression=False, random_state=0)
        own = celltypist.annotate(cells[1], model=model).probability_matrix
    assert predict(test).to_numpy() == pytest.approx(own.div(own.sum(axis=1), axis=0).to_numpy(), abs=1e-4)


def test_the_most_probable_label_is_singlers_own_after_fine_tuning(make_cells):
    singler = pytest.importorskip("singler")
    train, validation, test = (make_cells(n, n_genes=60, seed=seed) for seed, n in enumerate((60, 24, 200)))
    for adata in (train, validation, test):
        adata.X = np.random.default_rng(0).binomial(adata.X.toarray().astype(int), 0.15).astype(float)
    predict = methods.fit_singler(train, validation, label_key="cell_type")
    x = [np.asfortranarray(scbert.preprocess.lognormalize(adata).toarray().T) for adata in (train, test)]
    reference = singler.train_single(x[0], list(train.obs["cell_type"]), list(train.var_names))
    result = singler.classify_single(x[1], reference)
    scores = np.column_stack([result["scores"][label] for label in reference.labels])
    first = np.array(list(reference.labels))[scores.argmax(1)]
    assert (first != np.array(list(result["best"]))).any()  # fine-tuning changes some
    assert list(predict(test).idxmax(axis=1)) == list(result["best"])


def test_scanvi_refuses_fractional_counts(parts):
    if find_spec("scvi") is None:
        pytest.skip("scvi-tools is not installed")
    train, validation, _ = parts
    train.X = train.X * 0.5
    with pytest.raises(ValueError, match="scANVI models whole counts, and X holds fractional values"):
        methods.fit_scanvi(train, validation, label_key="cell_type")


def test_a_package_that_is_not_installed_is_one_sentence_before_any_work(monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    for name, package, extra in [
        ("celltypist", "celltypist", "baselines"), ("singler", "singler", "baselines"), ("scanvi", "scvi-tools", "scvi"),
    ]:  # fmt: skip
        sentence = f"{package} is not installed: pip install -c requirements.lock 'scbert-companion[{extra}]'."
        for call in (partial(methods.FITS[name], None, None, label_key=""), partial(methods.check_methods, [name])):
            with pytest.raises(ValueError) as error:
                call()
            assert str(error.value) == sentence
    methods.check_methods(["majority", "logistic_regression", "nearest_centroid"])


def test_the_extras_named_for_a_missing_package_hold_it():
    from importlib.metadata import requires

    for _, package, extra in methods.NEEDS.values():
        assert any(line.startswith(package) and f'extra == "{extra}"' in line for line in requires("scbert-companion"))


def test_an_unknown_method_is_refused_with_those_there_are():
    with pytest.raises(ValueError) as error:
        methods.check_methods(["majority", "scbert", "svm"], also=["scbert"])
    assert str(error.value) == (
        "There is no method 'svm': choose from majority, logistic_regression, nearest_centroid, knn_pca, knn_harmony, "
        "celltypist, singler, scanvi, scbert."
    )
    with pytest.raises(ValueError, match="no method 'scbert'"):
        methods.check_methods(["scbert"])


def test_silencing_a_package_leaves_warnings_and_logging_of_others_alone():
    root, own = logging.getLogger(), logging.getLogger("a_package")
    before = root.level, list(root.handlers), own.level, list(warnings.filters)
    with pytest.raises(KeyError), methods._silenced("a_package"):
        assert not own.isEnabledFor(logging.WARNING)
        root.setLevel(logging.DEBUG)
        root.addHandler(logging.NullHandler())
        warnings.simplefilter("ignore", UserWarning)
        raise KeyError
    assert (root.level, list(root.handlers), own.level, list(warnings.filters)) == before


@pytest.fixture
def uneven(make_cells):
    """Tokenized cells: 20 B, 8 monocytes, 2 T/NK."""
    cells = scbert.preprocess.tokenize(make_cells())
    number = cells.obs.groupby("cell_type", observed=True).cumcount().to_numpy()
    most = cells.obs["cell_type"].astype(str).map({"B": 20, "Monocyte": 8, "T/NK": 2}).to_numpy()
    return cells[number < most].copy()


def count_labels(adata):
    return adata.obs["cell_type"].value_counts().to_dict()


def test_subsampling_leaves_as_many_cells_of_each_label_as_the_smallest_has(uneven):
    less = methods.rebalance(uneven, label_key="cell_type", how="subsample")
    assert count_labels(less) == {"B": 2, "Monocyte": 2, "T/NK": 2}
    assert less.obs_names.is_unique
    assert (
        (less.X != uneven[less.obs_names].X).nnz
        == (less.layers["bins"] != uneven[less.obs_names].layers["bins"]).nnz
        == 0
    )


def test_oversampling_keeps_all_cells_and_draws_more_of_small_labels(uneven):
    more = methods.rebalance(uneven, label_key="cell_type", how="oversample")
    assert count_labels(more) == {"B": 20, "Monocyte": 20, "T/NK": 20}
    assert list(more.obs_names[:30]) == list(uneven.obs_names)
    assert more.obs_names.is_unique
    origin = more.obs_names.str.replace(r"-copy\d+$", "", regex=True)
    assert set(origin[30:]) <= set(uneven.obs_names[(uneven.obs["cell_type"] != "B").to_numpy()])
    assert (more.X.toarray() == uneven[origin].X.toarray()).all()
    assert (more.layers["bins"].toarray() == uneven[origin].layers["bins"].toarray()).all()
    assert list(more.obs["n_counts"]) == [2000] * 60


@pytest.mark.parametrize("how", ["subsample", "oversample"])
def test_the_seed_fixes_what_rebalancing_draws(uneven, how):
    before = uneven.copy()
    names = [list(methods.rebalance(uneven, label_key="cell_type", how=how, seed=seed).obs_names) for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]
    pd.testing.assert_frame_equal(uneven.obs, before.obs)


def test_rebalancing_says_what_it_cannot_do(uneven):
    with pytest.raises(ValueError, match="how must be 'subsample' or 'oversample', not 'smote'"):
        methods.rebalance(uneven, label_key="cell_type", how="smote")
    with pytest.raises(ValueError, match="The training set has no column 'label' in obs"):
        methods.rebalance(uneven, label_key="label", how="subsample")


@pytest.mark.parametrize(("how", "n_cells"), [("subsample", 6), ("oversample", 60)])
def test_any_method_can_be_fitted_on_rebalanced_cells(uneven, more_cells, how, n_cells):
    seen = []

    def fit_spy(train, validation, *, label_key, seed):
        seen.append((train.n_obs, count_labels(train).values(), validation, seed))
        return methods.fit_nearest_centroid(train, validation, label_key=label_key, seed=seed)

    fit = partial(methods.fit_rebalanced, fit=fit_spy, how=how)
    predict = fit(uneven, more_cells, label_key="cell_type", seed=4)
    assert predict.chosen.startswith("temperature=")
    [(n_seen, counts, validation, seed)] = seen
    assert (n_seen, len(set(counts)), seed) == (n_cells, 1, 4)
    assert validation is more_cells


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_validation_cells_choose_penalty_and_strength(parts, penalty):
    train, validation, _ = parts
    fit = partial(methods.fit_logistic_regression, train, validation, label_key="cell_type", penalties=[penalty])
    assert fit(strengths=[1e-6, 1.0]).chosen == f"{penalty}, C=1"  # the first leaves nothing to tell labels by
    assert fit(strengths=[1.0, 1e-6]).chosen == f"{penalty}, C=1"


def test_l1_leaves_out_genes_that_l2_keeps(parts):
    train, validation, test = parts
    n_used = {}
    for penalty in ("l1", "l2"):
        fit = methods.fit_logistic_regression
        predict = fit(train, validation, label_key="cell_type", penalties=[penalty], strengths=[0.05])
        moved = []
        for gene in range(24):
            other = test.copy()
            other.X = other.X.toarray()
            other.X[:, gene] += 1
            moved.append(not np.allclose(predict(other), predict(test), atol=1e-12))
        n_used[penalty] = sum(moved)
    assert n_used["l1"] < n_used["l2"] == 24


def test_fit_scbert_learns_and_leaves_the_given_encoder_as_it_was(parts, config):
    train, validation, test = parts
    encoder = scbert.ScBert(config)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    predict = methods.fit_scbert(
        train, validation, label_key="cell_type", encoder=encoder, pretrain_epochs=1, n_epochs=12,
        progress=False,
    )  # fmt: skip
    assert all((tensor == before[name]).all() for name, tensor in encoder.state_dict().items())
    assert accuracy_of(predict, test) > 0.6
    assert predict.classifier.labels == ["B", "Monocyte", "T/NK"]


def test_fit_scbert_continues_from_its_checkpoints(parts, config, tmp_path):
    train, validation, _ = parts
    fit = partial(
        methods.fit_scbert, train, validation, label_key="cell_type", encoder=config, pretrain_epochs=1, n_epochs=1,
        checkpoints=tmp_path, progress=False, recipe=ONCE,
    )  # fmt: skip
    first, again = fit().classifier.state_dict(), fit().classifier.state_dict()
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["finetune.pt", "pretrain.pt"]
    assert all((tensor == again[name]).all() for name, tensor in first.items())


def test_fit_scbert_hands_its_options_to_finetune(parts, config):
    train, validation, _ = parts
    options = {
        "n_epochs": 3, "patience": 2, "batch_size": 3, "accumulate": 5, "learning_rate": 3e-3, "progress": False
    }  # fmt: skip
    fit = partial(methods.fit_scbert, train, validation, label_key="cell_type", encoder=config, seed=1)
    predict = fit(**options)
    expected = scbert.finetune(
        scbert.ScBert(config, seed=1), train, label_key="cell_type", validation=validation, seed=1, **options
    )
    assert all(
        (tensor == predict.classifier.state_dict()[name]).all() for name, tensor in expected.state_dict().items()
    )
    pd.testing.assert_frame_equal(predict.history, expected.history)


def test_fit_scbert_counts_the_cells_it_learnt_from(parts, config):
    train, validation, _ = parts
    fit = partial(
        methods.fit_scbert,
        train,
        validation,
        label_key="cell_type",
        encoder=config,
        n_epochs=9,
        progress=False,
        recipe=ONCE,
    )
    stopped = fit(learning_rate=1e-12, patience=2, pretrain_epochs=1)  # no epoch is better than the first
    assert len(stopped.history) == 3
    assert stopped.cell_steps == 60 * (3 + 1)
    assert fit(learning_rate=1e-12, patience=1).cell_steps == 60 * 2
    heads = fit(learning_rate=1e-12, patience=1, recipe=scbert.Recipe())
    assert heads.cell_steps == 60 * 2 * 3  # of all heads that were tried


def test_few_cells_get_epochs_until_the_least_number_of_steps(parts, config):
    train, validation, _ = parts
    fit = partial(
        methods.fit_scbert, train, validation, label_key="cell_type", encoder=config, n_epochs=2, batch_size=16,
        learning_rate=1e-12, progress=False, recipe=ONCE,
    )  # fmt: skip
    assert fit(patience=9).cell_steps == 60 * 2
    assert fit(patience=9, min_steps=8).cell_steps == 60 * 2  # of four steps each
    assert fit(patience=9, min_steps=9).cell_steps == 60 * 3
    assert fit(patience=9, min_steps=9, accumulate=2).cell_steps == 60 * 5
    assert fit(patience=1, min_steps=36).cell_steps == 60 * (1 + 3)  # a third of nine epochs without a better one
    assert fit(patience=1, n_epochs=9).cell_steps == 60 * (1 + 1)


# What a method reads out of cells


READ_OUT = {
    "majority": methods.fit_majority,
    "nearest_centroid": methods.fit_nearest_centroid,
    "l1": partial(methods.fit_logistic_regression, penalties=["l1"], strengths=[1.0]),
    "l2": partial(methods.fit_logistic_regression, penalties=["l2"], strengths=[0.1]),
    "balanced": partial(methods.fit_logistic_regression, strengths=[0.1], class_weight="balanced"),
    "celltypist": methods.fit_celltypist,
    "singler": methods.fit_singler,
    "scanvi": partial(methods.fit_scanvi, max_epochs=(3, 3)),
    "scbert": partial(methods.fit_scbert, n_epochs=3, learning_rate=1e-2, progress=False),
}


@pytest.mark.parametrize("n_labels", [2, 3])
@pytest.mark.parametrize("name", READ_OUT)
def test_the_softmax_of_what_is_read_out_are_the_methods_probabilities(make_cells, config, name, n_labels):
    module, package, _ = methods.NEEDS.get(name, ("sklearn", "scikit-learn", ""))
    if find_spec(module) is None:
        pytest.skip(f"{package} is not installed")
    parts = [
        scbert.preprocess.tokenize(make_cells(n, seed=seed, labels=("B", "Monocyte", "T/NK")[:n_labels]))
        for seed, n in enumerate((60, 24, 30))
    ]
    for adata in parts:  # hard to tell apart, so that probabilities are of all sizes
        adata.X = np.random.default_rng(0).binomial(adata.X.toarray().astype(int), 0.3).astype(np.float32)
        adata.X[:, 0] += 1
    parts[2].X[3] = 0  # a cell without counts
    train, validation, test = map(scbert.preprocess.tokenize, parts)
    fit = partial(READ_OUT[name], encoder=config) if name == "scbert" else READ_OUT[name]
    predict = fit(train[2:].copy(), validation, label_key="cell_type")
    logits, vectors = methods.read_out(predict, test)
    probabilities = predict(test)
    assert list(logits.columns) == list(probabilities.columns)
    assert list(logits.index) == list(test.obs_names)
    x = np.exp(logits.to_numpy(np.float64) - logits.to_numpy(np.float64).max(1, keepdims=True))
    assert x / x.sum(1, keepdims=True) == pytest.approx(probabilities.to_numpy(), abs=1e-6)
    assert (logits.to_numpy().argmax(1) == probabilities.to_numpy().argmax(1)).all()
    assert (vectors is None) == (name != "scbert")
    if name != "majority":
        assert probabilities.max(axis=1).std() > 0.001  # or all of this says little


@pytest.mark.parametrize("n_labels", [2, 3])
@pytest.mark.parametrize("name", ["l1", "celltypist"])
def test_of_each_label_against_the_rest_logits_are_the_logarithms_of_each_ones_yes(make_cells, name, n_labels):
    if name == "celltypist":
        pytest.importorskip("celltypist", reason="celltypist is not installed")
    parts = [make_cells(n, seed=seed, labels=("B", "M", "T")[:n_labels]) for seed, n in enumerate((60, 24, 30))]
    train, validation, test = parts
    predict = READ_OUT[name](train, validation, label_key="cell_type")
    yes = np.exp(methods.read_out(predict, test)[0])
    x, x_test = (np.log1p(adata.X.toarray() * 5.0) for adata in (train, test))
    if name == "l1":
        labels = train.obs["cell_type"].to_numpy()
        for label in yes.columns[-1:] if n_labels == 2 else yes.columns:  # of two, the other is what is left
            model = LogisticRegression(penalty="l1", C=1.0, solver="liblinear", random_state=0).fit(x, labels == label)
            assert yes[label].to_numpy() == pytest.approx(model.predict_proba(x_test)[:, 1], abs=1e-5)
    else:
        import celltypist

        with methods._silenced("celltypist.logger"):
            cells = [anndata.AnnData(m.astype(np.float32), a.obs) for m, a in ((x, train), (x_test, test))]
            model = celltypist.train(cells[0], labels="cell_type", check_expression=False, random_state=0)
            own = celltypist.annotate(cells[1], model=model).probability_matrix
        assert yes.to_numpy() == pytest.approx(own[list(yes.columns)].to_numpy(), abs=1e-4)
    if n_labels == 2:
        assert yes.sum(axis=1).to_numpy() == pytest.approx(np.ones(30))
    else:
        assert np.ptp(yes.sum(axis=1).to_numpy()) > 0.05


def test_what_is_read_out_of_a_cell_depends_on_no_other_cell(parts):
    train, validation, test = parts
    for name in ("nearest_centroid", "l1", "l2"):
        predict = READ_OUT[name](train, validation, label_key="cell_type")
        logits, _ = methods.read_out(predict, test)
        alone, _ = methods.read_out(predict, test[[7, 2]].copy())
        pd.testing.assert_frame_equal(alone, logits.iloc[[7, 2]])


def test_what_logistic_regression_reads_out_stays_a_number_where_it_is_very_sure(parts):
    train, validation, test = parts
    for penalty in ("l1", "l2"):
        predict = methods.fit_logistic_regression(
            train, validation, label_key="cell_type", penalties=[penalty], strengths=[1e6]
        )
        sure = test.copy()
        sure.X = np.where(test.X.toarray() > 3, 2000, 0)
        sure.obs["n_counts"] = np.maximum(sure.X.sum(1), 1)
        logits, _ = methods.read_out(predict, sure)
        probabilities = scbert.kept.to_probabilities(logits).to_numpy()
        assert np.isfinite(logits.to_numpy(np.float32)).all()
        assert probabilities == pytest.approx(predict(sure).to_numpy(), abs=1e-6)
        assert probabilities.max(1).max() > 1 - 1e-12


# Methods of a notebook


@pytest.fixture
def saved_encoder(config, tmp_path):
    """The bundle of an encoder of 24 genes, of which the cells of `make_cells` have all or some."""
    scbert.ScBert(config, seed=5, genes=[f"gene{i}" for i in range(24)]).save(tmp_path / "own")
    return tmp_path / "own"


def test_an_encoder_is_taken_with_its_genes_where_the_data_have_half_of_them(saved_encoder, make_cells, capsys):
    for n_genes, share in ((30, "100%"), (12, "50%")):
        cells = make_cells(n_genes=n_genes)
        adata, encoder, genes = benchmark.choose_encoder(str(saved_encoder), cells)
        assert adata is cells
        assert isinstance(encoder, scbert.ScBert)
        assert not encoder.config.expressed_only  # read as it was pretrained
        assert genes == [f"gene{i}" for i in range(24)]
        assert f"{share} of the 24 genes of {saved_encoder} are in the data\n" in capsys.readouterr().out
    before = scbert.load(saved_encoder).state_dict()
    assert all((tensor == before[name]).all() for name, tensor in encoder.state_dict().items())


def test_else_it_is_a_small_one_of_the_most_variable_genes(saved_encoder, make_cells, capsys):
    cells = make_cells(n_genes=11)
    adata, *few = benchmark.choose_encoder(str(saved_encoder), cells)
    assert adata is cells
    assert "46% of the 24 genes" in (out := capsys.readouterr().out)
    assert "too few, so scBERT is pretrained on the training cells of each split instead" in out
    small = scbert.ScBertConfig(11, dim=32, depth=2, heads=4, dim_head=16, expressed_only=True)
    assert few == [small, "11"]
    assert benchmark.choose_encoder("", cells)[1:] == (small, "11")
    assert capsys.readouterr().out == ""
    _, config, genes = benchmark.choose_encoder("", make_cells(n_genes=1100))
    assert (config.n_genes, genes) == (1000, "1000")
    assert isinstance(benchmark.choose_encoder(str(saved_encoder), cells, least=0.4)[1], scbert.ScBert)


def test_an_encoder_of_the_published_genes_reads_all_genes_under_the_names_that_it_knows(
    saved_encoder, make_cells, monkeypatch
):
    published, cells = [f"gene{i}" for i in range(24)], make_cells()
    renamed = cells.copy()
    cells.var_names = [f"old{i}" for i in range(24)]
    monkeypatch.setattr(benchmark, "is_published", lambda genes: genes == published)
    known = {(tuple(cells.var_names), tuple(published)): renamed}
    monkeypatch.setattr(benchmark, "rename_genes", lambda adata, genes: known[tuple(adata.var_names), tuple(genes)])
    adata, encoder, genes = benchmark.choose_encoder(str(saved_encoder), cells)
    assert adata is renamed
    assert genes == published
    assert not encoder.config.expressed_only


def test_an_encoder_that_is_not_there_is_refused(make_cells):
    with pytest.raises(ValueError, match="There is no bundle or file nowhere"):
        benchmark.choose_encoder("nowhere", make_cells())


@pytest.fixture
def named(config):
    """An untrained encoder that has its genes' names."""
    return scbert.ScBert(config, genes=[f"gene{i}" for i in range(24)])


def options_of(fit):
    return {"func": fit.func, **fit.keywords}


def test_scbert_starts_from_the_encoder_or_is_pretrained_first_where_there_is_none(named, config):
    least = {"func": methods.fit_scbert, "n_epochs": 4, "min_steps": 120}
    chosen = benchmark.choose_methods("scbert majority scbert_scratch", named, n_epochs=4)
    assert chosen["majority"] is methods.fit_majority
    assert options_of(chosen["scbert"]) == least | {"encoder": named, "pretrain_epochs": 0}
    assert options_of(chosen["scbert_scratch"]) == least | {"encoder": config}
    chosen = benchmark.choose_methods("scbert scbert_scratch", config, n_epochs=4)
    assert options_of(chosen["scbert"]) == least | {"encoder": config, "pretrain_epochs": 4}
    assert options_of(chosen["scbert_scratch"]) == least | {"encoder": config}


def test_the_methods_named_keep_their_order_after_those_that_no_table_is_without(named):
    chosen = benchmark.choose_methods("scbert nearest_centroid majority nearest_centroid", named)
    assert list(chosen) == ["logistic_regression", "scbert", "nearest_centroid", "majority"]
    assert list(benchmark.choose_methods("", named)) == ["majority", "logistic_regression", "scbert"]


@pytest.mark.parametrize(("n_epochs", "expected"), [(3, 15), (20, 20)])
def test_the_published_recipe_has_the_epochs_that_its_rate_takes_to_rise(named, n_epochs, expected):
    fit = benchmark.choose_methods("scbert_published", named, n_epochs=n_epochs)["scbert_published"]
    assert options_of(fit) == {
        "func": methods.fit_scbert, "n_epochs": expected, "recipe": scbert.Recipe.published(), "encoder": named,
        "pretrain_epochs": 0,
    }  # fmt: skip


def test_the_published_weights_are_tuned_at_the_published_rate_and_to_the_letter_on_request(named, monkeypatch):
    monkeypatch.setattr(benchmark, "is_published", lambda genes: genes == named.genes)
    chosen = benchmark.choose_methods("scbert scbert_scratch scbert_published scbert_letter", named, n_epochs=4)
    sound, scratch, published, letter = (fit.keywords for fit in list(chosen.values())[2:])
    assert sound["learning_rate"] == 1e-4
    script = {"patience": 10, "batch_size": 3, "accumulate": 60, "learning_rate": 1e-4}
    assert letter == script | {
        "n_epochs": 100, "recipe": scbert.Recipe.published(), "encoder": named, "pretrain_epochs": 0
    }  # fmt: skip
    frozen = replace(scbert.Recipe.published(), redraw_features=False, key_stabiliser="head")
    assert published == letter | {"n_epochs": 40, "recipe": frozen, "cache": "float16"}


def test_the_published_weights_read_expressed_genes_but_under_the_published_recipe(named, monkeypatch):
    monkeypatch.setattr(benchmark, "is_published", lambda genes: genes == named.genes)
    chosen = benchmark.choose_methods("scbert scbert_scratch scbert_published", named)
    assert chosen["scbert"].keywords["encoder"].config.expressed_only
    assert chosen["scbert_scratch"].keywords["encoder"].expressed_only
    assert chosen["scbert_published"].keywords["encoder"] is named
    assert not named.config.expressed_only


def test_tuned_scbert_is_scbert_under_the_settings_that_validation_cells_choose(named):
    chosen = benchmark.choose_methods("scbert scbert_tuned", named, n_epochs=4)
    tuned = options_of(chosen["scbert_tuned"])
    assert tuned.pop("func") is tuning.fit_tuned
    assert options_of(tuned.pop("fit")) == options_of(chosen["scbert"])
    assert tuned == {}


def test_the_published_recipe_without_redraws_keeps_what_its_frozen_layers_yield(cells, more_cells):
    config = scbert.ScBertConfig(n_genes=24, dim=8, depth=3, heads=2, dim_head=4)
    frozen = replace(scbert.Recipe.published(), redraw_features=False, key_stabiliser="head")
    options = {"label_key": "cell_type", "encoder": config, "n_epochs": 3, "recipe": frozen, "progress": False}
    kept, again = (methods.fit_scbert(cells, more_cells, cache=cache, **options) for cache in ("float16", None))
    np.testing.assert_allclose(kept(more_cells), again(more_cells), atol=1e-3)


def test_from_random_weights_the_given_vectors_of_genes_stay(config):
    vectors = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    config = replace(config, gene_embedding="frozen")
    encoder = scbert.ScBert(config, seed=9, gene_vectors=vectors, genes=[f"gene{i}" for i in range(24)])
    scratch = benchmark.choose_methods("scbert_scratch", encoder)["scbert_scratch"].keywords["encoder"]
    assert (scratch.pos_emb.emb.weight[:-1].numpy() == vectors).all()
    assert not (scratch.token_emb.weight == encoder.token_emb.weight).any()


def test_a_name_that_is_no_method_is_refused_with_those_there_are(named):
    with pytest.raises(
        ValueError,
        match=r"There is no method 'svm': choose from majority, .*, scbert_tuned, knn_scbert, scbert_published, scbert_letter\.",
    ):
        benchmark.choose_methods("majority svm", named)


def test_remedies_change_the_weight_of_cells_or_which_cells_train_and_nothing_else(named):
    chosen = benchmark.choose_methods("majority logistic_regression scbert scbert_scratch", named)
    more = benchmark.add_remedies(chosen)
    assert list(more)[:4] == list(chosen)
    assert set(list(more)[4:]) == {
        f"{name}:{how}" for name in ("scbert", "logistic_regression") for how in ("class_weight", "subsample", "oversample")
    }  # fmt: skip
    assert all(more[name] is chosen[name] for name in chosen)
    assert options_of(more["scbert:class_weight"]) == options_of(chosen["scbert"]) | {
        "recipe": scbert.Recipe(class_weight="balanced")
    }
    assert options_of(more["logistic_regression:class_weight"]) == {
        "func": methods.fit_logistic_regression, "class_weight": "balanced"
    }  # fmt: skip
    for name in ("scbert", "logistic_regression"):
        for how in ("subsample", "oversample"):
            expected = {"func": methods.fit_rebalanced, "fit": chosen[name], "how": how}
            assert options_of(more[f"{name}:{how}"]) == expected
    assert benchmark.add_remedies({"majority": methods.fit_majority}) == {"majority": methods.fit_majority}


def test_each_remedy_finds_more_of_the_rare_label(make_cells):
    many = scbert.preprocess.tokenize(make_cells(400, labels=("B", "T/NK")))
    many.X = (
        np.random.default_rng(0).binomial(many.X.toarray().astype(int), 0.1).astype(np.float32)
    )  # hard to tell apart
    rare = (many.obs["cell_type"] == "T/NK").to_numpy()
    number = np.arange(400) // 2
    train, validation = many[~rare & (number < 100) | rare & (number < 4)], many[(number >= 180)]
    test = many[(number >= 100) & (number < 180)]
    base = {"logistic_regression": partial(methods.fit_logistic_regression, penalties=["l2"], strengths=[0.1])}
    recall = {}
    for name, fit in benchmark.add_remedies(base).items():
        predict = fit(train.copy(), validation.copy(), label_key="cell_type")
        predicted = predict(test).idxmax(axis=1).to_numpy()
        recall[name] = (predicted[test.obs["cell_type"] == "T/NK"] == "T/NK").mean()
    plain = recall.pop("logistic_regression")
    assert len(recall) == 3
    assert min(recall.values()) > plain + 0.2
