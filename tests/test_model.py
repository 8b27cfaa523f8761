"""The encoder against an unmodified Performer, the published names and sizes, and bundles that fit or do not load."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from favor import favor_attention
from performer_pytorch import Performer
from torch import distributed, multiprocessing
from torch.nn.functional import cross_entropy, layer_norm
from torch.nn.parallel import DistributedDataParallel

import scbert
from scbert import ScBert, ScBertConfig, attention
from scbert.experiments.deletion import find_expressed
from scbert.model.attention import CHUNK_BYTES, summarise_keys
from scbert.model.classifier import AnnotationHead
from scbert.model.encoder import run_layer
from scbert.model.packed import few_threads, group_cells

GENES = [f"gene{i}" for i in range(24)]


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


# Layers, in chunks of positions


WIDE = ScBertConfig(n_genes=39, dim=32, depth=2, heads=4, dim_head=16)
CHUNKS = {"one chunk": 120, "two cells a chunk": 80, "three chunks a cell": 15, "single positions": 1}
"""Positions in a chunk, for cells of 40."""


def bytes_of(positions, config):
    return 4 * config.heads * config.n_features * positions


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def chunked(request, monkeypatch):
    """Let models of the config `WIDE` compute in chunks."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", bytes_of(request.param, WIDE))
    monkeypatch.setattr("scbert.model.attention.KEPT_CHUNKS", 1)


def draw_bins(cells=3, columns=40):
    return torch.randint(0, 7, (cells, columns), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unmodified():
    """A model, and a function that encodes as it should, through performer-pytorch alone."""
    model = ScBert(WIDE, seed=3).eval()
    performer = Performer(dim=32, depth=2, heads=4, dim_head=16, qkv_bias=False).eval()
    missing, unexpected = performer.load_state_dict(model.performer.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("proj_updater.") for name in missing)

    def encode(bins):
        embedded = model.token_emb.weight[bins] + model.pos_emb.emb.weight
        return layer_norm(performer(embedded), (32,), model.norm.weight, model.norm.bias)

    return model, performer, encode


def test_the_encoder_equals_an_unmodified_performer_with_the_same_weights(chunked, unmodified):
    model, _, encode = unmodified
    ours = model.encode(draw_bins())
    torch.testing.assert_close(ours, encode(draw_bins()), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, model.norm(model.performer(model.embed(draw_bins()))), atol=1e-5, rtol=0)


def test_a_training_step_has_the_gradients_of_an_unmodified_performer(chunked, unmodified):
    model, performer, encode = unmodified
    theirs = dict(performer.named_parameters())
    names, parameters = zip(*model.performer.named_parameters(), strict=True)
    gradients = []
    for function, inputs in ((model.encode, parameters), (encode, [theirs[name] for name in names])):
        inputs = [*inputs, model.token_emb.weight, model.pos_emb.emb.weight]
        loss = cross_entropy(model.to_out(function(draw_bins())).flatten(0, 1), draw_bins().flatten())
        gradients.append(torch.autograd.grad(loss, inputs))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_under_autocast_a_training_step_is_close_to_full_precision(chunked):
    model = ScBert(WIDE, seed=3)
    expected = model.encode(draw_bins())
    with torch.autocast("cpu", torch.bfloat16):
        encoded = model.encode(draw_bins())
    assert encoded.dtype == torch.float32
    torch.testing.assert_close(encoded, expected, atol=0.02, rtol=0)  # numbers of variance one
    parameters = list(model.performer.parameters())
    ours, theirs = (torch.autograd.grad(out.sin().sum(), parameters) for out in (encoded, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_beyond_two_chunks_no_features_are_kept_for_the_backward_pass(monkeypatch):
    config = ScBertConfig(n_genes=599, dim=8, depth=1, heads=2, dim_head=16)
    layer = ScBert(config).performer.net.layers[0]
    x = torch.randn(2, 600, 8, requires_grad=True)

    def keep(positions):
        """Run the layer in chunks, and return the bytes kept for its backward pass."""
        monkeypatch.setitem(CHUNK_BYTES, "cpu", bytes_of(positions, config))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            run_layer(layer, x)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}  # views share one
        return sum(storages.values())

    assert min(keep(1200), keep(600)) > 2 * bytes_of(1200, config)  # the features of all queries and keys
    assert max(keep(400), keep(60)) < 1.1 * x.nbytes


def test_attention_columns_are_those_of_each_layers_queries_and_keys(chunked):
    model = ScBert(WIDE, seed=3)
    bins = draw_bins()
    for key_stabiliser, expressed_only in (("head", False), ("head", True), ("batch", True)):
        model.set_key_stabiliser(key_stabiliser)
        x, expected = model.embed(bins), []
        for attend, feed in model.performer.net.layers:
            q, k = (f(attend.norm(x)).unflatten(2, (4, 16)).transpose(1, 2) for f in (attend.fn.to_q, attend.fn.to_k))
            weight = attention.weigh_queries(bins > 0 if expressed_only else torch.ones(bins.shape))
            projection = attend.fn.fast_attention.projection_matrix
            expected.append(favor_attention(q, k, k, projection, key_stabiliser, weight=weight)[1])
            x = x + attend(x)
            x = x + feed(x)
        columns = model.attention_columns(bins, expressed_only)
        assert columns.shape == (3, 2, 4, 40)
        torch.testing.assert_close(columns, torch.stack(expected, 1), atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(columns.sum(3), torch.ones(3, 2, 4))


@pytest.mark.parametrize("positions", [10, 50, 1000])
def test_a_cells_logits_depend_on_who_shares_its_batch_only_as_published(monkeypatch, bins, classifier, positions):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", bytes_of(positions, classifier.config))
    classifier.double()  # the effect is small in cells this much alike
    for key_stabiliser, low, high in (("head", 0, 1e-12), ("batch", 1e-6, 1)):
        classifier.encoder.set_key_stabiliser(key_stabiliser)
        alone = torch.cat([classifier(cell) for cell in bins[:9].split(1)])
        assert low <= (classifier(bins[:9]) - alone).abs().max() < high


# Cells as the genes they express


EXPRESSED = replace(WIDE, expressed_only=True)


def draw_cells():
    """Return four cells of 39 genes that express about 33, 3, none and 17 of them; tokens up to the mask's."""
    bins = draw_bins(4)
    bins[1, 4:] = bins[2] = bins[3, ::2] = 0
    bins[:, -1] = 0
    return bins


def entered(bins):
    """Say which positions enter, written out."""
    return torch.stack([torch.tensor([*(token > 0 for token in cell[:-1]), True]) for cell in bins])


def run_restricted(model, bins, run_layers):
    """Encode each cell alone, as the tensor restricted to the positions that enter; one tensor of all of them."""
    embedded = model.token_emb.weight[bins] + model.pos_emb.emb.weight
    cells = [run_layers(x[None, own])[0] for x, own in zip(embedded, entered(bins), strict=True)]
    return model.norm(torch.cat(cells))


def test_expressed_genes_come_first_in_their_order_and_then_padding():
    bins = torch.tensor([[0, 6, 0, 2, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
    positions, present = find_expressed(bins)
    assert present.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert positions[present].tolist() == [1, 3, 4, 4, 2, 4]
    assert [len(set(cell)) for cell in positions.tolist()] == [3, 3, 3]
    assert bins.tolist() == [[0, 6, 0, 2, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]


def test_expressed_genes_alone_are_encoded_as_a_sequence_of_no_others_is(chunked):
    model, bins = ScBert(EXPRESSED, seed=3).double(), draw_cells()
    ours, theirs = model.encode(bins), run_restricted(model, bins, model.run_layers)
    assert ours.shape == (4, 40, 32)
    assert not ours[~entered(bins)].any()
    torch.testing.assert_close(ours[entered(bins)], theirs, atol=1e-12, rtol=0)
    parameters = [parameter for name, parameter in model.named_parameters() if "to_out" not in name.split(".")[0]]
    ours, theirs = (torch.autograd.grad(out.sin().sum(), parameters) for out in (ours[entered(bins)], theirs))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


def test_expressed_genes_alone_are_encoded_as_by_an_unmodified_performer(chunked, unmodified):
    model, performer, _ = unmodified
    model.config, bins = EXPRESSED, draw_cells()
    expected = run_restricted(model, bins, performer)
    torch.testing.assert_close(model.encode(bins)[entered(bins)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", [2000, 30])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_short_cell_does_not_depend_on_the_padding_of_long_neighbours(monkeypatch, dtype, tolerance, positions):
    config = replace(EXPRESSED, n_genes=399)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", bytes_of(positions, config))  # most chunks of the short cell are padding
    model, bins = ScBert(config, seed=3).to(dtype), draw_bins(3, 400)
    bins[0, 8:] = 0
    together, columns = model.encode(bins)[:1], model.attention_columns(bins)[:1]
    assert (together - model.encode(bins[:1])).abs().max() <= tolerance
    assert (columns - model.attention_columns(bins[:1])).abs().max() <= tolerance


def test_a_cell_that_expresses_nothing_is_its_trailing_token(chunked):
    model, bins = ScBert(EXPRESSED, seed=3), draw_cells()
    together, alone = model.encode(bins)[2], model.encode(bins[2:3])[0]
    assert torch.isfinite(together).all()
    assert not together[:-1].any()
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.attention_columns(bins)[2, ..., -1], torch.ones(2, 4))


def test_the_mode_is_switched_in_place_and_back(encoder, bins):
    there, all_genes = ScBert(replace(encoder.config, expressed_only=True)), encoder(bins)
    there.load_state_dict(encoder.state_dict())
    classifier = scbert.Classifier(encoder, ["A", "B"])
    encoder.set_expressed_only(True)
    assert encoder.config == classifier.config == there.config
    assert (encoder(bins) == there(bins)).all()
    assert not torch.allclose(encoder(bins), all_genes)
    encoder.set_expressed_only(False)
    assert (encoder(bins) == all_genes).all()
    without = ScBert(replace(encoder.config, gene_embedding="none"))
    with pytest.raises(ValueError, match="expressed_only needs a gene embedding"):
        without.set_expressed_only(True)


def test_logits_of_some_positions_are_those_of_all_whether_they_entered_or_not(encoder, bins):
    encoder.config = replace(encoder.config, expressed_only=True)
    where = torch.rand(bins.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert (bins[where] > 0).any()
    assert (bins[where] == 0).any()
    some, every = encoder(bins, where), encoder(bins)[where]
    torch.testing.assert_close(some, every)
    torch.testing.assert_close(some[bins[where] == 0][0], encoder.to_out.bias)
    some, every = (torch.autograd.grad(out.sin().sum(), list(encoder.parameters())) for out in (some, every))
    for one, other in zip(some, every, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_attention_among_expressed_genes_is_that_of_the_restricted_sequence(chunked):
    model, bins = ScBert(EXPRESSED, seed=3).double(), draw_cells()
    columns, of_genes = model.attention_columns(bins), model.attention_columns(bins, expressed_only=True)
    assert columns.shape == of_genes.shape == (4, 2, 4, 40)
    for cell, own in enumerate(entered(bins)):
        for received, without_last in ((columns, False), (of_genes, True)):
            x, where = model.embed(bins)[cell : cell + 1, own], torch.ones(1, int(own.sum()), dtype=torch.bool)
            where[0, -1] = not without_last
            for depth, layer in enumerate(model.performer.net.layers):
                x, expected = run_layer(layer, x, where / where.sum().clamp(min=1))
                torch.testing.assert_close(received[cell, depth, :, own], expected[0].double(), atol=1e-7, rtol=1e-6)
    assert not columns.masked_fill(entered(bins)[:, None, None], 0).any()
    sums = columns.sum(3)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("key_stabiliser", ["head", "batch"])
def test_genes_that_no_cell_expresses_change_nothing_though_they_are_padding(monkeypatch, key_stabiliser):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", bytes_of(15, WIDE))  # two chunks a cell
    model, bins = ScBert(replace(EXPRESSED, key_stabiliser=key_stabiliser), seed=3), draw_cells()
    bins[:, :20] = 0  # so they are what shorter cells are padded with
    results = []
    for scale in (1, -50):
        weight = model.pos_emb.emb.weight
        weight.data[:20] *= scale
        encoded = model.encode(bins)
        (gradient,) = torch.autograd.grad(encoded.sin().sum(), weight)
        assert not gradient[:20].any()
        assert gradient[20:].any(1).all()
        results.append((encoded, gradient, model.attention_columns(bins)))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_expressed_genes_under_autocast_are_close_to_full_precision():
    model, bins = ScBert(EXPRESSED, seed=3), draw_cells()
    with torch.autocast("cpu", torch.bfloat16):
        encoded, logits = model.encode(bins), model(bins, bins > 0)
    assert encoded.dtype == torch.float32
    torch.testing.assert_close(encoded, model.encode(bins), atol=0.02, rtol=0)
    torch.testing.assert_close(logits.float(), model(bins, bins > 0), atol=0.02, rtol=0)


def test_all_genes_are_encoded_without_a_mask(monkeypatch):
    model = ScBert(WIDE, seed=3)
    monkeypatch.setattr("scbert.model.encoder.find_entered", None)
    monkeypatch.setattr(
        "scbert.model.attention.summarise_keys", lambda k, v, projection: summarise_keys(k, v, projection)
    )
    assert model(draw_bins(), draw_bins() > 3).shape == (int((draw_bins() > 3).sum()), 7)
    assert model.attention_columns(draw_bins()).shape == (3, 2, 4, 40)


def test_cells_run_in_groups_that_cost_less_than_their_padding():
    lengths = torch.tensor([40, 7, 41, 200, 40, 201, 8])
    for dim, sizes in ((400, [2, 3, 2]), (4, [7])):  # one more group is worth 10 positions, or 1,000
        config = ScBertConfig(n_genes=300, dim=dim, heads=2, dim_head=4, attention="softmax", expressed_only=True)
        groups = group_cells(lengths, config)
        assert [len(where) for where, _ in groups] == sizes
        kept = torch.cat([where.flatten() if present is None else where[present] for where, present in groups])
        assert sorted(kept.tolist()) == list(range(int(lengths.sum())))
    (alike, none), (_, present) = (group_cells(torch.tensor(lengths), config)[0] for lengths in ([3, 3], [3, 4]))
    assert none is None
    assert alike.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert present.sum(1).tolist() == [3, 4]
    (where, present) = group_cells(torch.tensor([3]), replace(config, attention="favor"))[0]
    assert present.tolist() == [[True] * 3 + [False] * 13]  # up to a multiple of 16
    assert where[0, :3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("attention", ["favor", "softmax"])
@pytest.mark.parametrize("kept", [0, 2**40])
def test_gradients_are_those_of_each_cell_alone_whoever_shares_its_batch_and_its_group(monkeypatch, attention, kept):
    monkeypatch.setattr("scbert.model.encoder.KEPT_BYTES", kept)  # all groups run twice, or none
    config = ScBertConfig(n_genes=399, dim=64, depth=2, heads=4, dim_head=16, expressed_only=True, attention=attention)
    model, bins = ScBert(config, seed=3), draw_bins(9, 400)
    bins[torch.arange(400) >= torch.tensor([[400, 31, 30, 0, 250, 252, 31, 90, 399]]).T] = 0
    together = model.encode(bins)
    alone = torch.cat([model.encode(cell[None]) for cell in bins])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=0)
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("to_out")]
    together, alone = (torch.autograd.grad(out.sin().sum(), parameters) for out in (together, alone))
    for one, other in zip(together, alone, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_gradients_of_expressed_genes_are_those_of_all_genes_restricted_to_them():
    """A cell that expresses every gene is the same cell in both modes; of others the all-gene layers get what enters."""
    model, bins = ScBert(WIDE, seed=3), draw_cells()
    parameters = [*model.performer.parameters(), model.token_emb.weight, model.pos_emb.emb.weight]
    theirs = torch.autograd.grad(run_restricted(model, bins, model.run_layers).sin().sum(), parameters)
    model.set_expressed_only(True)
    ours = torch.autograd.grad(model.encode_expressed(bins)[0].sin().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


def test_exact_attention_is_softmax_written_out_and_so_are_its_columns():
    model, bins = ScBert(replace(EXPRESSED, attention="softmax"), seed=3).double(), draw_cells()
    columns = model.attention_columns(bins)
    for cell, own in enumerate(entered(bins)):
        x = (model.token_emb.weight[bins] + model.pos_emb.emb.weight)[cell : cell + 1, own]
        for depth, (attend, feed) in enumerate(model.performer.net.layers):
            mix, normed = attend.fn, attend.norm(x)
            q, k, v = (f(normed).unflatten(2, (4, 16)).transpose(1, 2) for f in (mix.to_q, mix.to_k, mix.to_v))
            matrix = torch.softmax(q @ k.mT / 4, 3)
            torch.testing.assert_close(columns[cell, depth][:, own], matrix.mean(2)[0], atol=1e-7, rtol=1e-5)
            x = x + mix.to_out((matrix @ v).transpose(1, 2).flatten(2))
            x = x + feed(x)
        torch.testing.assert_close(model.encode(bins)[cell, own], model.norm(x)[0], atol=1e-10, rtol=0)
    assert not columns.masked_fill(entered(bins)[:, None, None], 0).any()


def test_exact_attention_is_kept_in_a_bundle_and_needs_expressed_genes(tmp_path):
    model = ScBert(replace(EXPRESSED, attention="softmax"), genes=[f"gene{i}" for i in range(39)], seed=3)
    model.save(tmp_path / "encoder")
    back = scbert.load(tmp_path / "encoder")
    assert back.config.attention == "softmax"
    assert torch.equal(back.encode(draw_cells()), model.encode(draw_cells()))
    favor = ScBert(EXPRESSED, seed=3)
    favor.load_state_dict(model.state_dict())
    assert (favor.encode(draw_cells()) - model.encode(draw_cells())).abs().max() > 1e-3
    with pytest.raises(ValueError, match="attention='softmax' needs expressed_only=True"):
        model.set_expressed_only(False)


def test_a_classifier_reads_expressed_genes_from_their_tokens_and_not_from_a_later_layer(classifier, bins):
    of_all_genes = classifier(bins)
    classifier.encoder.config = replace(classifier.config, expressed_only=True)
    logits = classifier(bins)
    assert torch.equal(logits, classifier.head(*classifier.encoder.encode_expressed(bins)))
    torch.testing.assert_close(logits, classifier.head(classifier.encoder.encode(bins)), atol=1e-6, rtol=1e-6)
    assert (logits - of_all_genes).abs().max() > 1e-3
    with pytest.raises(ValueError, match="all layers must run"):
        classifier(classifier.encoder.embed(bins), 1)


LITTLE = ScBertConfig(n_genes=24, dim=8, depth=2, heads=2, dim_head=4)


def take_step(model, bins):
    cross_entropy(model(bins).flatten(0, 1), bins.flatten()).backward()


def share_gradients(rank, folder):
    """Be one of two processes, and save the gradients of a step on every other cell."""
    torch.set_num_threads(1)
    CHUNK_BYTES["cpu"] = bytes_of(13, LITTLE)  # two chunks a cell
    attention.KEPT_CHUNKS = 1
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = ScBert(LITTLE)
    take_step(DistributedDataParallel(model), draw_bins(4, 25)[rank::2])
    torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="This PyTorch was built without torch.distributed.")
def test_two_processes_share_the_mean_of_their_gradients(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.spawn(share_gradients, (str(tmp_path),), nprocs=2)
    model = ScBert(LITTLE)
    for rank in range(2):
        take_step(model, draw_bins(4, 25)[rank::2])  # gradients add up
    for rank in range(2):
        for parameter, shared in zip(model.parameters(), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(shared, parameter.grad / 2, atol=1e-7, rtol=1e-4)


# Names, sizes and seeds


def test_the_state_dict_holds_exactly_the_published_names(encoder):
    layer = [
        *["0.norm.weight", "0.norm.bias", "0.fn.fast_attention.projection_matrix"],
        *["0.fn.to_q.weight", "0.fn.to_k.weight", "0.fn.to_v.weight", "0.fn.to_out.weight", "0.fn.to_out.bias"],
        *["1.norm.weight", "1.norm.bias"],
        *["1.fn.fn.w1.weight", "1.fn.fn.w1.bias", "1.fn.fn.w2.weight", "1.fn.fn.w2.bias"],
    ]
    expected = ["token_emb.weight", "pos_emb.emb.weight", "norm.weight", "norm.bias", "to_out.weight", "to_out.bias"]
    expected += [f"performer.net.layers.{i}.{name}" for i in range(2) for name in layer]
    assert sorted(encoder.state_dict()) == sorted(expected)

    theirs = Performer(dim=8, depth=2, heads=2, dim_head=4, qkv_bias=False).state_dict()
    theirs = {f"performer.{name}": tensor.shape for name, tensor in theirs.items() if "proj_updater" not in name}
    ours = {name: tensor.shape for name, tensor in encoder.state_dict().items() if name.startswith("performer.")}
    assert ours == theirs


def test_the_published_model_has_the_published_number_of_parameters():
    config = ScBertConfig.published()
    model = ScBert(config, gene_vectors=np.zeros((16_906, 200), dtype=np.float32))
    assert (config.n_features, config.mask_token) == (266, 6)
    assert count(model.parameters()) == 8_388_607
    assert count(model.pos_emb.parameters()) == 3_381_400
    assert count(model.performer.net.layers[0].parameters()) == 834_000
    assert count(AnnotationHead(config, n_classes=11).parameters()) == 8_724_180


@pytest.mark.parametrize("gene_embedding", ["learned", "none"])
def test_the_number_of_parameters_follows_from_the_config(gene_embedding):
    genes, bins, dim, depth, inner = 24, 3, 12, 3, 2 * 5
    config = ScBertConfig(genes, n_bins=bins, dim=dim, depth=depth, heads=2, dim_head=5, gene_embedding=gene_embedding)
    attention = 3 * dim * inner + inner * dim + dim
    feed_forward = 2 * 4 * dim * dim + 4 * dim + dim
    layers = depth * (attention + feed_forward + 2 * 2 * dim)
    embeddings = (bins + 2) * dim + (genes + 1) * dim * (gene_embedding == "learned")
    assert count(ScBert(config).parameters()) == embeddings + layers + 2 * dim + (dim + 1) * (bins + 2)


def test_the_seed_fixes_the_weights_and_leaves_the_global_generator_alone(config):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, head = ScBert(config, seed=5).state_dict(), AnnotationHead(config, 3, seed=5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, head_again = ScBert(config, seed=5).state_dict(), AnnotationHead(config, 3, seed=5).state_dict()
    other = ScBert(config, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(head[name], head_again[name]) for name in head)
    drawn = [name for name in first if "norm" not in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_layers_have_random_features_of_their_own_and_redrawing_is_seeded(encoder):
    def features():
        return [layer[0].fn.fast_attention.projection_matrix.clone() for layer in encoder.performer.net.layers]

    first = features()
    assert not torch.equal(*first)
    encoder.redraw_features(0)  # the model's own seed
    assert all(torch.equal(a, b) for a, b in zip(first, features(), strict=True))
    encoder.redraw_features(7)
    second = features()
    encoder.redraw_features(8)
    encoder.redraw_features(7)
    assert all(torch.equal(a, b) for a, b in zip(second, features(), strict=True))
    assert not torch.equal(first[0], second[0])


def test_frozen_gene_vectors_are_followed_by_a_zero_vector_and_do_not_learn(config):
    vectors = np.arange(24 * 8, dtype=np.float32).reshape(24, 8)
    model = ScBert(ScBertConfig(24, dim=8, depth=1, heads=2, dim_head=4, gene_embedding="frozen"), vectors)
    weight = model.pos_emb.emb.weight
    assert torch.equal(weight[:-1], torch.from_numpy(vectors))
    assert not weight[-1].any()
    assert not weight.requires_grad


@pytest.mark.parametrize("gene_embedding", ["frozen", "learned"])
def test_gene_vectors_come_with_a_frozen_embedding_and_with_no_other(gene_embedding):
    config = ScBertConfig(24, dim=8, heads=2, dim_head=4, gene_embedding=gene_embedding)
    with pytest.raises(ValueError, match="needed for, and only for, gene_embedding='frozen'"):
        ScBert(config, None if gene_embedding == "frozen" else np.zeros((24, 8)))


def test_gene_vectors_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(24, 9\), but the config needs \(24, 8\)"):
        ScBert(ScBertConfig(24, dim=8, depth=1, heads=2, dim_head=4, gene_embedding="frozen"), np.zeros((24, 9)))


def test_another_number_of_gene_names_is_refused(config):
    with pytest.raises(ValueError, match="for 24 genes, but 23 names"):
        ScBert(config, genes=GENES[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_genes": 0}, "at least 1"),
        ({"dim": 9}, r"dim \(9\) must be a multiple of heads \(2\)"),
        ({"gene_embedding": "gene2vec"}, "'frozen', 'learned' or 'none', not 'gene2vec'"),
        ({"key_stabiliser": "cell"}, "'head' or 'batch', not 'cell'"),
        ({"attention": "exact"}, "'favor' or 'softmax', not 'exact'"),
        ({"attention": "softmax"}, "needs expressed_only=True"),
        ({"expressed_only": True, "gene_embedding": "none"}, "expressed_only needs a gene embedding"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ScBertConfig(**{"n_genes": 24, "dim": 8, "heads": 2, **change})


@pytest.mark.parametrize("width", [24, 26])
def test_cells_of_another_width_are_refused(encoder, width):
    with pytest.raises(ValueError, match=r"this model reads \(cells, 25\): one token a gene and a trailing 0"):
        encoder.encode(torch.zeros(2, width, dtype=torch.int64))


def test_logits_can_be_had_for_some_positions_only(encoder, bins):
    where = torch.zeros_like(bins, dtype=torch.bool)
    where[0, 3] = where[7, 20] = True
    every = encoder(bins)
    assert every.shape == (10, 25, 7)
    torch.testing.assert_close(encoder(bins, where), torch.stack([every[0, 3], every[7, 20]]))


def test_gene_embeddings_can_be_left_out_and_then_order_does_not_matter(bins):
    model = ScBert(ScBertConfig(24, dim=8, depth=1, heads=2, dim_head=4, gene_embedding="none"))
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.encode(bins)[:, order], model.encode(bins[:, order]))


def test_a_model_without_layers_is_its_embeddings_and_norm(bins):
    model = ScBert(ScBertConfig(24, dim=8, depth=0, heads=2, dim_head=4))
    torch.testing.assert_close(model.encode(bins), model.norm(model.token_emb(bins) + model.pos_emb.emb.weight))


# Bundles


@pytest.mark.parametrize("gene_embedding", ["learned", "none", "frozen"])
def test_an_encoder_comes_back_from_its_bundle(tmp_path, bins, gene_embedding):
    config = ScBertConfig(24, dim=8, depth=2, heads=2, dim_head=4, gene_embedding=gene_embedding)
    model = ScBert(config, np.random.rand(24, 8) if gene_embedding == "frozen" else None, genes=GENES, seed=1)
    model.save(tmp_path / "encoder")
    back = scbert.load(tmp_path / "encoder")
    assert isinstance(back, ScBert)
    assert (back.config, back.genes) == (config, GENES)
    assert torch.equal(back(bins), model(bins))


def test_a_classifier_comes_back_from_its_bundle(tmp_path, bins, classifier):
    classifier.save(tmp_path / "deeper" / "classifier", card="# Mine\n")
    back = scbert.load(tmp_path / "deeper" / "classifier")
    assert (back.config, back.genes, back.labels) == (classifier.config, classifier.genes, ["B", "Monocyte", "T/NK"])
    assert torch.equal(back(bins), classifier(bins))
    assert not back.training
    files = {path.name for path in (tmp_path / "deeper" / "classifier").iterdir()}
    assert files == {
        *("model.safetensors", "memory.safetensors", "config.json", "genes.txt", "labels.json", "README.md")
    }
    assert (tmp_path / "deeper" / "classifier" / "README.md").read_text().startswith("# Mine\n\nThe training ")
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["classifier"]


def test_a_bundle_remembers_the_key_stabiliser(tmp_path, bins, classifier):
    classifier.encoder.set_key_stabiliser("batch")
    classifier.save(tmp_path / "published")
    back = scbert.load(tmp_path / "published")
    assert torch.equal(back(bins), classifier(bins))
    assert back.config.key_stabiliser == "batch"


def test_a_bundle_remembers_whether_only_expressed_genes_enter(tmp_path, bins, config):
    model = ScBert(replace(config, expressed_only=True), genes=GENES)
    model.save(tmp_path / "encoder")
    back = scbert.load(tmp_path / "encoder")
    assert back.config.expressed_only
    assert torch.equal(back(bins), model(bins))
    assert "expressed genes only" in (tmp_path / "encoder" / "README.md").read_text()


def test_in_a_bundle_from_before_there_was_a_choice_all_genes_enter(tmp_path, bins, encoder):
    encoder.genes = GENES
    encoder.save(tmp_path / "encoder")
    about = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert about.pop("expressed_only") is False
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="is damaged, copy or train it again .config.json is not what was written"):
        scbert.load(tmp_path / "encoder")
    del about["sha256"]
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(about))
    back = scbert.load(tmp_path / "encoder")
    assert back.config == encoder.config
    assert torch.equal(back(bins), encoder(bins))


def test_a_bundle_replaces_an_older_one(tmp_path, config):
    for seed in (0, 1):
        ScBert(config, genes=GENES, seed=seed).save(tmp_path / "encoder")
    back = scbert.load(tmp_path / "encoder")
    assert torch.equal(back.norm.weight, torch.ones(8))
    assert torch.equal(back.token_emb.weight, ScBert(config, seed=1).token_emb.weight)


def test_a_folder_with_anything_else_in_it_is_not_replaced_by_a_bundle(tmp_path, classifier):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ValueError, match="is no model bundle"):
        classifier.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_a_model_without_gene_names_is_not_saved(tmp_path, encoder):
    with pytest.raises(ValueError, match="no gene names yet"):
        encoder.save(tmp_path / "encoder")
    assert not list(tmp_path.iterdir())


def remove(name):
    return lambda bundle: (bundle / name).unlink()


def truncate(bundle):
    weights = (bundle / "model.safetensors").read_bytes()
    (bundle / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def edit_genes(bundle):
    file = bundle / "genes.txt"
    file.write_text(file.read_text().replace("gene3\n", "geneX\n"))


def edit(name, change):
    def apply(bundle):
        found = change(json.loads((bundle / name).read_text()))
        if isinstance(found, dict):
            found.pop("sha256")  # as of an older one, that has no hash of its config
        (bundle / name).write_text(json.dumps(found))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "is not a model bundle: config.json is missing"),
        (remove("genes.txt"), "is not a model bundle: genes.txt is missing"),
        (remove("model.safetensors"), "is not a model bundle: model.safetensors is missing"),
        (remove("labels.json"), "labels.json of .* is not the list of its labels"),
        (truncate, "is damaged, copy or train it again"),
        (edit_genes, "genes.txt of .* is not the gene list of its weights"),
        (edit("config.json", lambda c: c | {"n_bins": 7}), "do not fit its config: .* shape .* number of bins"),
        (edit("config.json", lambda c: c | {"n_genes": 30}), "has 24 gene names, but its config says 30"),
        (edit("config.json", lambda c: c | {"format": 2}), "written by another version"),
        (edit("labels.json", lambda labels: [*labels, "NK"]), "labels.json of .* is not the list of its labels"),
        (edit("labels.json", lambda labels: labels[::-1]), "labels.json of .* is not the list of its labels"),
        (lambda bundle: (bundle / "config.json").write_text("{"), "is damaged"),
    ],
)
def test_a_bundle_that_does_not_fit_together_says_so_in_one_sentence(tmp_path, classifier, damage, message):
    classifier.save(tmp_path / "bundle")
    damage(tmp_path / "bundle")
    with pytest.raises(ValueError, match=message) as error:
        scbert.load(tmp_path / "bundle")
    assert "\n" not in str(error.value)


def test_a_path_that_is_no_folder_is_not_a_bundle(tmp_path):
    (tmp_path / "cells.h5ad").write_text("")
    for name in ("cells.h5ad", "nowhere"):
        with pytest.raises(ValueError, match=f"{name} is not a model bundle"):
            scbert.load(tmp_path / name)


@pytest.mark.parametrize(("shape", "threads"), [({"expressed_only": True}, 1), ({}, 2),
                                                ({"expressed_only": True, "dim": 200}, 2)])  # fmt: skip
def test_small_groups_have_one_thread_and_the_others_come_back(shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), few_threads(scbert.ScBertConfig(**{"n_genes": 5, "dim": 20, "heads": 2} | shape)):
            assert torch.get_num_threads() == threads
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_silent_gene_passes_nothing_through_the_sound_head_and_the_bias_through_the_published(config, bins, tmp_path):
    encoder = ScBert(replace(config, expressed_only=True), genes=GENES)
    sound, published = (scbert.Classifier(encoder, ["a", "b"], head=kind) for kind in ("sound", "published"))
    with torch.no_grad():
        for classifier in (sound, published):
            classifier.head.conv.bias.fill_(1.0)
        hidden, entered = encoder.encode_expressed(bins)
        every = sound.head.conv(encoder.encode(bins)[:, None]).flatten(1)  # the bias alone where a gene is silent
        assert torch.allclose(published(bins), published.head.dense(every.relu()), atol=1e-6)
        assert torch.allclose(sound(bins), sound.head.dense(every.masked_fill(~entered, 0).relu()), atol=1e-6)
        assert not torch.allclose(sound(bins), published(bins), atol=1e-3)
    for classifier in (sound, published):
        classifier.save(tmp_path / "bundle")
        assert torch.equal(scbert.load(tmp_path / "bundle")(bins), classifier(bins))
    about = json.loads((tmp_path / "bundle" / "config.json").read_text())
    del about["head"]  # as in bundles of before
    del about["sha256"]
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(about))
    assert torch.equal(scbert.load(tmp_path / "bundle")(bins), published(bins))


def test_a_sound_head_starts_where_three_quarters_of_the_encoded_genes_pass(config, bins):
    encoder = ScBert(replace(config, expressed_only=True), genes=GENES)
    head, hidden = AnnotationHead(encoder.config, 3), encoder.encode_expressed(bins)[0]
    head.start(hidden)
    passing = head.conv(hidden[None, None]).flatten() > 0
    assert passing.float().mean() == pytest.approx(0.75, abs=0.01)


# Bundles that are damaged, or in the way.


@pytest.fixture
def bundle(tmp_path, classifier):
    classifier.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_flipped_bit_of_the_weights_is_noticed(bundle):
    file = bundle / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 64
    file.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"is damaged, copy or train it again \(model.safetensors is not what was written"
    ):
        scbert.load(bundle)


def test_weights_that_are_not_finite_are_refused(bundle, classifier):
    with torch.no_grad():
        next(classifier.parameters())[0] = float("nan")
    classifier.save(bundle)
    with pytest.raises(ValueError, match="hold NaN or infinite numbers: train it again"):
        scbert.load(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_genes", None), ("n_bins", "5"), ("depth", 2.5), ("heads", 0), ("dim_head", 1), ("unknown", 1), ("dim", 20_000),
     ("expressed_only", "no"), ("depth", 3)],
)  # fmt: skip
def test_a_config_of_another_kind_is_refused_before_memory_is_taken(bundle, key, value):
    about = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(about | {key: value}))
    with pytest.raises(ValueError, match=str(bundle)):
        scbert.load(bundle)


def test_killed_between_two_bundles_the_one_before_is_read_and_written_over(bundle, classifier):
    bundle.rename(bundle.with_name("bundle.before"))  # where it is while the new one takes its place
    assert scbert.load(bundle).labels == classifier.labels
    bundle.rename(bundle.with_name("bundle.before"))
    (bundle.parent / "bundle.123.tmp").mkdir()
    classifier.save(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("others", [{"notes.txt": "mine"}, {"config.json": '{"my": "settings"}'}])
def test_a_folder_with_other_files_is_never_written_over(tmp_path, classifier, bundle, others):
    for name, text in others.items():
        (bundle / name).write_text(text)
    with pytest.raises(ValueError, match="is no model bundle, or has other files too"):
        classifier.save(bundle)
    assert all((bundle / name).read_text() == text for name, text in others.items())


def test_gene_names_of_any_kind_come_back(tmp_path, config):
    genes = ["G0\r", "G\u2028x", "G\x1cx", *(f"gene{i}" for i in range(config.n_genes - 3))]
    scbert.ScBert(config, genes=genes).save(tmp_path / "a")
    assert scbert.load(tmp_path / "a").genes == genes
    with pytest.raises(ValueError, match="has a line end in it: rename it"):
        scbert.ScBert(config, genes=["a\nb", *genes[1:]]).save(tmp_path / "b")


def test_labels_on_a_card_are_no_html(tmp_path, config):
    encoder = scbert.ScBert(config, genes=[f"gene{i}" for i in range(config.n_genes)])
    scbert.Classifier(encoder, ["<b>x</b>", "T\ncell"]).save(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "annotator of 2 cell types: `<b>x</b>`\n" in card
