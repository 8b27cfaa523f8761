"""Pretrained encoders by name or path: our own that ships here, published weights, and bundles."""

from collections.abc import Sequence
from pathlib import Path

from ..model.classifier import load
from ..model.encoder import ScBert
from ..model.published import LICENCE
from ..paths import find_file, hash_file
from .datasets import CATALOGUE, fetch
from .genes import load_vocabulary

ENCODERS = Path(__file__).parent / "encoders"
"""Bundles that ship with the package: trained here, on public data."""


def convert(source: str | Path, destination: str | Path, genes: Sequence[str] | None = None) -> None:
    """Turn a published checkpoint into a bundle directory, for `scbert.load`; one that is there already is replaced.

    `source`, a torch file, and `genes` are as in `ScBert.from_published`; the published vocabulary, fetched, if None. So are
    the errors; a ValueError, too, if `destination` has other things in it.

    The model card names the file and its sha256, and for weights of the published vocabulary their licence, their
    training cells and the paper. The licence stays with whatever is trained from the bundle.
    """
    model = _read_published(Path(source), genes)
    model.save(destination, _write_card(model, Path(source)))


def _write_card(model, source):
    config, digest = model.config, hash_file(source)
    about = [
        f"- Converted from `{source.name}`, sha256 `{digest}`, by scbert-companion: the same weights, in float32.",
        f"- Shape: {config.n_genes:,} genes, {config.n_bins} bins, dim {config.dim}, depth {config.depth}, "
        f"{config.heads} heads of {config.dim_head}, gene embedding {config.gene_embedding}.",
        "- The key stabiliser is per cell and head; published training had one a batch, see `set_key_stabiliser`.",
    ]
    if model.licence != LICENCE:
        about += ["- Licence and training data: those of the file, which does not name them. Write them down here."]
        return "\n".join(["# scBERT encoder, converted", "", *about, ""])
    return "\n".join(
        [
            *["---", "license: gpl-3.0", "---", "# scBERT encoder, converted from published weights", "", *about],
            f"- Licence of the weights: {LICENCE}. The official LICENSE covers both the source code and model weights.",
            "  They, and what is trained from them, must not be redistributed under another licence;",
            "  the BSD-3 licence of scbert-companion is that of its code, not of these weights.",
            "- Trained on: PanglaoDB, 209 human data sets, 74 tissues, 1,126,580 cells (as the paper says).",
            "- That the file is the published one follows from its name and vocabulary only: compare the sha256.",
            "- Cite: Yang F, Wang W, Wang F, Fang Y, Tang D, Huang J, Lu H, Yao J. scBERT as a large-scale pretrained",
            "  deep language model for cell type annotation of single-cell RNA-seq data.",
            "  Nature Machine Intelligence 4, 852-866 (2022). https://doi.org/10.1038/s42256-022-00534-z",
            "",
        ]
    )


def _read_published(path, genes=None):
    if not path.is_file():
        raise ValueError(f"There is no file {path}: give the path of a published checkpoint.")
    return ScBert.from_published(path, load_vocabulary() if genes is None else genes)


def load_encoder(source: str | Path) -> ScBert:
    """Load a pretrained encoder, from wherever it is.

    The `source` is a name that ships with the package ("pbmc-small", "pbmc-large": our own, pretrained on public PBMC in
    notebook 02, see their cards); a name of the catalogue ("scbert_checkpoint"), fetched if need be; a bundle directory, of
    an encoder or of a classifier, whose encoder is taken; or a file of published weights. A ValueError if there is none,
    and what `scbert.datasets.fetch`, `scbert.load` and `ScBert.from_published` raise.
    """
    shipped = sorted(path.parent.name for path in ENCODERS.glob("*/config.json"))
    weights = [name for name, entry in CATALOGUE.items() if entry["kind"] == "weights"]
    if str(source) in shipped:
        return load(ENCODERS / str(source))
    if str(source) in weights:
        return _read_published(fetch(str(source))[0])
    path = find_file(source)
    if not path.exists():
        names = ", ".join([*shipped, *weights])
        raise ValueError(f"There is no bundle or file {path}, and no weights of that name ({names}).")
    if path.is_file():
        return _read_published(path)
    model = load(path)
    return getattr(model, "encoder", model)
