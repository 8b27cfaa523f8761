"""The scBERT encoder, its annotation head, and the bundles they are kept in.

The encoder is performer-pytorch's `Performer` under the published parameter names, with our attention
plugged in. See design, "The model, exactly": token embedding + gene embedding -> Performer -> LayerNorm.

In the mode ``expressed_only`` the sequence of a cell is the genes it expresses, in place of all genes: what names a
gene is the embedding added to its token, not its place. Later models, scGPT and Geneformer, read cells so, and
avoid thereby most of scBERT's expense, which grows with the length of the sequence and not with what is in it.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from performer_pytorch import Performer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..sources import genes as gene_lists
from .attention import (
    FavorAttention,
    attend,
    draw_projection,
    features_first,
    map_chunks,
    pair_queries,
    positions_first,
    read_chunks,
    split_chunks,
    summarise_keys,
    weigh_keys,
    weigh_queries,
)
from ..run.record import say_licence


@dataclass(frozen=True)
class ScBertConfig:
    """Shape of a model. Paper: Methods, "scBERT architecture"; sizes that it leaves out are the script's."""

    n_genes: int
    """Genes in the vocabulary; a trailing token 0 makes the sequence one longer."""
    n_bins: int = 5
    """Highest expression token; token ``n_bins + 1`` is the mask, so there are ``n_bins + 2`` in all."""
    dim: int = 200
    depth: int = 6
    """Encoder layers; 0 leaves the embeddings and the norm alone (a control)."""
    heads: int = 10
    dim_head: int = 64
    gene_embedding: str = "learned"
    """"frozen" (vectors given, as published), "learned", or "none"."""
    key_stabiliser: str = "head"
    """"head": a cell's result does not depend on its batch; "batch": as published."""
    expressed_only: bool = False
    """Only genes with a non-zero token enter the encoder, and the trailing token: see `ScBert`. Not as published."""

    def __post_init__(self):
        if self.n_genes < 1 or self.n_bins < 1 or self.dim < 1 or self.depth < 0:
            raise ValueError(f"n_genes, n_bins and dim must be at least 1 and depth at least 0, got {self}.")
        if self.depth and self.dim % self.heads:
            raise ValueError(
                f"dim ({self.dim}) must be a multiple of heads ({self.heads}): performer-pytorch needs it."
            )
        if self.gene_embedding not in ("frozen", "learned", "none"):
            raise ValueError(f"gene_embedding must be 'frozen', 'learned' or 'none', not {self.gene_embedding!r}.")
        if self.key_stabiliser not in ("head", "batch"):
            raise ValueError(f"key_stabiliser must be 'head' or 'batch', not {self.key_stabiliser!r}.")
        if self.expressed_only and self.gene_embedding == "none":
            raise ValueError(
                "expressed_only needs a gene embedding, 'learned' or 'frozen': without one nothing tells the genes of "
                "a cell apart."
            )

    @classmethod
    def published(cls) -> "ScBertConfig":
        """Return the published shape: 16,906 genes, 6 layers, 10 heads of 64, dim 200, frozen gene2vec."""
        return cls(n_genes=16_906, gene_embedding="frozen")

    @property
    def n_features(self) -> int:
        """Random features a head: int(d ln d), 266 for heads of 64."""
        return int(self.dim_head * math.log(self.dim_head))

    @property
    def mask_token(self) -> int:
        """The token that hides an expression value."""
        return self.n_bins + 1


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
        genes: Sequence[str] | None = None,
        *,
        n_bins: int | None = None,
        key_stabiliser: str = "head",
    ) -> "ScBert":
        """Make an encoder of published weights, in either public layout, or of one's own by the published scripts.

        Parameters
        ----------
        path_or_state_dict
            A torch file or what one holds, see `scbert.published.read_weights`. The config is read off its shapes.
        genes
            The names behind the columns; if None the published vocabulary, which `scbert.genes.load_vocabulary`
            fetches. For 16,906 genes they must be those, in their order; else only their number is checked.
        n_bins
            Highest expression token, checked; if None whatever the weights have (5 as published).
        key_stabiliser
            "head": a cell's result does not depend on its batch; "batch": as the weights were trained, so what is
            published about them was computed so.

        Returns
        -------
        The encoder in evaluation mode, its gene embedding frozen, or "none" if the weights have no gene vectors.

        Raises
        ------
        ValueError
            A file that is missing, damaged, or of other things than tensors; weights of another model, or with NaN
            or infinity; another number of bins; other genes.

        Differs from the published code: nothing in the file is run, the vocabulary is checked, and gene vectors are
        in float32.
        """
        from .published import read_published

        return read_published(path_or_state_dict, genes, n_bins=n_bins, key_stabiliser=key_stabiliser)

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
        (cells, genes + 1, dim). With ``config.expressed_only`` a gene of token 0 has zeros.

        Raises
        ------
        ValueError
            Another number of columns than ``n_genes + 1``.
        """
        if not self.config.expressed_only:
            return self.norm(self.run_layers(self.embed(bins)))
        hidden, positions, present = self._encode_expressed(bins)
        hidden = hidden.masked_fill(~present[..., None], 0)
        every = hidden.new_zeros(*bins.shape, hidden.shape[2])  # (cells, genes + 1, dim)
        return every.scatter(1, positions[..., None].expand_as(hidden), hidden)

    def _encode_expressed(self, bins):
        """Encode the positions that `find_expressed` finds; return (cells, longest, dim), and what it returns."""
        self._check_shape(bins)
        positions, present = find_expressed(bins)
        return self.norm(self.run_layers(self.embed(bins, positions), present=present)), positions, present

    def run_layers(
        self, x: torch.Tensor, start: int = 0, stop: int | None = None, present: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run layers start ... stop - 1 on (cells, positions, dim); the last layer's norm is left to `encode`.

        Positions where the boolean `present`, (cells, positions), is false are padding, see `run_layer`.
        """
        for layer in self.performer.net.layers[start:stop]:
            x = run_layer(layer, x, present=present)
        return x

    def embed(self, bins: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return what enters the first layer, (cells, genes + 1, dim): token embedding plus gene embedding.

        With `positions`, (cells, some number) of columns of `bins`, of those alone.
        """
        self._check_shape(bins)
        if positions is not None:
            return self.token_emb(bins.gather(1, positions)) + self.pos_emb.emb(positions)
        x = self.token_emb(bins)  # (cells, genes + 1, dim)
        return x if self.config.gene_embedding == "none" else x + self.pos_emb.emb.weight

    def _check_shape(self, bins):
        if bins.ndim != 2 or bins.shape[1] != self.config.n_genes + 1:
            raise ValueError(
                f"bins have shape {tuple(bins.shape)}, but this model reads (cells, {self.config.n_genes + 1}): "
                "one token a gene and a trailing 0."
            )

    @torch.no_grad()
    def attention_columns(self, bins: torch.Tensor, expressed_only: bool = False) -> torch.Tensor:
        """Return the attention each gene receives, per layer and head, averaged over the genes that attend.

        Parameters
        ----------
        bins
            As in `encode`.
        expressed_only
            Average over genes with a non-zero token only. Else over all positions that enter the encoder.

        Returns
        -------
        (cells, depth, heads, genes + 1); each row sums to one. With ``config.expressed_only`` a gene of token 0
        receives nothing.

        Paper: Methods, "attention matrix"; Fig. 5. See `scbert.attention.attention_columns`.
        """
        self._check_shape(bins)
        attending = bins > 0 if expressed_only else torch.ones_like(bins)
        positions = present = None
        if self.config.expressed_only:
            positions, present = find_expressed(bins)
            attending = attending.gather(1, positions) * present
        weight = weigh_queries(attending.float())
        x, columns = self.embed(bins, positions), []
        for layer in self.performer.net.layers:
            x, received = run_layer(layer, x, weight, present)
            columns.append(received)
        columns = torch.stack(columns, 1)  # (cells, depth, heads, positions)
        if positions is None:
            return columns
        every = columns.new_zeros(*columns.shape[:3], bins.shape[1])
        return every.scatter(3, positions[:, None, None].expand_as(columns), columns)

    def forward(self, bins: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        """Predict tokens: logits of every position, or only of those where a boolean (cells, genes + 1) is true.

        Returns
        -------
        (cells, genes + 1, n_bins + 2), or (positions, n_bins + 2) with `where`.
        """
        if where is None or not self.config.expressed_only:
            hidden = self.encode(bins)
            return self.to_out(hidden if where is None else hidden[where])
        # As above, without (cells, genes + 1, dim) in between; `find_expressed` keeps the order of the positions.
        packed, positions, present = self._encode_expressed(bins)
        entered = torch.zeros_like(where).scatter(1, positions, present)[where]  # (positions asked for,)
        hidden = packed.new_zeros(len(entered), packed.shape[2])
        hidden[entered] = packed[where.gather(1, positions) & present]
        return self.to_out(hidden)

    def save(self, path: str | Path, card: str = "") -> None:
        """Write the encoder as a bundle directory, see `load`."""
        _save_bundle(self, path, self, card, labels=None)


def find_expressed(bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the positions of each cell that enter the encoder in the mode ``expressed_only``.

    Parameters
    ----------
    bins
        (cells, genes + 1) tokens.

    Returns
    -------
    The columns of `bins`, (cells, longest): of each cell those with a non-zero token and the trailing one, in the
    order of the vocabulary, and then, up to the longest cell's number, others that are padding. And a boolean of the
    same shape, false for these.
    """
    present = bins > 0
    present[:, -1] = True
    present, positions = present.sort(dim=1, descending=True, stable=True)
    longest = int(present.any(0).sum())
    return positions[:, :longest], present[:, :longest]


def run_layer(
    layer: nn.ModuleList,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    present: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run one encoder layer in two passes over chunks of positions: read all keys, then let each position attend.

    Norms, projections and the feed-forward part live inside the chunk. So memory is the input and the output, and
    some three times `scbert.attention.CHUNK_BYTES`; in training, of `scbert.attention.KEPT_CHUNKS` chunks at most,
    and beyond them one tensor shaped as `x` for each layer.

    Parameters
    ----------
    layer
        One of ``performer.net.layers``: attention and feed-forward, each behind its norm.
    x
        (cells, positions, dim).
    weight
        Weights of the attending positions, (cells, positions), from `weigh_queries`; zero for padding.
    present
        Booleans (cells, positions), at least one true in each cell: the positions that are no padding; all if None.

    Returns
    -------
    The layer's output, shaped as `x`, of no meaning where there is padding; with `weight` also the attention each
    position receives from the positions so weighted, (cells, heads, positions), none where there is padding.

    Paper: Methods, "Performer encoder". Differs from the published code: what it computes does not; how it does.
    """
    (attention_norm, attention), (feed_norm, feed) = ((part.norm, part.fn) for part in layer)
    heads, favor = attention.heads, attention.fast_attention
    projection = favor.projection_matrix

    def to_heads(linear, x):  # (cells, positions, dim) -> (cells * heads, dim_head, positions)
        return features_first(linear(x).unflatten(2, (heads, -1)))

    def to_each_head(x):  # (cells, positions) -> (cells * heads, 1, positions)
        return x.repeat_interleave(heads, 0)[:, None]

    def read(x, *rest):
        mask = () if present is None else (to_each_head(rest[0]),)
        x = attention_norm(x)
        return summarise_keys(to_heads(attention.to_k, x), to_heads(attention.to_v, x), projection, *mask)

    def write(keys, x, *rest):
        q = to_heads(attention.to_q, attention_norm(x))
        if weight is not None:
            out, queries = attend(q, keys, projection, weight=to_each_head(rest[-1]))
            extra = (positions_first(queries, heads),)  # (cells, 1, heads, features), one of each chunk
        else:
            out, extra = attend(q, keys, projection), ()
        x = x + attention.to_out(out.view(len(x), -1, x.shape[1]).mT)
        return x + feed(feed_norm(x)), *extra

    def weigh(context, x, *_):
        received = weigh_keys(to_heads(attention.to_k, attention_norm(x)), *context, projection)
        return (received.view(len(x), heads, -1).mT,)

    rest = (tensor for tensor in (present, weight) if tensor is not None)
    groups = split_chunks((x, *rest), heads, len(projection))
    keys = read_chunks(read, groups, favor.key_stabiliser)
    if weight is None:
        return map_chunks(write, groups, keys)[0]
    x, queries = map_chunks(write, groups, keys)
    received = map_chunks(weigh, groups, pair_queries(queries, keys))[0].mT  # (cells, heads, positions)
    return x, received if present is None else received.masked_fill(~present[:, None], 0)


class AnnotationHead(nn.Module):
    """From gene embeddings to cell types: one number a gene, then three dense layers.

    Paper: Methods, "fine-tuning" ("one-dimensional convolution" and "three-layer neural network").
    """

    def __init__(self, config: ScBertConfig, n_classes: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 1, (1, config.dim))
            self.dense = nn.Sequential(
                nn.Linear(config.n_genes + 1, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, n_classes)
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(cells, genes + 1, dim) -> (cells, classes), logits."""
        per_gene = self.conv(hidden[:, None]).flatten(1).relu()  # (cells, genes + 1)
        return self.dense(per_gene)


class Classifier(nn.Module):
    """A fine-tuned encoder, its head, and what they need to annotate: genes, labels, history."""

    def __init__(self, encoder: ScBert, labels: Sequence[str], seed: int = 0):
        super().__init__()
        self.encoder = encoder
        self.head = AnnotationHead(encoder.config, len(labels), seed)
        self.labels = list(labels)
        self.history = pd.DataFrame()

    @property
    def config(self) -> ScBertConfig:
        """The encoder's shape."""
        return self.encoder.config

    @property
    def genes(self) -> list[str]:
        """The vocabulary, in column order."""
        return self.encoder.genes

    def forward(self, bins: torch.Tensor, n_layers_done: int = 0) -> torch.Tensor:
        """(cells, genes + 1) tokens -> (cells, classes) logits.

        With `n_layers_done`, in place of tokens what that many layers made of them, (cells, genes + 1, dim); refused
        in the mode ``expressed_only``, where that does not say which positions entered.
        """
        if not n_layers_done:
            return self.head(self.encoder.encode(bins))
        if self.config.expressed_only:
            raise ValueError("With expressed_only all layers must run: give tokens, and n_layers_done=0.")
        return self.head(self.encoder.norm(self.encoder.run_layers(bins, n_layers_done)))

    def save(self, path: str | Path, card: str = "") -> None:
        """Write the classifier as a bundle directory, see `load`."""
        _save_bundle(self, path, self.encoder, card, labels=self.labels)


def _save_bundle(module, path, encoder, card, labels):
    """Write everything into a temporary sibling, then put it in place in one step."""
    if encoder.genes is None:
        raise ValueError("The model has no gene names yet: give ScBert(config, genes=...), or train it on cells.")
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is no model bundle, and a bundle would replace all that is in it: give another folder."
        )
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().contiguous() for k, v in module.state_dict().items()}, temporary / "model.safetensors")
    about = {"format": 1, "genes_sha256": gene_lists.hash_genes(encoder.genes), **asdict(encoder.config)}
    about |= {} if labels is None else {"labels_sha256": gene_lists.hash_genes(labels)}
    about |= {"licence": encoder.licence} if encoder.licence else {}
    (temporary / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    (temporary / "genes.txt").write_text("\n".join(encoder.genes) + "\n")
    if labels is not None:
        (temporary / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")
    (temporary / "README.md").write_text(card or _model_card(encoder, labels))
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def _model_card(encoder, labels):
    what = "encoder" if labels is None else f"annotator of {len(labels)} cell types: {', '.join(labels)}"
    size = f"{encoder.config.n_genes} genes, dim {encoder.config.dim}, depth {encoder.config.depth}"
    size += ", expressed genes only" if encoder.config.expressed_only else ""
    licence = "the weights are the trainer's own"
    if encoder.licence:
        licence = say_licence(encoder.licence)
    return f"# scBERT {what}\n\nShape: {size}.\nTrained with scbert-companion; {licence}.\n"


def load(path: str | Path) -> ScBert | Classifier:
    """Load a bundle directory: a `Classifier` if it has labels, else an encoder.

    Parameters
    ----------
    path
        A directory with ``model.safetensors``, ``config.json``, ``genes.txt`` and, for a classifier, ``labels.json``.

    Raises
    ------
    ValueError
        A file is missing or truncated, or genes, bins, shapes and weights do not fit each other.

    Differs from the published code: no pickle is read, and labels and genes travel with the weights.
    """
    path = Path(path)
    for name in ("config.json", "genes.txt", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a model bundle: {name} is missing.")
    try:
        about = json.loads((path / "config.json").read_text())
        genes = (path / "genes.txt").read_text().splitlines()
        labels_file = path / "labels.json"
        labels = json.loads(labels_file.read_text()) if labels_file.exists() else None
        weights = load_file(path / "model.safetensors")
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"The bundle {path} is damaged, copy or train it again ({error}).") from None
    genes_hash, labels_hash = about.pop("genes_sha256", None), about.pop("labels_sha256", None)
    licence = about.pop("licence", "")
    if about.pop("format", None) != 1:
        raise ValueError(f"The bundle {path} was written by another version of this package.")
    if genes_hash != gene_lists.hash_genes(genes):
        raise ValueError(f"genes.txt of the bundle {path} is not the gene list its weights were trained on.")
    if labels_hash != (None if labels is None else gene_lists.hash_genes(labels)):
        raise ValueError(f"labels.json of the bundle {path} is not the list of labels its weights were trained on.")
    config = ScBertConfig(**about)
    if len(genes) != config.n_genes:
        raise ValueError(f"The bundle {path} has {len(genes)} gene names, but its config says {config.n_genes}.")
    vectors = torch.zeros(config.n_genes, config.dim) if config.gene_embedding == "frozen" else None
    encoder = ScBert(config, vectors, genes)
    encoder.licence = licence
    module = encoder if labels is None else Classifier(encoder, labels)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        name = next(name for name in sorted(expected | found) if expected.get(name) != found.get(name))
        raise ValueError(
            f"The weights of the bundle {path} do not fit its config: {name} has shape {found.get(name, 'none')}, "
            f"expected {expected.get(name, 'none')} (another number of bins, genes or labels?)."
        )
    module.load_state_dict(weights)
    return module.eval()
