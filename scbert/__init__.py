"""scBERT's reproducible companion: the model, its data and its experiments, for notebooks and scripts.

Rooms, and data flows down the list: `paths`, `data`, `model`, `sources`, `scale`, `memory`, `train`, `annotate`,
`evaluate`, `run`, `experiments`, `figures`. A room imports only from those before it in this list. What *is* scBERT is in
`data`, `model`, `train` and `annotate`. CONTRIBUTING.md has the map.
"""

import os
import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

# Threads that wait for work sleep: one that spins takes a core from its neighbours, and at the sizes of the demo most
# of the processor. Read when torch and numpy are loaded, inherited by kernels and workers, left as a user has set them.
for _name, _value in {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "OPENBLAS_THREAD_TIMEOUT": "4"}.items():
    os.environ.setdefault(_name, _value)
if os.environ.get("OMP_NUM_THREADS", "").isdigit():  # numba, within UMAP, sets those of torch too
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

# Where what is used as scbert.X is. Imported on first use, so that the command line answers without waiting for torch.
_FUNCTIONS = {
    "embed": "annotate",
    "predict_proba": "annotate",
    "ScBertConfig": "model.config",
    "ScBert": "model.encoder",
    "AnnotationHead": "model.classifier",
    "Classifier": "model.classifier",
    "load": "model.classifier",
    "load_encoder": "sources.weights",
    "write_store": "scale.shards",
    "open_store": "scale.stream",
    "Recipe": "train.recipe",
    "pretrain": "train.pretrain",
    "finetune": "train.finetune",
}
_ROOMS = {
    "data": "checks counts preprocess cells masking",
    "model": "attention published",
    "sources": "datasets download readers sets simulate totals genes gene_names gene_vectors weights",
    "scale": "checkpoint processes prefix stream shards",
    "memory": "companions",
    "train": "recipe",
    "evaluate": "masks metrics hygiene protocols methods tuning runner kept fitted significance "
    "calibration novelty embeddings",
    "run": "record preflight report annotated",
    "experiments": "pretraining benchmark cross_dataset labellings batch_effect novel_types deletion performance "
    "scoreboard tokens",
}
_MODULES = {name: f"{room}.{name}" for room, names in _ROOMS.items() for name in names.split()}
_MODULES |= {"interpret": "experiments.interpretability", "plot": "figures.plot"}
_MODULES |= {f"plot_{name}": f"figures.{name}" for name in ("shift", "novelty", "genes")}
__all__ = ["annotate", *_FUNCTIONS, *_MODULES]


class _Package(ModuleType):
    """The package, whose `annotate` is the function: Python would bind the module of the same name."""

    @property
    def annotate(self):
        return import_module(".annotate", __name__).annotate

    @annotate.setter
    def annotate(self, module):
        pass


sys.modules[__name__].__class__ = _Package


def __getattr__(name):
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    if name in _FUNCTIONS:
        return getattr(import_module(f".{_FUNCTIONS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*__all__, "__version__"]
