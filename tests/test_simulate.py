"""Studies made of one set: cells dealt once, counts changed by known factors, and nothing else."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scbert
from scbert import simulate
from scbert.sources.genes import resolve
from scbert.sources.simulate import EFFECTS, equalize_depth, simulate_doses, simulate_studies


@pytest.fixture(scope="module")
def pbmc():
    return scbert.datasets.load("pbmc68k_reduced")


@pytest.fixture
def many(make_cells):
    """900 cells of 30 genes, a quarter of them measured beyond X."""
    adata = make_cells(900, 30)
    adata.obs["n_counts"] = np.asarray(adata.X.sum(1)).ravel() * 4 / 3
    adata.obs["n_counts"] = adata.obs["n_counts"].round()
    return adata


def totals(adata):
    return np.asarray(adata.X.sum(1)).ravel()


def factors(adata):
    return adata.uns["scbert"]["simulate_studies"]


def count_cells(adata, label_key="cell_type"):
    return pd.crosstab(adata.obs["study"], adata.obs[label_key])


# The partition


@pytest.mark.parametrize("effects", [EFFECTS, ("depth",), ()])
@pytest.mark.parametrize("n_studies", [2, 3, 5])
def test_each_cell_is_in_exactly_one_study(pbmc, effects, n_studies):
    studies = simulate_studies(pbmc, n_studies=n_studies, effects=effects)
    assert studies.obs_names.equals(pbmc.obs_names)
    assert studies.obs["study"].cat.categories.tolist() == [f"study_{s}" for s in range(n_studies)]
    assert studies.obs["study"].notna().all()
    assert studies.obs["study"].value_counts().min() >= 5


def test_without_label_shift_each_study_has_its_part_of_each_label(pbmc):
    cells = count_cells(simulate_studies(pbmc, effects=("depth", "capture", "ambient")))
    assert (cells.max() - cells.min()).max() <= 1
    assert cells.sum(axis=1).max() - cells.sum(axis=1).min() <= 1


def test_every_label_keeps_five_cells_in_every_study_however_strong_the_shift(pbmc):
    cells = count_cells(simulate_studies(pbmc, severity=20, effects="labels"))
    common = cells.sum() >= 15
    assert (cells.loc[:, common].min() >= 5).all()
    assert cells["CD4+/CD45RA+/CD25- Naive T"].min() == 2  # of eight


def test_the_shift_of_labels_grows_with_severity(pbmc):
    def shift(severity):
        cells = count_cells(simulate_studies(pbmc, severity=severity, effects="labels"))
        return np.abs(cells / cells.sum() - 1 / 3).to_numpy()[:, cells.sum() >= 30].mean()

    shifts = [shift(severity) for severity in (0, 0.5, 1, 2)]
    assert shifts[0] < 0.02
    assert (np.diff(shifts) > 0.02).all()


# The counts


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_severity_zero_leaves_every_count_as_it_was(pbmc, form):
    source = pbmc.copy()
    if form == "dense":
        source.X = source.X.toarray()
    studies = simulate_studies(source, severity=0)
    assert (studies.X != pbmc.X).nnz == 0
    assert (studies.obs["n_counts"] == pbmc.obs["n_counts"]).all()
    assert studies.obs.drop(columns="study").equals(pbmc.obs)


@pytest.mark.parametrize("effects", [EFFECTS, *EFFECTS])
def test_counts_stay_whole_and_no_cell_is_empty(pbmc, effects):
    studies = simulate_studies(pbmc, severity=1.5, effects=effects)
    assert sparse.isspmatrix_csr(studies.X) and studies.X.dtype == pbmc.X.dtype
    assert (studies.X.data == np.rint(studies.X.data)).all()
    assert studies.X.data.min() >= 1
    assert totals(studies).min() >= 1
    scbert.checks.check_counts(studies, "studies")


@pytest.mark.parametrize("effects", [("depth",), ("capture",), ("depth", "capture", "labels")])
def test_thinning_never_adds_a_count(pbmc, effects):
    studies = simulate_studies(pbmc, effects=effects)
    difference = pbmc.X - studies.X
    assert difference.min() == 0
    assert difference.sum() > 0.2 * pbmc.X.sum()


def test_depth_thins_each_study_by_its_factor_on_all_genes(many):
    studies = simulate_studies(many, effects="depth")
    assert sorted(factors(studies)["depth"]) == pytest.approx([1 / 3, 3**-0.5, 1])
    kept, rest = totals(studies), studies.obs["n_counts"].to_numpy() - totals(studies)
    rest_before = many.obs["n_counts"].to_numpy() - totals(many)
    for s, factor in enumerate(factors(studies)["depth"]):
        mine = (studies.obs["study"] == f"study_{s}").to_numpy()
        n = totals(many)[mine].sum()
        # Five standard deviations of the binomial.
        assert kept[mine].sum() / n == pytest.approx(factor, abs=5 * (factor * (1 - factor) / n) ** 0.5 + 1e-12)
        n = rest_before[mine].sum()
        assert rest[mine].sum() / n == pytest.approx(factor, abs=5 * (factor * (1 - factor) / n) ** 0.5 + 1e-12)


def test_capture_thins_each_gene_of_each_study_by_its_own_factor(many):
    studies = simulate_studies(many, effects="capture")
    capture = studies.varm["capture"]  # (genes, studies)
    assert (capture.max(1) == 1).all()
    assert capture.min() > 0
    for s in range(3):
        mine = (studies.obs["study"] == f"study_{s}").to_numpy()
        before = np.asarray(many.X[mine].sum(0)).ravel()
        after = np.asarray(studies.X[mine].sum(0)).ravel()
        distance = np.abs(after - before * capture[:, s])
        assert (distance <= 5 * np.sqrt(before * capture[:, s] * (1 - capture[:, s]))).all()
        assert factors(studies)["mean_capture"][s] == pytest.approx((before * capture[:, s]).sum() / before.sum())


@pytest.mark.parametrize("severity", [0.5, 1, 2])
def test_the_spread_of_a_genes_capture_is_log_normal_and_grows_with_severity(pbmc, severity):
    capture = np.log(simulate_studies(pbmc, effects="capture", severity=severity).varm["capture"])
    assert (capture[:, 0] - capture[:, 1]).std() == pytest.approx(0.5 * 2**0.5 * severity, rel=0.1)


def test_ambient_keeps_each_total_and_moves_cells_towards_their_study(pbmc):
    studies = simulate_studies(pbmc, effects="ambient", severity=2)
    assert (totals(studies) == totals(pbmc)).all()
    assert (studies.obs["n_counts"] == pbmc.obs["n_counts"]).all()
    assert sorted(factors(studies)["ambient"]) == pytest.approx([0.04, 0.17, 0.30])
    for s, share in enumerate(factors(studies)["ambient"]):
        mine = (studies.obs["study"] == f"study_{s}").to_numpy()
        before, after = (adata.X[mine].toarray() / totals(adata)[mine, None] for adata in (pbmc, studies))
        pooled = pbmc.X[mine].sum(0).A1 / pbmc.X[mine].sum()
        # Regressed on the pooled profile, what changed is `share` of the way there.
        moved = ((after - before) * (pooled - before)).sum() / ((pooled - before) ** 2).sum()
        assert moved == pytest.approx(share, rel=0.1)


def test_a_study_gets_shallower_with_severity(pbmc):
    depths = [totals(simulate_studies(pbmc, severity=severity)).mean() for severity in (0, 0.5, 1, 2, 4)]
    assert (np.diff(depths) < 0).all()


def test_a_cell_that_thinning_would_empty_keeps_one_of_its_counts(pbmc):
    studies = simulate_studies(pbmc, severity=10, effects="depth")
    bare = totals(studies) == 1
    assert bare.sum() > 50
    assert (pbmc.X - studies.X).min() == 0  # one of its own


def test_the_totals_hold_what_is_measured_beyond_the_matrix(pbmc):
    studies = simulate_studies(pbmc)
    assert (studies.obs["n_counts"] >= totals(studies)).all()
    for s in range(3):
        mine = (studies.obs["study"] == f"study_{s}").to_numpy()
        share = (pbmc.obs["n_counts"] - totals(pbmc))[mine], (studies.obs["n_counts"] - totals(studies))[mine]
        factor = factors(studies)["depth"][s] * factors(studies)["mean_capture"][s]
        assert share[1].sum() / share[0].sum() == pytest.approx(factor, rel=0.01)


def test_cells_without_totals_get_none(make_cells):
    adata = make_cells()
    del adata.obs["n_counts"]
    assert "n_counts" not in simulate_studies(adata).obs


# The rest


def test_everything_follows_from_the_seed(pbmc):
    first, again, other = (simulate_studies(pbmc, seed=seed) for seed in (0, 0, 1))
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    assert first.obs["study"].tolist() != other.obs["study"].tolist()
    assert (first.X != other.X).nnz > 0


def test_an_effect_has_the_same_factors_alone_and_beside_others(pbmc):
    together = simulate_studies(pbmc)
    for effect in ("depth", "ambient"):
        assert (factors(simulate_studies(pbmc, effects=effect))[effect] == factors(together)[effect]).all()
    assert (simulate_studies(pbmc, effects="capture").varm["capture"] == together.varm["capture"]).all()
    assert simulate_studies(pbmc, effects="labels").obs["study"].equals(together.obs["study"])
    without = simulate_studies(pbmc, effects=())
    assert simulate_studies(pbmc, effects="depth").obs["study"].equals(without.obs["study"])


def test_the_cells_given_stay_as_they_were(pbmc):
    source = pbmc.copy()
    studies = simulate_studies(source)
    assert (source.X != pbmc.X).nnz == 0
    assert source.obs.equals(pbmc.obs)
    assert not studies.obsm and not studies.layers  # they would belong to the old counts


def test_studies_and_their_factors_survive_a_file(pbmc, tmp_path):
    studies = simulate_studies(pbmc)
    studies.write_h5ad(tmp_path / "studies.h5ad")
    back = scbert.datasets.load(tmp_path / "studies.h5ad", label_key="cell_type", batch_key="study")
    assert (back.X != studies.X).nnz == 0
    assert factors(back)["depth"] == pytest.approx(factors(studies)["depth"])
    assert factors(back)["cells"].tolist() == count_cells(studies)[factors(back)["labels"]].to_numpy().tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effects": ("depth", "dropout")}, "no effect 'dropout': choose among depth, capture, ambient, labels"),
        ({"n_studies": 1}, "n_studies must be from 2 to the number of cells, 60, not 1"),
        ({"n_studies": 61}, "not 61"),
        ({"severity": -1}, "severity must be 0 or a positive number, not -1"),
        ({"severity": float("nan")}, "not nan"),
        ({"label_key": "cluster"}, "has no column 'cluster' in obs"),
    ],
)
def test_what_cannot_be_simulated_is_refused(make_cells, options, message):
    with pytest.raises(ValueError, match=message):
        simulate_studies(make_cells(), **options)


def test_normalised_cells_are_refused(make_cells):
    adata = make_cells()
    adata.X = adata.X.log1p()
    with pytest.raises(ValueError, match="holds fractional values"):
        simulate_studies(adata)


# Old names


def test_old_names_are_traced_shared_or_lost_as_said():
    genes = [f"gene{i}" for i in range(2000)]
    names, table = simulate.simulate_old_names(genes, seed=1)
    found = resolve(names, genes, table)
    shares = found["status"].value_counts(normalize=True)
    for status, share in {"matched": 0.67, "renamed": 0.18, "ambiguous": 0.05, "unknown": 0.1}.items():
        assert abs(shares[status] - share) < 0.03
    traced = found["status"].isin(["matched", "renamed"]).to_numpy()
    assert (found["gene"].to_numpy()[traced] == np.array(genes, dtype=object)[traced]).all()
    again, _ = simulate.simulate_old_names(genes, seed=1)
    assert (again == names).all()
    assert (simulate.simulate_old_names(genes, seed=2)[0] != names).any()


# Equal depth, as a remedy


def medians(adata):
    return pd.Series(scbert.preprocess.library_size(adata)).groupby(adata.obs["study"].to_numpy()).median()


def test_studies_of_other_depth_have_the_median_of_the_shallowest_afterwards(many):
    many.X, many.obs["n_counts"] = many.X * 20, many.obs["n_counts"] * 20  # so that medians hardly move by chance
    uneven = simulate_studies(many, effects="depth")
    shallowest = medians(uneven).min()
    assert medians(uneven).max() > 2.5 * shallowest
    even = equalize_depth(uneven)
    assert medians(even).to_numpy() == pytest.approx(shallowest, rel=0.02)
    assert even.obs_names.equals(uneven.obs_names) and even.obs["study"].equals(uneven.obs["study"])
    shares = even.uns["scbert"]["equalize_depth"]
    assert sorted(shares.values()) == pytest.approx([1 / 3, 3**-0.5, 1], rel=0.05)
    # As a binomial with that probability would: mean and variance of what each value became.
    deep = min(shares, key=shares.get)
    own = (uneven.obs["study"] == deep).to_numpy()
    was, became = uneven.X[own].toarray().ravel(), even.X[own].toarray().ravel()
    p = shares[deep]
    assert (became <= was).all()
    assert became.sum() / was.sum() == pytest.approx(p, abs=0.003)
    assert ((became - p * was) ** 2).sum() / (was * p * (1 - p)).sum() == pytest.approx(1, abs=0.05)


def test_the_shallowest_study_and_a_single_study_stay_as_they_were(many):
    uneven = simulate_studies(many, effects="depth")
    shares = (even := equalize_depth(uneven)).uns["scbert"]["equalize_depth"]
    own = (uneven.obs["study"] == max(shares, key=shares.get)).to_numpy()
    assert (even.X[own] != uneven.X[own]).nnz == 0
    assert (even.obs["n_counts"][own] == uneven.obs["n_counts"][own]).all()
    alone = equalize_depth(uneven[own])
    assert (uneven.X[own] != alone.X).nnz == 0


def test_what_n_counts_holds_beyond_the_matrix_is_thinned_along(many):
    uneven = simulate_studies(many, effects="depth")
    even = equalize_depth(uneven)
    beyond = even.obs["n_counts"] - totals(even)
    assert (beyond >= 0).all() and (beyond == beyond.round()).all()
    for study, share in even.uns["scbert"]["equalize_depth"].items():
        own = (even.obs["study"] == study).to_numpy()
        was = (uneven.obs["n_counts"] - totals(uneven))[own].sum()
        assert beyond[own].sum() / was == pytest.approx(share, abs=0.04)
    without = uneven.copy()
    del without.obs["n_counts"]
    assert "n_counts" not in equalize_depth(without).obs


def test_thinning_to_the_shallowest_empties_no_cell_and_is_fixed_by_the_seed(pbmc):
    uneven = simulate_studies(pbmc, severity=4, effects="depth")
    even = equalize_depth(uneven)
    assert totals(even).min() == 1
    assert (equalize_depth(uneven).X != even.X).nnz == 0
    assert (equalize_depth(uneven, seed=1).X != even.X).nnz > 0
    scbert.checks.check_counts(even, "even")
    scbert.preprocess.library_size(even)  # n_counts is no smaller than the counts


def test_fractional_counts_are_rounded_first_and_it_says_so(many, capsys):
    uneven = simulate_studies(many, effects="depth")
    uneven.X = uneven.X * 0.98
    del uneven.obs["n_counts"]
    faint = sparse.csr_matrix(([0.3, 0.2], ([0, 0], [3, 4])), shape=(1, uneven.n_vars))
    uneven.X = sparse.vstack([faint, uneven.X[1:]], format="csr")
    with pytest.raises(ValueError, match="fractional values"):
        equalize_depth(uneven)
    uneven.uns["scbert"]["fractional_counts"] = "estimated"
    even = equalize_depth(uneven)
    assert "rounded" in capsys.readouterr().out
    assert (even.X.data == np.rint(even.X.data)).all()
    assert even.X[0].toarray().ravel().nonzero()[0].tolist() == [3]
    assert "fractional_counts" not in even.uns["scbert"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_key": "donor"}, "no column 'donor'"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_equal_depth_refuses_what_it_cannot_use_in_one_sentence(many, change, says):
    with pytest.raises(ValueError, match=says):
        equalize_depth(simulate_studies(many, effects="depth"), **change)


def test_doses_are_simulated_at_each_severity_in_two_directions(make_cells):
    adata = make_cells(90)
    worlds = simulate_doses(adata, ["depth", "labels", "all"], [2, 0, 1], n_repeats=3, seed=5)
    levels = ["none:0", "depth:1", "depth:2", "depth:2:equalised", "labels:1", "labels:2", "all:1", "all:2"]
    assert list(worlds) == [(level, repeat) for repeat in range(3) for level in [*levels, "all:2:equalised"]]
    options = {"n_studies": 2, "severity": 2, "effects": EFFECTS}
    for repeat, seed in ((0, 5), (1, 5), (2, 6)):
        expected = simulate_studies(adata, seed=seed, **options)
        assert (worlds["all:2", repeat].X != expected.X).nnz == 0
        assert (worlds["all:2:equalised", repeat].X != equalize_depth(expected, seed=seed).X).nnz == 0
    assert (worlds["none:0", 2].X != adata.X).nnz == 0
    assert "none:0" not in dict(simulate_doses(adata, ["depth"], [1]))


@pytest.mark.parametrize(
    ("effects", "severities"), [([], [1]), (["depth"], []), (["all", "all"], [1]), (["all"], [1, 1])]
)
def test_doses_must_be_named_once(make_cells, effects, severities):
    with pytest.raises(ValueError, match="one or more, each once"):
        simulate_doses(make_cells(90), effects, severities)
