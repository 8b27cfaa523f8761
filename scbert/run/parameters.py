"""A notebook's parameters, checked in one place: by `scbert run` before a kernel starts, by `Run` whoever set them."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

import h5py

from ..data.checks import check_key
from ..paths import find_file
from ..sources import datasets

KINDS = {"int": int, "float": float, "str": str, "bool": {"true": True, "false": False}}
SHARE, FROM_ZERO = (0, 1), (0, math.inf)
LIMITS = {
    "seed": (0, 2**32 - 1), "pretrain_epochs": FROM_ZERO, "softmax_tokens": FROM_ZERO, "unassigned_below": SHARE,
    "thin": (0.001, 1), "level": SHARE, "learning_rate": SHARE, "severity": FROM_ZERO, "severities": FROM_ZERO,
    "resolutions": FROM_ZERO,
}  # fmt: skip
"""Least and largest; of other whole numbers the least is 1."""
LISTS = {"shape": "int", "numbers": "int", "tokens": "int", "resolutions": "float", "severities": "float"}
"""Words that are numbers with blanks between."""


def parse_value(name: str, value, kind: str):
    """Return a value in the type of the parameter's default, a ValueError if it can't be: 0.1 can be "0.1", and None ""."""
    try:
        if kind == "bool":
            return KINDS["bool"][str(value).lower()]
        parsed = "" if kind == "str" and value is None else KINDS[kind](value)
        if isinstance(value, (bool, list, tuple, dict)) or (kind == "int" and parsed != float(value)):  # 1.5
            raise ValueError
        return parsed
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"Parameter {name} must be of type {kind}, not {value!r}.") from None


def check_parameters(values: Mapping, kinds: Mapping[str, str]) -> dict:
    """Return a notebook's parameters in the types of their defaults; a ValueError if one can't be meant.

    A value of another kind than `KINDS` stays as it is. Numbers are held to `LIMITS`; sets, tables, encoders and the label
    column of an ``.h5ad`` must be there, and none may be one that scbert writes itself.
    """
    parsed = {}
    for name, value in values.items():
        parsed[name] = parse_value(name, value, kinds[name]) if kinds[name] in KINDS else value
        kind = LISTS.get(name, kinds[name])
        if kind in ("int", "float"):
            words = parsed[name].split() if name in LISTS else [parsed[name]]
            _check_numbers(name, [parse_value(name, word, kind) for word in words], kind)
    for name in [*datasets.name_sets(parsed.get("dataset", "")), *datasets.name_sets(parsed.get("shifts", ""))]:
        cells, *table = datasets.part_names(name, " with ")
        if cells not in datasets.CATALOGUE:
            datasets.find_cells(cells)
        if table:
            datasets.find_cells(table[0])
    encoder, shipped = parsed.get("encoder", ""), Path(datasets.__file__).with_name("encoders")
    is_known = not encoder or datasets.CATALOGUE.get(encoder, {}).get("kind") == "weights"
    if not (is_known or (shipped / encoder).is_dir() or find_file(encoder).exists()):
        raise ValueError(f"There is no bundle or file {encoder}, and no encoder of that name.")
    for key in filter(None, (parsed.get("label_key"), parsed.get("batch_key"))):
        check_key(key)
    path, key = find_file(parsed.get("dataset", "")), parsed.get("label_key")
    if path.suffix == ".h5ad" and key:
        with contextlib.suppress(OSError, KeyError), h5py.File(path) as file:  # another format, or an older one
            columns = list(file["obs"].attrs["column-order"])
            if not {key, key.removesuffix(datasets.SHUFFLED)} & set(columns):
                raise ValueError(f"{path} has no column {key!r} in obs; it has: {', '.join(columns) or 'none at all'}.")
    return parsed


def _check_numbers(name, numbers, kind):
    low, high = LIMITS.get(name, (1 if kind == "int" else -math.inf, math.inf))
    if not numbers or (name == "shape" and len(numbers) != 4):
        raise ValueError(f"{name} must be {'four' if name == 'shape' else 'some'} numbers with blanks between.")
    for number in numbers:
        if not (low <= number <= high and math.isfinite(number)):
            limits = "finite" if low < 0 else f"at least {low}" if high > 1 else f"between {low} and {high}"
            raise ValueError(f"{name} must be {limits}, not {number}.")
