"""Files as published, made from a random unmodified Performer: read in either layout, or refused in one sentence."""

import copy
import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from performer_pytorch import Performer
from torch.nn.functional import layer_norm

import scbert
from scbert import ScBert, ScBertConfig, preprocess, published
from scbert import weights as encoders

GENES = [f"gene{i}" for i in range(24)]
SMALL = {"dim": 8, "depth": 2, "heads": 2, "dim_head": 4}
SIZE = {"dim": 200, "depth": 6, "heads": 10, "dim_head": 64}
LAYER = "performer.net.layers.1"


def draw_weights(n_genes=24, dim=8, depth=2, heads=2, dim_head=4):
    """Draw a Performer, and return weights by published names and a function that encodes through performer-pytorch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        performer = Performer(dim, depth, heads, dim_head, qkv_bias=False, attn_out_bias=True).eval()
        for parameter in performer.parameters():
            if parameter.ndim == 1:  # norms and biases that do something
                parameter.data += 0.1 * torch.randn_like(parameter)
        weights = OrderedDict({"token_emb.weight": torch.randn(7, dim)})
        weights["pos_emb.emb.weight"] = torch.randn(n_genes + 1, dim, dtype=torch.float64)
        weights["pos_emb.emb.weight"][-1] = 0
        weights["performer.calls_since_last_redraw"] = torch.tensor(17)
        for name, tensor in performer.state_dict().items():
            if not name.startswith("proj_updater."):
                weights[f"performer.{name}"] = tensor
        weights |= {"norm.weight": 1 + 0.1 * torch.randn(dim), "norm.bias": 0.1 * torch.randn(dim)}
        weights |= {"to_out.weight": torch.randn(7, dim), "to_out.bias": torch.randn(7)}

    @torch.no_grad()
    def encode(bins):
        embedded = weights["token_emb.weight"][bins] + weights["pos_emb.emb.weight"].float()
        return layer_norm(performer(embedded), (dim,), weights["norm.weight"], weights["norm.bias"])

    return weights, encode


def stack(weights):
    """Return the weights in the layout of nano-scBERT."""
    stacked = OrderedDict()
    for name, tensor in weights.items():
        if ".to_q." in name:
            parts = [weights[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            stacked[name.replace("to_q", "to_qkv")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            stacked[name.replace(".1.fn.fn.", ".1.fn.")] = tensor
    return stacked


def as_published(weights):
    """Return what the official scripts save: the weights, and how training stood."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    others = {"optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": {"base_lrs": [1e-4]}}
    return {"epoch": 5, "model_state_dict": weights, **others, "losses": 0.7}


LAYOUTS = {
    "official": as_published,
    "official, distributed": lambda w: as_published({f"module.{name}": tensor for name, tensor in w.items()}),
    "official, weights only": lambda w: w,
    "nano": stack,
    "nano, in a checkpoint": lambda w: as_published(stack(w)),
}


@pytest.fixture(scope="module")
def of_published_size():
    return draw_weights(300, **SIZE)


@pytest.fixture
def weights():
    """Weights of 24 genes and two layers; a test may change them."""
    return copy.deepcopy(draw_weights()[0])


@pytest.fixture
def file(tmp_path, weights):
    """A file in the official layout."""
    torch.save(as_published(weights), tmp_path / "pretrain.pth")
    return tmp_path / "pretrain.pth"


@pytest.fixture
def vocabulary(monkeypatch):
    """16,906 names in place of the published ones, so that no file is needed."""
    names = [f"gene{i}" for i in range(16_906)]
    monkeypatch.setattr(encoders, "load_vocabulary", lambda: list(names))
    monkeypatch.setattr(published, "PUBLISHED_GENES_SHA256", preprocess.hash_genes(names))
    return names


def draw_bins(n_genes, cells=3):
    bins = torch.randint(0, 7, (cells, n_genes + 1), generator=torch.Generator().manual_seed(0))
    bins[:, -1] = 0
    return bins


# What is read


@pytest.mark.parametrize("layout", ["official", "nano"])
def test_encodings_are_those_of_an_unmodified_performer_of_published_size(tmp_path, of_published_size, layout):
    weights, encode = of_published_size
    torch.save(LAYOUTS[layout](weights), tmp_path / "weights.pth")
    model = ScBert.from_published(tmp_path / "weights.pth", [f"gene{i}" for i in range(300)])
    expected = encode(draw_bins(300))
    with torch.no_grad():
        torch.testing.assert_close(model.encode(draw_bins(300)), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.5


def test_every_layout_gives_the_same_state_dict_from_a_file_and_from_memory(tmp_path, weights):
    for name, layout in LAYOUTS.items():
        torch.save(layout(weights), tmp_path / f"{name}.pth")
        for source in (tmp_path / f"{name}.pth", str(tmp_path / f"{name}.pth"), layout(weights)):
            state = ScBert.from_published(source, GENES).state_dict()
            assert set(state) == set(weights) - {"performer.calls_since_last_redraw"}
            assert all(torch.equal(state[name], weights[name].float()) for name in state)


def test_a_file_of_before_pytorch_1_6_is_read(tmp_path, weights):
    torch.save(as_published(weights), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    state = ScBert.from_published(tmp_path / "old.pth", GENES).state_dict()
    assert all(torch.equal(state[name], weights[name].float()) for name in state)


def test_a_file_of_published_size_gives_the_published_config(tmp_path, vocabulary):
    weights = draw_weights(16_906, **SIZE)[0]
    assert len(weights) == 91
    torch.save(as_published(weights), tmp_path / "panglao_pretrain.pth")
    model = scbert.load_encoder(tmp_path / "panglao_pretrain.pth")
    assert model.config == ScBertConfig.published()
    assert model.genes == vocabulary
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_388_607


def test_the_vocabulary_asked_for_is_the_published_one():
    mirror = os.environ.get("SCBERT_MIRROR")
    files = sorted(Path(mirror).rglob("gene_order.txt")) if mirror else []
    if not files:
        pytest.skip("SCBERT_MIRROR holds no copy of the published vocabulary.")
    names = files[0].read_text().splitlines()
    assert len(names) == published.N_GENES == 16_906
    assert preprocess.hash_genes(names) == published.PUBLISHED_GENES_SHA256


def test_the_model_is_ready_to_encode_and_its_gene_vectors_do_not_learn(weights):
    weights["pos_emb.emb.weight"][-1] = 0.5  # kept, whatever it is
    model = ScBert.from_published(weights, GENES)
    assert not model.training
    assert model.config == ScBertConfig(24, gene_embedding="frozen", **SMALL)
    assert model.genes == GENES
    vectors = model.pos_emb.emb.weight
    assert (vectors.dtype, vectors.requires_grad) == (torch.float32, False)
    assert torch.equal(vectors[-1], torch.full((8,), 0.5))
    weights["token_emb.weight"].zero_()  # the model has its own
    assert model.token_emb.weight.any()


def test_weights_without_gene_vectors_make_a_model_without(weights):
    del weights["pos_emb.emb.weight"]
    for names in (GENES, GENES[:7]):  # nothing in such weights says how many
        model = ScBert.from_published(weights, names)
        assert model.config == ScBertConfig(len(names), gene_embedding="none", **SMALL)
        assert model.encode(draw_bins(len(names))).shape == (3, len(names) + 1, 8)


def test_the_key_stabiliser_can_be_that_of_the_published_training(weights):
    bins = draw_bins(24)
    for key_stabiliser, alike in (("head", True), ("batch", False)):
        model = ScBert.from_published(weights, GENES, key_stabiliser=key_stabiliser).double()
        assert model.config.key_stabiliser == key_stabiliser
        alone = torch.cat([model.encode(cell) for cell in bins.split(1)])
        assert ((model.encode(bins) - alone).abs().max() < 1e-12) == alike


# What is refused


def put(name, tensor):
    return lambda weights: weights.update({name: tensor})


def drop(*names):
    return lambda weights: [weights.pop(name) for name in names]


def spoil(name, value):
    def apply(weights):
        weights[name].view(-1)[-1] = value

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.clear(), "lacks weights of .*, token_emb.weight, .* and 16 more: give"),
        (drop("to_out.weight", "to_out.bias"), "lacks weights of an scBERT encoder, to_out.weight, to_out.bias: give"),
        (drop(f"{LAYER}.0.fn.to_k.weight"), r"lacks weights .*, performer.net.layers.1.0.fn.to_k.weight: give"),
        (put("norm.weight", [1.0] * 8), "lacks weights of an scBERT encoder, norm.weight: give"),
        (put("norm.weight", torch.ones(8, dtype=torch.int64)), "lacks weights of an scBERT encoder, norm.weight: give"),
        (put(f"{LAYER}.0.fn.to_q.bias", torch.ones(8)), r"has weights that no .*, performer.net.layers.1.0.fn.to_q.b"),
        (
            put("performer.net.layers.7.0.norm.weight", torch.ones(8)),
            r"lacks weights .*layers.2.0.norm.weight.* and 11 more",
        ),
        (
            put(f"{LAYER}.0.fn.to_qkv.weight", torch.ones(10, 8)),
            r"to_qkv.weight of shape \(10, 8\), not three matrices",
        ),
        (put("norm.weight", torch.ones(9)), r"has norm.weight of shape \(9,\), expected \(8,\)"),
        (put("to_out.weight", torch.ones(9, 8)), r"has to_out.weight of shape \(9, 8\), expected \(7, 8\)"),
        (put(f"{LAYER}.1.fn.fn.w1.weight", torch.ones(8, 32)), r"w1.weight of shape \(8, 32\), expected \(32, 8\)"),
        (put(f"{LAYER}.0.fn.fast_attention.projection_matrix", torch.ones(6, 4)), r"\(6, 4\), expected \(5, 4\)"),
        (put("performer.net.layers.0.0.fn.fast_attention.projection_matrix", torch.ones(1, 1)), "matrix of one column"),
        (put("performer.net.layers.0.0.fn.to_q.weight", torch.ones(9, 8)), "of 9 rows, expected a multiple of 4"),
        (put("token_emb.weight", torch.ones(7)), r"token_emb.weight of shape \(7,\), expected a matrix"),
        (put("token_emb.weight", torch.ones(7, 0)), r"token_emb.weight of shape \(7, 0\), expected a matrix"),
        (put("token_emb.weight", torch.ones(2, 8)), "n_bins"),
        (put("token_emb.weight", torch.ones(9, 8)), r"to_out.weight of shape \(7, 8\), expected \(9, 8\)"),
        (put("pos_emb.emb.weight", torch.ones(25, 9)), r"shape \(24, 9\), but the config needs \(24, 8\)"),
        (spoil("norm.bias", torch.nan), "has NaN or infinity in norm.bias"),
        (spoil("pos_emb.emb.weight", 1e300), "has NaN or infinity in pos_emb.emb.weight"),  # in float32
        (spoil(f"{LAYER}.0.fn.to_v.weight", -torch.inf), "has NaN or infinity in performer.net.layers.1.0.fn.to_v"),
    ],
)
def test_weights_of_another_model_are_refused_in_one_sentence(weights, change, message):
    change(weights)
    with pytest.raises(ValueError, match=message) as error:
        ScBert.from_published(weights, GENES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("found", [[1, 2], torch.ones(3), {"model_state_dict": None}, 7, None])
def test_a_file_of_other_things_than_weights_is_refused(tmp_path, found):
    torch.save(found, tmp_path / "things.pth")
    with pytest.raises(ValueError, match="things.pth holds no weights by name: give a checkpoint"):
        ScBert.from_published(tmp_path / "things.pth", GENES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "does not name its genes: give them; scbert.genes.load_vocabulary"),
        (GENES[:-1], "is for 24 genes, but 23 names were given"),
        ([], "is for 24 genes, but 0 names were given"),
    ],
)
def test_another_number_of_genes_is_refused(weights, vocabulary, names, message):
    with pytest.raises(ValueError, match=message):
        ScBert.from_published(weights, names)


def test_as_many_genes_as_published_must_be_the_published_ones_in_order(vocabulary):
    weights = draw_weights(16_906)[0]
    assert ScBert.from_published(weights, vocabulary).genes == vocabulary
    swapped = [vocabulary[1], vocabulary[0], *vocabulary[2:]]
    for names in (swapped, [*vocabulary[:-1], "geneX"]):
        with pytest.raises(ValueError, match="The 16,906 gene names are not the published ones in their order"):
            ScBert.from_published(weights, names)


def test_a_vocabulary_file_that_changed_is_refused(tmp_path, vocabulary, monkeypatch):
    torch.save(draw_weights(16_906)[0], tmp_path / "panglao_pretrain.pth")
    monkeypatch.setattr(encoders, "load_vocabulary", lambda: vocabulary[::-1])
    with pytest.raises(ValueError, match="not the published ones in their order"):
        scbert.load_encoder(tmp_path / "panglao_pretrain.pth")


def test_another_number_of_bins_is_refused(weights):
    assert ScBert.from_published(weights, GENES, n_bins=5).config.n_bins == 5
    with pytest.raises(ValueError, match="has 7 tokens, for 5 bins, not for n_bins=7"):
        ScBert.from_published(weights, GENES, n_bins=7)
    weights |= {"token_emb.weight": torch.ones(9, 8), "to_out.weight": torch.ones(9, 8), "to_out.bias": torch.ones(9)}
    assert ScBert.from_published(weights, GENES).config.n_bins == 7


# Files


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(ValueError, match=f"There is no file {path}: give the path"):
            ScBert.from_published(path, GENES)


@pytest.mark.parametrize("data", [b"", b"hello", b"cell\tlabel\n", b"\x89PNG\r\n\x1a\n0123456789", b"PK\x03\x04" * 9])
def test_a_file_of_something_else_is_refused(tmp_path, data):
    (tmp_path / "other.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"other.pth is no file of PyTorch, or is damaged: fetch it again") as error:
        ScBert.from_published(tmp_path / "other.pth", GENES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, weights, share, zipped):
    path = tmp_path / "half.pth"
    torch.save(as_published(weights), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"half.pth is no file of PyTorch, or is damaged: fetch it again") as error:
        ScBert.from_published(path, GENES)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_never_changes_a_weight_in_silence(file, weights):
    data, random = file.read_bytes(), np.random.default_rng(0)
    n_refused = 0
    for position, bit in zip(random.choice(len(data), 150, replace=False), random.integers(8, size=150), strict=True):
        damaged = bytearray(data)
        damaged[position] ^= 1 << bit
        file.write_bytes(damaged)
        try:
            state = published.read_weights(file)
        except ValueError as error:
            n_refused += 1
            assert "\n" not in str(error)
        else:  # padding, or a date
            assert all(torch.equal(state[name], weights[name].float()) for name in state)
            assert len(state) == len(weights) - 1
    assert n_refused > 30


def test_a_weight_that_a_flipped_bit_would_change_is_not_read(file, weights):
    """`torch.load` alone does not notice."""
    data = file.read_bytes()
    value = weights["to_out.bias"].numpy().tobytes()
    assert data.count(value) == 1
    damaged = bytearray(data)
    damaged[data.index(value)] ^= 1
    file.write_bytes(damaged)
    read = torch.load(file, weights_only=True)["model_state_dict"]["to_out.bias"]
    assert read.isfinite().all()
    assert not torch.equal(read, weights["to_out.bias"])
    with pytest.raises(ValueError, match="is damaged: fetch it again .Bad CRC-32 for file"):
        ScBert.from_published(file, GENES)


@pytest.mark.parametrize("field", [24, 38])  # size, and what makes a folder of an entry
def test_what_lies_in_memory_behind_an_entry_is_never_a_weight(file, weights, field):
    """`torch.load` alone would return it, where a bit of the archive's directory is flipped."""
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/0")).encode()  # token_emb.weight
    head = data.rindex(name) - 46
    assert data[head : head + 4] == b"PK\x01\x02"
    data[head + field] ^= 16
    file.write_bytes(data)
    assert torch.equal(published.read_weights(file)["token_emb.weight"], weights["token_emb.weight"])


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (torch.save, r"evil.pth asks for getattr, which weights do not need, so nothing of it was read or run"),
        (lambda found, path: path.write_bytes(pickle.dumps(found)), "evil.pth is no file of PyTorch"),
    ],
)
def test_code_in_a_file_is_not_run(tmp_path, weights, write, message):
    trace = tmp_path / "trace"
    for found in (Intruder(trace), {"model_state_dict": weights | {"norm.bias": Intruder(trace)}}):
        write(found, tmp_path / "evil.pth")
        with pytest.raises(ValueError, match=message) as error:
            ScBert.from_published(tmp_path / "evil.pth", GENES)
        assert "\n" not in str(error.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Intruder(trace)))
    assert trace.exists()  # it would have shown


# Bundles


def test_a_converted_checkpoint_encodes_as_before(tmp_path, file, weights):
    encoders.convert(file, tmp_path / "bundle", GENES)
    bundle, model = scbert.load(tmp_path / "bundle"), ScBert.from_published(file, GENES)
    assert (bundle.config, bundle.genes, bundle.licence) == (model.config, GENES, "")
    assert torch.equal(bundle.encode(draw_bins(24)), model.encode(draw_bins(24)))
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert f"`pretrain.pth`, sha256 `{hashlib.sha256(file.read_bytes()).hexdigest()}`" in card
    assert "GPL" not in card  # these are not the published weights
    assert "PanglaoDB" not in card


def test_published_weights_keep_their_licence_in_every_bundle(tmp_path, vocabulary):
    torch.save(draw_weights(16_906)[0], tmp_path / "panglao_pretrain.pth")
    encoders.convert(tmp_path / "panglao_pretrain.pth", tmp_path / "encoder")
    encoder = scbert.load(tmp_path / "encoder")
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert card.startswith("---\nlicense: gpl-3.0\n---\n")
    for part in (
        "GPL-3.0",
        "another licence",
        "209",
        "74 tissues",
        "1,126,580",
        "10.1038/s42256-022-00534-z",
        "sha256",
    ):
        assert part in card

    classifier = scbert.Classifier(copy.deepcopy(encoder), ["B", "T"])
    classifier.save(tmp_path / "classifier")
    assert "under GPL-3.0" in (tmp_path / "classifier" / "README.md").read_text()
    assert scbert.load(tmp_path / "classifier").encoder.licence == encoder.licence == "GPL-3.0"


def test_conversion_leaves_a_folder_of_other_things_alone(tmp_path, file):
    with pytest.raises(ValueError, match="is no model bundle"):
        encoders.convert(file, tmp_path, GENES)
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain.pth"]


def test_an_encoder_is_loaded_from_wherever_it_is(tmp_path, monkeypatch, vocabulary, encoder, classifier):
    full = draw_weights(16_906)[0]
    torch.save(full, tmp_path / "panglao_pretrain.pth")
    monkeypatch.setattr("scbert.sources.weights.fetch", lambda name: [tmp_path / "panglao_pretrain.pth"])
    by_name, by_file = scbert.load_encoder("scbert_checkpoint"), scbert.load_encoder(tmp_path / "panglao_pretrain.pth")
    assert by_name.genes == by_file.genes == list(vocabulary)
    encoder.genes = [f"gene{i}" for i in range(24)]
    encoder.save(tmp_path / "encoder")
    classifier.save(tmp_path / "classifier")
    assert torch.equal(scbert.load_encoder(tmp_path / "encoder").token_emb.weight, encoder.token_emb.weight)
    taken = scbert.load_encoder(str(tmp_path / "classifier"))
    assert torch.equal(taken.token_emb.weight, classifier.encoder.token_emb.weight)


def test_an_encoder_that_is_nowhere_is_one_sentence(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"There is no bundle or file .*none, and no weights of that name \(pbmc-large, pbmc-small, scb",
    ):
        scbert.load_encoder(tmp_path / "none")


def test_the_encoder_that_ships_is_small_loads_by_name_and_reads_the_demo():
    encoder = scbert.load_encoder("pbmc-small")
    folder = encoders.ENCODERS / "pbmc-small"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 400_000
    assert len(encoder.genes) == 1000
    assert encoder.licence == ""
    adata = scbert.datasets.load("pbmc68k_reduced")
    tokens = scbert.preprocess.tokenize(adata, genes=encoder.genes)
    assert tokens.uns["scbert"]["tokenize"]["genes_matched"] == 763
    scores = scbert.masks.score_masks(encoder, tokens[:60].copy())
    # It has met none of these cells, and knows more than the commonest bin of each.
    assert scores["correct"].sum() > scores["cell_correct"].sum()


def test_the_card_of_the_encoder_that_ships_says_what_it_was_trained_on_and_how_well_it_does():
    card = (encoders.ENCODERS / "pbmc-small" / "README.md").read_text()
    for words in ("pbmc_pool", "zheng_facs", "gene_and_cell_tokens/masked_accuracy", "cells seen", "BSD-3-Clause"):
        assert words in card


def test_the_larger_encoder_ships_in_half_precision_and_says_of_what_it_is():
    encoder = scbert.load_encoder("pbmc-large")
    sizes = [file.stat().st_size for file in encoders.ENCODERS.glob("*/*")]
    assert sum(sizes) < 4_000_000  # of all that ship
    assert encoder.config.expressed_only
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert len(encoder.genes) > 10_000
    assert encoder.genes_seen is None and encoder.licence == ""
    card = (encoders.ENCODERS / "pbmc-large" / "README.md").read_text()
    for words in ("kang_pbmc", "pool_fetal_thymus", "cells seen", "encoders.csv", "GPL-3.0", "BSD-3-Clause"):
        assert words in card
