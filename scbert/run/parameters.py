"""A notebook's parameters, checked in one place: by `scbert run` before a kernel starts, by `Run` whoever set them."""

import math
from collections.abc import Mapping
from pathlib import Path

import h5py

from ..data.checks import check_key
from ..paths import find_file
from ..sources import datasets

KINDS = {"int": int, "float": float, "str": str, "bool": {"true": True, "false": False}}
FROM_ZERO = ("seed", "pretrain_epochs", "softmax_tokens")
"""Whole numbers that may be 0; others are at least 1."""
RANGES = {"unassigned_below": (0, 1), "level": (0, 1), "learning_rate": (0, 1), "severity": (0, math.inf)}
NUMBERS = {"shape": int, "numbers": int, "tokens": int, "resolutions": float, "severities": float}
"""Words that are numbers with blanks between."""


def parse_value(name: str, value, kind: str):
    """Return a parameter's value in the type of its default: 0.1 is the word "0.1" where a word is due, and None is "".

    A ValueError says which type is due.
    """
    try:
        if kind == "bool":
            return KINDS["bool"][str(value).lower()]
        if isinstance(value, (bool, list, tuple, dict, set)):
            raise TypeError
        parsed = "" if kind == "str" and value is None else KINDS[kind](value)
        if kind == "int" and not isinstance(value, str) and parsed != value:  # 1.5
            raise TypeError
        return parsed
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"Parameter {name} must be of type {kind}, not {value!r}.") from None


def check_parameters(values: Mapping, kinds: Mapping[str, str]) -> dict:
    """Return a notebook's parameters in the types of their defaults, once all can be meant; a ValueError if one can't.

    `kinds` is name -> "int", "float", "str" or "bool"; a value of another kind stays as it is. Numbers are held to their
    ranges, sets and encoders must be there, and columns must not be those that scbert writes itself, nor be missing from an
    ``.h5ad`` file.
    """
    parsed = {name: parse_value(name, value, kinds[name]) if kinds[name] in KINDS else value
              for name, value in values.items()}  # fmt: skip
    for name, value in parsed.items():
        if kinds[name] in ("int", "float"):
            _check_number(name, value, kinds[name])
        elif name in NUMBERS:
            words = value.split()
            for word in words:
                _check_number(name, parse_value(name, word, NUMBERS[name].__name__), NUMBERS[name].__name__)
            if len(words) != 4 if name == "shape" else not words:
                raise ValueError(f"{name} must be {'four' if name == 'shape' else 'some'} numbers, not {value!r}.")
    if parsed.get("labels", "any") not in ("any", "shared"):
        raise ValueError(
            f"labels must be any or shared, not {parsed['labels']!r}; a table of labels is named with the dataset: "
            '"matrix.mtx with labels.csv".'
        )
    for name in ("dataset", "shifts"):
        _check_sets(parsed.get(name) or "")
    encoder, shipped = parsed.get("encoder"), Path(datasets.__file__).with_name("encoders")
    if encoder and not any(((shipped / encoder).is_dir(), encoder in datasets.CATALOGUE, find_file(encoder).exists())):
        names = ", ".join(sorted(path.name for path in shipped.iterdir()))
        raise ValueError(f"There is no bundle or file {encoder} for encoder, and no weights of that name ({names}).")
    _check_columns(parsed)
    return parsed


def _check_number(name, value, kind):
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if kind == "int":
        low, high = 0 if name in FROM_ZERO else 1, 2**32 - 1  # numpy's largest seed
    elif name in NUMBERS:
        low = 0
    if not (low <= value <= high and math.isfinite(value)):
        limits = f"at least {low}" if high > 1 else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}, not {value}.")


def _check_sets(text):
    """Raise a ValueError if a set or file, or a table of labels, that a parameter names is not there."""
    for part in datasets.name_sets(text):
        name, *table = datasets.part_names(part, " with ")
        if name not in datasets.CATALOGUE:
            datasets.find_cells(name)
        if table and not find_file(Path(table[0]).expanduser()).is_file():
            raise ValueError(f"There is no table of labels {table[0]}.")


def _check_columns(values):
    """Raise a ValueError if label_key or batch_key can't be columns of the cells, where that is cheap to know."""
    asked = [values[key] for key in ("label_key", "batch_key") if values.get(key)]
    for key in asked:
        check_key(key)
    path = find_file(Path(values.get("dataset") or "").expanduser())
    if path.suffix == ".h5ad" and path.is_file():
        try:
            with h5py.File(path) as file:
                columns = list(file["obs"].attrs["column-order"])
        except (OSError, KeyError):  # another format, or an older one
            return
        for key in asked[:1] if "shifts" in values else asked:  # the batches of notebook 06 are those of shifts
            if key not in columns:
                raise ValueError(f"{path} has no column {key!r} in obs; it has: {', '.join(columns) or 'none at all'}.")
