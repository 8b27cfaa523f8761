"""What embeddings keep: against scikit-learn, brute force, Harmony's own LISI, and embeddings whose answer is known."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

import scbert
from scbert import batch_effect, embeddings, protocols
from scbert.annotate import embed
from scbert.sources.simulate import simulate_studies

FAST = {"resolutions": (0.05, 1.0)}


@pytest.fixture(autouse=True)
def _few_subsamples(monkeypatch):
    monkeypatch.setattr(embeddings, "N_SUBSAMPLES", 5)


@pytest.fixture(scope="module")
def blobs():
    """240 cells of three types and two studies, types apart by 3 standard deviations and studies by 1.5."""
    random = np.random.default_rng(0)
    label, batch = np.arange(240) % 3, np.arange(240) // 3 % 2
    place = random.normal(size=(240, 5))
    place[:, 0] += 3 * label
    place[:, 1] += 1.5 * batch
    return place, np.array(list("abc"))[label], np.array(["one", "two"])[batch]


@pytest.fixture(scope="module")
def measured(blobs):
    return embeddings.measure_mixing(*blobs, **FAST)


def nearest(place, k):
    """Return the numbers of the k nearest others, by sorting all distances."""
    distances = metrics.pairwise_distances(place)
    np.fill_diagonal(distances, np.inf)
    return distances.argsort(1)[:, :k], np.sort(distances, 1)[:, :k]


# Each metric against another way to compute it


def test_silhouettes_are_scikit_learns_scaled_as_scib_does(blobs, measured):
    place, labels, batches = blobs
    assert measured.loc["label_silhouette", "value"] == pytest.approx((metrics.silhouette_score(place, labels) + 1) / 2)
    within = [
        1 - np.abs(metrics.silhouette_samples(place[labels == label], batches[labels == label])).mean()
        for label in "abc"
    ]
    assert measured.loc["batch_silhouette", "value"] == pytest.approx(np.mean(within))


def test_purity_and_mixing_are_those_of_a_brute_force_count(blobs, measured):
    place, labels, batches = blobs
    near, _ = nearest(place, 15)
    purity = np.mean([np.mean(labels[near[i]] == labels[i]) for i in range(240)])
    assert measured.loc["label_purity", "value"] == pytest.approx(purity)
    found = due = 0.0
    for label in "abc":
        own, batch = place[labels == label], batches[labels == label]
        near, _ = nearest(own, 15)
        for i in range(len(own)):
            found += np.mean(batch[near[i]] != batch[i])
            due += np.mean(np.delete(batch, i) != batch[i])
    assert measured.loc["batch_mixing", "value"] == pytest.approx(found / due)


def test_lisi_of_neighbours_at_one_distance_is_the_inverse_simpson_index():
    neighbours = np.tile(np.arange(1, 7), (1, 1))
    lisi = embeddings.measure_lisi(np.ones((1, 6)), neighbours, ["x", "a", "a", "a", "b", "b", "c"])
    assert lisi == pytest.approx([1 / ((3 / 6) ** 2 + (2 / 6) ** 2 + (1 / 6) ** 2)])


@pytest.mark.parametrize("n", [32, 90, 240])
def test_lisi_is_the_one_of_harmony(blobs, n):
    harmonypy = pytest.importorskip("harmonypy", reason="the reference for LISI is harmonypy")
    place, labels, batches = (part[:n] for part in blobs)
    groups = pd.DataFrame({"label": labels, "batch": batches})
    both = harmonypy.compute_lisi(place, groups, ["label", "batch"], min(30, (n - 1) / 3))
    near = embeddings.find_neighbours(place, 90)
    np.testing.assert_allclose(embeddings.measure_lisi(*near, labels), both[:, 0], rtol=1e-3)
    np.testing.assert_allclose(embeddings.measure_lisi(*near, batches), both[:, 1], rtol=1e-3)
    found = embeddings.measure_mixing(place, labels, batches, **FAST)["value"]
    assert found["label_lisi"] == pytest.approx((3 - np.median(both[:, 0])) / 2, rel=1e-3)
    assert found["batch_lisi"] == pytest.approx(np.median(both[:, 1]) - 1, rel=1e-3)


def test_the_sweep_agrees_with_scanpy_clusters_and_holds_each_value_in_its_interval(blobs):
    import anndata
    import scanpy

    place, labels, _ = blobs
    sweep = embeddings.sweep_clusters(place, labels, (0.1, 1.0, 2.0), seed=3)
    light = anndata.AnnData(place.astype(np.float32))
    scanpy.pp.neighbors(light, n_neighbors=15, use_rep="X", random_state=3)
    scanpy.tl.leiden(light, resolution=2.0, flavor="igraph", n_iterations=2, directed=False, random_state=3)
    assert sweep["clusters"].iloc[2] == light.obs["leiden"].nunique()
    assert sweep["ari"].iloc[2] == pytest.approx(metrics.adjusted_rand_score(labels, light.obs["leiden"]))
    assert sweep["nmi"].iloc[2] == pytest.approx(metrics.normalized_mutual_info_score(labels, light.obs["leiden"]))
    assert sweep["clusters"].is_monotonic_increasing and sweep["clusters"].iloc[2] > sweep["clusters"].iloc[0]
    for name in ("ari", "nmi"):
        assert (sweep[f"{name}_low"] <= sweep[name]).all() and (sweep[name] <= sweep[f"{name}_high"]).all()
    assert (sweep["n"] == 240).all()


# Embeddings whose answer is known


def make_extreme(types_apart, studies_apart, n=400):
    random = np.random.default_rng(1)
    label, batch = np.arange(n) % 2, np.arange(n) // 2 % 2
    place = random.normal(size=(n, 4))
    place[:, 0] += 100 * types_apart * label
    place[:, 1] += 100 * studies_apart * batch
    return place, label.astype(str), batch.astype(str)


def test_types_apart_and_studies_mixed_is_the_best_there_is():
    found = embeddings.measure_mixing(*make_extreme(True, False), **FAST)["value"]
    assert found[["label_purity", "label_lisi", "nmi_best", "ari_best"]].tolist() == pytest.approx([1] * 4)
    assert found["label_silhouette"] > 0.95
    assert found["batch_mixing"] == pytest.approx(1, abs=0.05)
    assert found["batch_silhouette"] > 0.95
    assert found["batch_lisi"] > 0.85


def test_studies_apart_and_types_mixed_is_the_worst():
    found = embeddings.measure_mixing(*make_extreme(False, True), **FAST)["value"]
    assert found["label_silhouette"] == pytest.approx(0.5, abs=0.02)
    assert found["label_purity"] == pytest.approx(0.5, abs=0.03)
    assert found["ari_best"] < 0.05 and found["nmi_best"] < 0.05
    assert found[["batch_mixing", "batch_lisi"]].tolist() == pytest.approx([0, 0])
    assert found["batch_silhouette"] < 0.05
    assert found["label_lisi"] < 0.15


def test_chance_of_mixing_counts_how_many_cells_each_study_has_of_each_type():
    random = np.random.default_rng(2)
    label = np.repeat(["a", "b"], 300)
    batch = np.where(
        random.random(600) < np.where(label == "a", 0.9, 0.2), "one", "two"
    )  # label shift, no other effect
    place = random.normal(size=(600, 4)) + 50 * (label == "a")[:, None]
    found = embeddings.measure_mixing(place, label, batch, **FAST).loc["batch_mixing"]
    assert found["value"] == pytest.approx(1, abs=0.04)
    assert found["low"] < 1 < found["high"]


# Intervals, and what cannot be measured


def test_each_metric_has_an_interval_that_holds_it_and_its_number_of_cells(measured):
    assert measured.index.tolist() == [*embeddings.OF_LABELS, *embeddings.OF_BATCHES]
    assert (measured["low"] <= measured["value"]).all() and (measured["value"] <= measured["high"]).all()
    assert (measured["low"] < measured["high"]).all()
    assert (measured["n"] == 240).all()


def test_the_interval_of_a_mean_is_students_t(monkeypatch):
    values = np.random.default_rng(4).normal(0.5, 0.1, 300)
    monkeypatch.setattr(embeddings, "N_SUBSAMPLES", 400)  # so that chance hardly moves it
    for largest in (150, 60):
        monkeypatch.setattr(embeddings, "LARGEST_SUBSAMPLE", largest)
        found = embeddings.add_intervals(
            pd.Series({"mean": values.mean()}), lambda cells: pd.Series({"mean": values[cells].mean()}), 300
        ).loc["mean"]
        half = 1.966 * values.std(ddof=1) / np.sqrt(300)
        assert found["value"] - found["low"] == pytest.approx(half, rel=0.1)
        assert found["high"] - found["value"] == pytest.approx(half, rel=0.1)


def test_intervals_hold_what_other_draws_of_cells_give(monkeypatch):
    monkeypatch.setattr(embeddings, "N_SUBSAMPLES", 10)

    def measure(seed):
        random = np.random.default_rng(seed)
        label = random.integers(3, size=200)
        place = random.normal(size=(200, 3)) + 2 * label[:, None]

        def purity(cells):
            near = embeddings.find_neighbours(place[cells], 15)[1]
            return pd.Series({"purity": (label[cells][near] == label[cells][:, None]).mean()})

        return embeddings.add_intervals(purity(slice(None)), purity, 200, seed=seed).loc["purity"]

    draws = pd.DataFrame([measure(seed) for seed in range(40)])
    truth = draws["value"].mean()
    held = ((draws["low"] <= truth) & (truth <= draws["high"])).mean()
    assert 0.8 <= held <= 1
    spread = (draws["high"] - draws["low"]).mean() / 2 / 2.26  # Student's t of 9 degrees of freedom
    assert spread == pytest.approx(draws["value"].std(), rel=0.4)


def test_the_same_seed_gives_the_same_table(blobs):
    place, labels, batches = (part[:60] for part in blobs)
    one, same, other = (embeddings.measure_mixing(place, labels, batches, seed=seed, **FAST) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, same)
    assert (one["low"] != other["low"]).any()


def test_a_label_of_one_study_is_no_part_of_the_metrics_within_labels(blobs, measured):
    place, labels, batches = blobs
    batches = np.where(labels == "c", "one", batches)
    found = embeddings.measure_mixing(place, labels, batches, **FAST)
    assert found.loc["batch_mixing", "n"] == found.loc["batch_silhouette", "n"] == 160
    other = labels != "c"
    rest = embeddings.measure_mixing(place[other], labels[other], batches[other], **FAST)
    for metric in ("batch_mixing", "batch_silhouette"):
        assert found.loc[metric, "value"] == pytest.approx(rest.loc[metric, "value"])
    apart = embeddings.measure_mixing(place, labels, np.where(labels == "c", "one", "two"), **FAST)
    assert "batch_lisi" in apart.index and not {"batch_mixing", "batch_silhouette"} & set(apart.index)


def test_one_study_or_one_label_leaves_out_what_is_undefined(blobs):
    place, labels, _ = blobs
    assert embeddings.measure_mixing(place, labels, ["one"] * 240, **FAST).index.tolist() == list(embeddings.OF_LABELS)
    found = embeddings.measure_mixing(place, ["a"] * 240, blobs[2], **FAST)
    assert found.index.tolist() == ["label_purity", *embeddings.OF_BATCHES]


def test_few_cells_are_measured_or_refused_in_one_sentence(blobs):
    place, labels, batches = (part[:32] for part in blobs)
    labels = np.where(np.arange(32) == 5, "rare", labels)  # in some of the subsamples only
    assert np.isfinite(embeddings.measure_mixing(place, labels, batches, **FAST).to_numpy()).all()
    with pytest.raises(ValueError, match="31 cells are too few"):
        embeddings.measure_mixing(place[:31], labels[:31], batches[:31])
    with pytest.raises(ValueError, match="31 cells are too few"):
        embeddings.sweep_clusters(place[:31], labels[:31])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"embedding": np.full((240, 5), np.nan)}, "finite"),
        ({"embedding": np.ones(240)}, "a row a cell"),
        ({"labels": ["a"] * 3}, "240 cells in the embedding and 3 labels"),
        ({"batches": [None] * 240}, "batches are missing"),
        ({"resolutions": (0.0,)}, "above zero"),
    ],
)
def test_what_does_not_fit_is_refused(blobs, change, says):
    with pytest.raises(ValueError, match=says):
        embeddings.measure_mixing(**dict(zip(("embedding", "labels", "batches"), blobs, strict=True)) | change)


def test_intervals_end_where_values_must_and_nowhere_else():
    names = ["label_purity", "ari", "ari_best", "batch_mixing", "batch_lisi"]
    noise = np.random.default_rng(5)

    def measure(cells):
        return pd.Series(noise.normal(0.5, 1, 5), names)

    found = embeddings.add_intervals(pd.Series([1.0, -0.1, 0.9, 1.2, 0.0], names), measure, 100)
    assert found["low"].tolist()[3:] == [0, 0] and found.loc["label_purity", "low"] == 0
    assert (found.loc[["ari", "ari_best"], "low"] < -0.1).all() and found.loc["batch_mixing", "high"] > 1.2
    assert found["high"].tolist()[:3] == [1, 1, 1]


def test_the_average_over_splits_has_the_interval_of_independent_cells(measured):
    random = np.random.default_rng(3)
    tables = []
    for _ in range(4):
        values = random.normal(0.5, 1, 400)
        half = 1.96 * values.std() / 20
        row = {"value": values.mean(), "low": values.mean() - half, "high": values.mean() + half, "n": 400}
        tables.append(pd.DataFrame([row], index=pd.Index(["purity"], name="metric")))
        tables[-1].attrs["values"] = tuple(values)
    found = batch_effect.average_mixing(tables).loc["purity"]
    pooled = np.concatenate([table.attrs["values"] for table in tables])
    assert found["value"] == pytest.approx(pooled.mean())
    assert found["high"] - found["value"] == pytest.approx(1.96 * pooled.std() / 40, rel=0.02)
    assert (found["n"], found["splits"]) == (1600, 4)
    both = batch_effect.average_mixing([measured, measured.drop(index="ari")])
    assert both.loc["ari", "splits"] == 1 and both.loc["nmi", "splits"] == 2
    with pytest.raises(ValueError, match="no table"):
        batch_effect.average_mixing([])


# The embeddings beside scBERT's


def test_pca_is_of_log_normalised_counts_of_these_cells(make_cells):
    adata = make_cells(60, 24)
    found = embeddings.embed_pca(adata, 5)
    logs = scbert.preprocess.lognormalize(adata).toarray()
    u, s, _ = np.linalg.svd(logs - logs.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u * s)[:, :5], atol=1e-4)
    assert embeddings.embed_pca(adata).shape == (60, 23)


def test_harmony_mixes_simulated_studies_better_than_pca_and_keeps_types():
    pytest.importorskip("harmonypy", reason="harmonypy is an extra")
    pbmc = scbert.datasets.load("pbmc68k_reduced")
    studies = simulate_studies(pbmc, n_studies=2, effects=("depth", "capture"))
    label, batch = (studies.obs[column].astype(str).to_numpy() for column in ("cell_type", "study"))
    before = embeddings.embed_pca(studies)
    after = embeddings.correct_by_harmony(before, batch)
    assert after.shape == before.shape and after.dtype == np.float32
    within = [embeddings._measure_within_labels(place, label, batch)["batch_mixing"] for place in (before, after)]
    near = [embeddings.find_neighbours(place, 15)[1] for place in (before, after)]
    purity = [(label[neighbours] == label[:, None]).mean() for neighbours in near]
    assert within[1] > within[0] + 0.2
    assert purity[1] > purity[0] - 0.05
    np.testing.assert_array_equal(embeddings.correct_by_harmony(before, batch), after)


def test_harmony_writes_nothing_to_the_notebook(blobs, capfd):
    pytest.importorskip("harmonypy", reason="harmonypy is an extra")
    embeddings.correct_by_harmony(blobs[0], blobs[2])
    assert capfd.readouterr() == ("", "")


def test_harmony_says_what_it_lacks(blobs, monkeypatch):
    with pytest.raises(ValueError, match="nothing to correct"):
        embeddings.correct_by_harmony(blobs[0], ["one"] * 240)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'scbert-companion"):
        embeddings.correct_by_harmony(blobs[0], blobs[2])


def test_embeddings_of_one_split_are_gathered_on_the_genes_that_the_methods_read(make_cells):
    pytest.importorskip("harmonypy", reason="harmonypy is an extra")
    adata = make_cells(80, 24)
    adata.obs["study"] = np.array(["one", "two"])[np.arange(80) // 40]
    names = adata.obs_names[[*range(70, 80), *range(30)]]
    split = protocols.Split("", 0, 0, adata.obs_names[30:60], adata.obs_names[60:70], names)
    encoder = scbert.ScBert(scbert.ScBertConfig(n_genes=12, dim=8, depth=1, heads=2, dim_head=4))
    encoder.genes = list(adata.var_names[:12])
    cells = pd.DataFrame({"part": "test"}, index=names)
    logits = pd.DataFrame(np.ones((40, 3)), names)
    kept = SimpleNamespace(cells=cells, embedding=np.ones((40, 8), np.float32), logits=logits)
    control = SimpleNamespace(cells=cells, logits=logits)
    job = SimpleNamespace(adata=adata, genes=tuple(encoder.genes), split=split, n_bins=5)
    found = batch_effect.gather_embeddings(job, kept, control, encoder=encoder)
    assert list(found.obsm) == ["pca", "harmony", "scbert_encoder", "scbert", "scbert_logits", "logistic_regression"]
    assert found.obs_names.equals(names) and list(found.var_names) == encoder.genes
    # Counts are per 10,000 of all genes, not of the twelve.
    logs = scbert.preprocess.lognormalize(adata[names])[:, :12].toarray()
    centred = logs - logs.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found.obsm["pca"]), np.abs(u * s)[:, :11], atol=1e-3)
    np.testing.assert_allclose(found.obsm["scbert_encoder"], embed(encoder, adata[names]), rtol=1e-5)
    assert "scbert_encoder" not in batch_effect.gather_embeddings(job, kept, control).obsm
    control.cells = cells[::-1]
    with pytest.raises(ValueError, match="different cells"):
        batch_effect.gather_embeddings(job, kept, control)


def test_scib_metrics_finds_the_same(blobs):
    scib_metrics = pytest.importorskip("scib_metrics", reason="scib-metrics is an extra")
    from scib_metrics.nearest_neighbors import NeighborsResults

    place, labels, batches = blobs

    def near(k):  # the cell itself counts as its first neighbour there
        distances, indices = embeddings.find_neighbours(place, k - 1)
        own, zero = np.arange(len(place))[:, None], np.zeros((len(place), 1))
        return NeighborsResults(indices=np.hstack([own, indices]), distances=np.hstack([zero, distances]))

    few, many = near(15), near(91)
    agree = partial(scib_metrics.nmi_ari_cluster_labels_leiden, seed=0)
    fixed = agree(few, labels, optimize_resolution=False, resolution=1.0)
    theirs = {
        "label_silhouette": scib_metrics.silhouette_label(place, labels),
        "label_lisi": scib_metrics.clisi_knn(many, labels, perplexity=30),
        "batch_silhouette": scib_metrics.silhouette_batch(place, labels, batches),
        "batch_lisi": scib_metrics.ilisi_knn(many, batches, perplexity=30),
    }
    ours = embeddings.measure_mixing(*blobs, resolutions=embeddings.RESOLUTIONS)["value"]
    for metric, value in theirs.items():
        assert value == pytest.approx(ours[metric], abs=2e-3), metric
    clusters = {"nmi": fixed["nmi"], "ari": fixed["ari"], "nmi_best": agree(few, labels)["nmi"]}
    for metric, value in clusters.items():  # clusters differ a little: another graph layout and another seed
        assert value == pytest.approx(ours[metric], abs=0.1), metric


def test_a_sweep_of_several_embeddings_is_that_of_each():
    random = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 30)
    places = {name: random.normal(size=(60, 2)) + 5 * (labels == "b")[:, None] for name in ("one", "two")}
    table = batch_effect.sweep_embeddings(places, labels, [0.5, 1.0])
    for name, own in table.groupby("embedding"):
        expected = embeddings.sweep_clusters(places[name], labels, [0.5, 1.0])
        pd.testing.assert_frame_equal(own.drop(columns="embedding").reset_index(drop=True), expected)
