"""scBERT's reproducible companion: the model, its data and its experiments, for notebooks and scripts."""

from importlib import import_module

from .annotate import annotate, embed, predict_proba  # binds the function over the module of the same name

__version__ = "0.1.0"

# Imported on first use, so that the command line answers without waiting for torch and scanpy.
_HOME = {
    "ScBertConfig": "model",
    "ScBert": "model",
    "AnnotationHead": "model",
    "Classifier": "model",
    "load": "model",
    "load_encoder": "published",
    "write_store": "shards",
    "open_store": "stream",
    "Recipe": "recipe",
    "pretrain": "train",
    "finetune": "train",
}
_MODULES = (
    "record",
    "download",
    "readers",
    "sets",
    "datasets",
    "simulate",
    "genes",
    "preprocess",
    "hygiene",
    "cells",
    "stream",
    "shards",
    "attention",
    "model",
    "published",
    "recipe",
    "checkpoint",
    "processes",
    "train",
    "protocols",
    "evaluate",
    "significance",
    "methods",
    "outputs",
    "benchmark",
    "corpus",
    "calibration",
    "novelty",
    "mixing",
    "interpret",
    "deletion",
    "probe",
    "performance",
    "preflight",
    "plot",
    "plot_shift",
    "plot_novelty",
    "plot_genes",
)
__all__ = ["annotate", "embed", "predict_proba", *_HOME, *_MODULES]


def __getattr__(name):
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*__all__, "__version__"]
