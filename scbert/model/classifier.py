"""The annotation head, and a fine-tuned model with what it needs to annotate."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ..paths import say_unfinished
from .bundle import compare_shapes, read_bundle, write_bundle
from .config import ScBertConfig
from .encoder import ScBert

PASS = 0.75
"""Share of encoded genes that pass the ReLU of a sound head at its start."""


class AnnotationHead(nn.Module):
    """From gene embeddings to cell types: one number a gene, then three dense layers.

    Where only expressed genes enter the encoder, there are two kinds. "published": a silent gene passes the bias of the
    convolution, as a gene does whose encoding is zero; and by chance the ReLU lets nearly all genes pass, or nearly none.
    "sound": a silent gene passes nothing, and the bias starts where `PASS` of the encoded genes pass. Without the first,
    trainings die where the bias is positive, since the weights of all silent genes then move as one; without the second,
    where few genes pass (measured by tests/measure_heads.py, told in docs/results.md).

    Paper: Methods, "fine-tuning" ("one-dimensional convolution" and "three-layer neural network").
    Differs from the published code: the kind "sound", in the mode ``expressed_only``, which is not published either.
    """

    def __init__(self, config: ScBertConfig, n_classes: int, seed: int = 0, kind: str = "sound"):
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 1, (1, config.dim))
            self.dense = nn.Sequential(
                nn.Linear(config.n_genes + 1, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, n_classes)
            )

    def forward(self, hidden: torch.Tensor, entered: torch.Tensor | None = None) -> torch.Tensor:
        """(cells, genes + 1, dim), or what `ScBert.encode_expressed` returns -> (cells, classes), logits."""
        if entered is None:
            per_gene = self.conv(hidden[:, None]).flatten(1)  # (cells, genes + 1)
        else:
            silent = self.conv.bias if self.kind == "published" else torch.zeros_like(self.conv.bias)
            per_gene = silent.expand(entered.shape).masked_scatter(entered, self.conv(hidden[None, None]))
        return self.dense(per_gene.relu())

    @torch.no_grad()
    def start(self, hidden: torch.Tensor) -> None:
        """Set the bias so that `PASS` of the encoded genes, (positions, dim), pass the ReLU."""
        self.conv.bias -= torch.quantile(self.conv(hidden[None, None]).flatten().float(), 1 - PASS)


class Classifier(nn.Module):
    """A fine-tuned encoder, its head, and what they need to annotate: genes, labels, history."""

    def __init__(self, encoder: ScBert, labels: Sequence[str], seed: int = 0, head: str = "sound"):
        super().__init__()
        self.encoder = encoder
        self.head = AnnotationHead(encoder.config, len(labels), seed, head)
        self.labels = list(labels)
        self.history = pd.DataFrame()
        self.memory: dict[str, torch.Tensor] = {}  # of its training cells, see `remember`
        self.ontology_ids: dict[str, str] = {}  # of its labels, where training cells had them
        self.outcome: dict[str, str | int] = {}  # of its training: state, epochs, attempts, see `scbert.model.bundle`

    def remember(self, memory: dict[str, torch.Tensor]) -> None:
        """Keep what training saw, arrays by name; genes that it did not see are hidden from now on.

        ``genes_seen`` is one boolean a gene; the others are those of `scbert.memory.companions`.
        """
        self.memory = memory
        seen = memory.get("genes_seen")
        if seen is not None:  # and the trailing token; on the device of the weights, which training may have moved
            seen = torch.cat([seen.bool(), torch.ones(1, dtype=torch.bool)]).to(self.head.conv.weight.device)
        self.encoder.genes_seen = seen

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
        if self.config.expressed_only and not n_layers_done:
            return self.head(*self.encoder.encode_expressed(bins))
        if not n_layers_done:
            return self.head(self.encoder.encode(bins))
        if self.config.expressed_only:
            raise ValueError("With expressed_only all layers must run: give tokens, and n_layers_done=0.")
        return self.head(self.encoder.norm(self.encoder.run_layers(bins, n_layers_done)))

    def save(self, path: str | Path, card: str = "") -> None:
        """Write the classifier as a bundle directory, see `load`."""
        more = {name: getattr(self, name) for name in ("memory", "ontology_ids", "outcome")} | {"head": self.head.kind}
        encoder = self.encoder
        write_bundle(path, self.state_dict(), encoder.config, encoder.genes, self.labels, licence=encoder.licence,
                     card=card, **more)  # fmt: skip


def load(path: str | Path) -> ScBert | Classifier:
    """Load a bundle directory: a `Classifier` if it has labels, else an encoder.

    Parameters
    ----------
    path
        A directory with ``model.safetensors``, ``config.json``, ``genes.txt`` and, for a classifier, ``labels.json``.

    Warns
    -----
    Where a newer run of the notebook that made it is at work, or has not finished: the model is of the run before.

    Raises
    ------
    ValueError
        A file is missing or truncated, or genes, bins, shapes and weights do not fit each other.

    Differs from the published code: no pickle is read, and labels and genes travel with the weights.
    """
    config, weights, genes, labels, licence, memory, ontology_ids, outcome, head = read_bundle(path)
    if sentence := say_unfinished(path):
        warnings.warn(sentence, stacklevel=2)
    vectors = torch.zeros(config.n_genes, config.dim) if config.gene_embedding == "frozen" else None
    encoder = ScBert(config, vectors, genes)
    encoder.licence = licence
    module = encoder if labels is None else Classifier(encoder, labels, head=head)
    compare_shapes(path, {name: tensor.shape for name, tensor in module.state_dict().items()}, weights)
    module.load_state_dict(weights)
    if labels is not None:
        module.remember(memory)
        module.ontology_ids, module.outcome = ontology_ids, outcome
    return module.eval()
