"""The scBERT encoder.

The encoder is performer-pytorch's `Performer` under the published parameter names, with our attention
plugged in. See design, "The model, exactly": token embedding + gene embedding -> Performer -> LayerNorm.

In the mode ``expressed_only`` the sequence of a cell is the genes it expresses, in place of all genes: what names a
gene is the embedding added to its token, not its place. Later models, scGPT and Geneformer, read cells so, and
avoid thereby most of scBERT's expense, which grows with the length of the sequence and not with what is in it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from performer_pytorch import Performer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import FavorAttention, attend_in_chunks, draw_projection, features_first, weigh_queries
from .bundle import write_bundle
from .config import ScBertConfig
from .packed import group_cells, run_packed, run_softmax_layer
from .published import check_shapes, read_published

KEPT_BYTES = 4 * 2**30
"""Features that a batch of expressed genes keeps for its backward pass, at most, in all layers together."""


class _GeneEmbedding(nn.Module):
    """A vector for each gene, and one for the trailing token; exists for the published name `pos_emb.emb`."""

    def __init__(self, n_positions, dim):
        super().__init__()
        self.emb = nn.Embedding(n_positions, dim)


class ScBert(nn.Module):
    """The encoder with its masked-expression head.

    Parameters
    ----------
    config
        The shape.
    gene_vectors
        (genes, dim), frozen; needed for, and only for, ``gene_embedding="frozen"``.
    genes
        The names behind the columns; `pretrain` and `finetune` fill them in from the data.
    seed
        Fixes the initial weights and random features, whatever the global generator holds.

    Raises
    ------
    ValueError
        Gene vectors missing, unwanted or of another shape; another number of gene names than the config says.

    Paper: Methods, "scBERT architecture"; Fig. 1a.
    Differs from the published code: random features are drawn from `seed` and redrawn on our own schedule; the
    gene embedding is added out of place and in float32, and may be learned or left out. With
    ``config.expressed_only``, positions of token 0 but the trailing one neither attend nor are attended to, and their
    encodings are zero, where the script runs every gene of the vocabulary through every layer. The weights have the
    same names and shapes in both modes, but compute other things: use them in the mode they learnt in, or train on in the other.
    """

    def __init__(
        self,
        config: ScBertConfig,
        gene_vectors: np.ndarray | torch.Tensor | None = None,
        genes: Sequence[str] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if (gene_vectors is None) == (config.gene_embedding == "frozen"):
            raise ValueError("gene_vectors are needed for, and only for, gene_embedding='frozen'.")
        if genes is not None and len(genes) != config.n_genes:
            raise ValueError(f"The config is for {config.n_genes} genes, but {len(genes)} names were given.")
        self.config = config
        self.genes = None if genes is None else list(genes)
        self.register_buffer("genes_seen", None, persistent=False)  # (genes + 1,) see `hide_unseen`; None: all
        self.licence = ""  # of the weights, where it is not the trainer's to choose; travels with bundles
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token_emb = nn.Embedding(config.n_bins + 2, config.dim)
            if config.gene_embedding != "none":
                self.pos_emb = _GeneEmbedding(config.n_genes + 1, config.dim)
            self.performer = Performer(
                dim=config.dim,
                depth=config.depth,
                heads=config.heads,
                dim_head=config.dim_head,
                qkv_bias=False,
                attn_out_bias=True,
                auto_check_redraw=False,
            )
            self.norm = nn.LayerNorm(config.dim)
            self.to_out = nn.Linear(config.dim, config.n_bins + 2)
        del self.performer.proj_updater  # its aliases would stand in the state_dict; the redraw schedule is ours
        for layer in self.performer.net.layers:
            attention = layer[0].fn
            attention.fast_attention = FavorAttention(attention.fast_attention.projection_matrix, config.key_stabiliser)
        self.redraw_features(seed)
        if gene_vectors is not None:
            self._set_gene_vectors(torch.as_tensor(gene_vectors, dtype=torch.float32))

    @classmethod
    def from_published(
        cls,
        path_or_state_dict: str | Path | Mapping,
        genes: Sequence[str],
        *,
        n_bins: int | None = None,
        key_stabiliser: str = "head",
    ) -> "ScBert":
        """Make an encoder of published weights, in either public layout, or of one's own by the published scripts.

        `path_or_state_dict` is a torch file or what one holds, see `scbert.published.read_weights`; the config is read off
        its shapes. `genes` are the names behind the columns: for 16,906 genes they must be the published ones in their
        order, `scbert.genes.load_vocabulary`; else only their number is checked. `scbert.load_encoder` fetches them itself.
        `n_bins`, the highest expression token, is checked; if None it is whatever the weights have (5 as published). The
        `key_stabiliser` "batch" is how the published weights were trained.

        Returned is the encoder in evaluation mode, its gene embedding frozen, or "none" if the weights have no gene
        vectors. A ValueError if a file is missing, damaged or no weights, or if bins or genes are others.

        Differs from the published code: nothing in the file is run, the vocabulary is checked, and gene vectors are
        in float32.
        """
        found = read_published(path_or_state_dict, genes, _name_weights, n_bins=n_bins, key_stabiliser=key_stabiliser)
        model = cls(found.config, found.gene_vectors, found.genes)
        check_shapes(found, model.state_dict())
        model.load_state_dict(found.weights)  # the last row of pos_emb too, which stands for the trailing token
        model.licence = found.licence
        return model.eval()

    def _set_gene_vectors(self, vectors):
        expected = (self.config.n_genes, self.config.dim)
        if tuple(vectors.shape) != expected:
            raise ValueError(f"gene_vectors have shape {tuple(vectors.shape)}, but the config needs {expected}.")
        weight = torch.cat([vectors, torch.zeros(1, self.config.dim)])  # the trailing token has a zero vector
        self.pos_emb.emb.weight = nn.Parameter(weight, requires_grad=False)

    def redraw_features(self, seed: int) -> None:
        """Draw new random features for every layer from `seed`, alike on every rank."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.performer.net.layers:
            projection = layer[0].fn.fast_attention.projection_matrix
            projection.copy_(draw_projection(self.config.n_features, self.config.dim_head, generator))

    def set_key_stabiliser(self, key_stabiliser: str) -> None:
        """Switch every layer to one stabiliser per cell and head ("head") or per batch ("batch")."""
        for layer in self.performer.net.layers:
            layer[0].fn.fast_attention.key_stabiliser = key_stabiliser
        self.config = replace(self.config, key_stabiliser=key_stabiliser)  # a bundle must remember it

    def set_expressed_only(self, expressed_only: bool) -> None:
        """Switch the mode, see `ScBertConfig.expressed_only`: weights of one have to be trained on in the other."""
        self.config = replace(self.config, expressed_only=expressed_only)

    def encode(self, bins: torch.Tensor) -> torch.Tensor:
        """Encode expression tokens.

        Parameters
        ----------
        bins
            (cells, genes + 1), integer tokens 0 ... n_bins + 1, the last column 0.

        Returns
        -------
        (cells, genes + 1, dim). With ``config.expressed_only`` a gene of token 0 has zeros. A ValueError if there is
        another number of columns than ``n_genes + 1``.
        """
        if not self.config.expressed_only:
            return self.norm(self.run_layers(self.embed(bins)))
        packed, entered = self.encode_expressed(bins)
        every = packed.new_zeros(*bins.shape, packed.shape[1])  # (cells, genes + 1, dim)
        return every.masked_scatter(entered[..., None], packed)

    def encode_expressed(self, bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode, in the mode ``expressed_only``, what enters: (positions, dim), cell after cell, without padding.

        Also returned is which these are, booleans (cells, genes + 1). Cells of about one length run together, see
        `group_cells`; a batch whose layers would keep more than `KEPT_BYTES` of features runs its groups twice instead.
        """
        self._check_shape(bins)
        bins, config = self.hide_unseen(bins), self.config
        entered = find_entered(bins)
        x = self.token_emb(bins[entered]) + self.pos_emb.emb(entered.nonzero()[:, 1])  # (positions, dim)
        run, kept = self._run_packed, 8 * len(x) * config.depth * config.heads * config.n_features
        if torch.is_grad_enabled() and kept > KEPT_BYTES:
            run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        groups = group_cells(entered.sum(1), config)
        rows = torch.cat([where.flatten() if present is None else where[present] for where, present in groups])
        done = torch.cat([run(x, *group) for group in groups])
        return self.norm(torch.empty_like(done).index_copy(0, rows, done)), entered

    def _run_packed(self, x, where, present):
        """Run the layers on rows of x, (positions, dim), as one tensor (cells, longest, dim); return those present."""
        x = self.run_expressed(F.embedding(where, x), present)
        return x.flatten(0, 1) if present is None else x[present]

    def run_layers(self, x: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Run layers start ... stop - 1 on (cells, positions, dim); the last layer's norm is left to `encode`."""
        for layer in self.performer.net.layers[start:stop]:
            x = run_layer(layer, x)
        return x

    def run_expressed(self, x: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
        """Run all layers on expressed positions, (cells, positions, dim); padding is where `present` is false."""
        return run_packed(self.performer.net.layers, x, present, self.config.attention)

    def embed(self, bins: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return what enters the first layer, (cells, genes + 1, dim): token embedding plus gene embedding.

        With `positions`, (cells, some number) of columns of `bins`, of those alone.
        """
        self._check_shape(bins)
        bins = self.hide_unseen(bins)
        x = self.token_emb(bins if positions is None else bins.gather(1, positions))  # (cells, genes + 1, dim)
        if self.config.gene_embedding == "none":
            return x
        return x + (self.pos_emb.emb.weight if positions is None else self.pos_emb.emb(positions))

    def hide_unseen(self, bins: torch.Tensor) -> torch.Tensor:
        """Return tokens (cells, genes + 1) with 0 at genes that no cell of fine-tuning expressed, as it was in training.

        An encoder may know more genes than the file it was fine-tuned on: its head never learnt to read those of a query.
        """
        return bins if self.genes_seen is None else bins * self.genes_seen

    def _check_shape(self, bins):
        if bins.ndim != 2 or bins.shape[1] != self.config.n_genes + 1:
            raise ValueError(
                f"bins have shape {tuple(bins.shape)}, but this model reads (cells, {self.config.n_genes + 1}): "
                "one token a gene and a trailing 0."
            )

    @torch.no_grad()
    def attention_columns(self, bins: torch.Tensor, expressed_only: bool = False) -> torch.Tensor:
        """Return the attention each gene receives, per layer and head, averaged over the genes that attend: no n x n matrix.

        With `expressed_only` over genes with a non-zero token only, else over all positions that enter the encoder.

        Returned is (cells, depth, heads, genes + 1); each row sums to one. With ``config.expressed_only`` a gene of token 0
        receives nothing, and each cell is a batch of its own.

        Paper: Methods, "attention matrix"; Fig. 5. Differs from the published code: the mean over rows follows from sums
        over features, where the script holds every head's positions x positions matrix (as exact attention does here).
        """
        self._check_shape(bins)
        bins = self.hide_unseen(bins)
        attending = bins > 0 if expressed_only else torch.ones_like(bins)
        if not self.config.expressed_only:
            return self._receive(self.embed(bins), attending)
        every = self.norm.weight.new_zeros(len(bins), self.config.depth, self.config.heads, bins.shape[1])
        for cell, own in enumerate(find_entered(bins)):
            x = self.embed(bins[cell : cell + 1], own.nonzero().T)
            every[cell, ..., own] = self._receive(x, attending[cell : cell + 1, own])[0].to(every.dtype)
        return every

    def _receive(self, x, attending):
        """Return the attention that positions receive, (cells, depth, heads, positions), of what enters the first layer."""
        run = run_softmax_layer if self.config.attention == "softmax" else run_layer
        weight, columns = weigh_queries(attending.float()), []
        for layer in self.performer.net.layers:
            x, received = run(layer, x, weight)
            columns.append(received)
        return torch.stack(columns, 1)

    def forward(self, bins: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        """Predict tokens: logits (cells, genes + 1, n_bins + 2), or (positions, n_bins + 2) where a boolean is true."""
        if where is None or not self.config.expressed_only:
            hidden = self.encode(bins)
            return self.to_out(hidden if where is None else hidden[where])
        packed, entered = self.encode_expressed(bins)  # in place of (cells, genes + 1, dim)
        hidden = packed.new_zeros(int(where.sum()), packed.shape[1])
        hidden[entered[where]] = packed[where[entered]]
        return self.to_out(hidden)

    def save(self, path: str | Path, card: str = "") -> None:
        """Write the encoder as a bundle directory, see `load`."""
        write_bundle(path, self.state_dict(), self.config, self.genes, licence=self.licence, card=card)


def _name_weights(depth, gene_embedding):
    """Return the names of the weights of an encoder of so many layers."""
    least = ScBertConfig(1, 1, dim=2, depth=depth, heads=1, dim_head=2, gene_embedding=gene_embedding)
    return list(ScBert(least).state_dict())


def find_entered(bins: torch.Tensor) -> torch.Tensor:
    """Say which of (cells, genes + 1) enter in the mode ``expressed_only``: non-zero tokens and the trailing one."""
    entered = bins > 0
    entered[:, -1] = True
    return entered


def run_layer(
    layer: nn.ModuleList, x: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run one encoder layer in two passes over chunks of positions: read all keys, then let each position attend.

    Norms, projections and the feed-forward part live inside the chunk. So memory is the input and the output, and
    some three times `scbert.attention.CHUNK_BYTES`; in training, of `scbert.attention.KEPT_CHUNKS` chunks at most,
    and beyond them one tensor shaped as `x` for each layer.

    `layer` is one of ``performer.net.layers``, attention and feed-forward, each behind its norm, and `x` what enters it,
    (cells, positions, dim). Returned is what leaves it, and with a `weight` also what `attend_in_chunks` does with one.

    Paper: Methods, "Performer encoder". Differs from the published code: what it computes does not; how it does.
    """
    (attention_norm, attention), (feed_norm, feed) = ((part.norm, part.fn) for part in layer)
    heads, favor = attention.heads, attention.fast_attention
    linear = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v}

    def project(names, x):  # (cells, positions, dim) -> (cells * heads, dim_head, positions), each
        x = attention_norm(x)
        return [features_first(linear[name](x).unflatten(2, (heads, -1))) for name in names]

    def finish(out, x):
        x = x + attention.to_out(out.view(len(x), -1, x.shape[1]).mT)
        return x + feed(feed_norm(x))

    x, received = attend_in_chunks(
        (x,), heads, favor.projection_matrix, favor.key_stabiliser, project, finish, weight=weight
    )
    return x if weight is None else (x, received)
