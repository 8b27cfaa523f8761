"""R's files, taken apart: objects by name, slots, lists and matrices.

rdata parses any file, but its conversion stops at the first part that it does not know (a function; a Seurat object's
"commands"): so a file is parsed once, and only the parts that are looked for are converted.
"""

import re
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from ...paths import first_line
from .refusal import Refusal

SPARSE = re.compile(r"[dln]g([CRTe])Matrix")
"""Classes of the package Matrix: of numbers, of TRUE, of places only; by column, by row, by place, dense."""


def open_r(path: Path) -> dict:
    """Return the parsed objects of an R file: name -> node, for .rds one called x."""
    import rdata

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Unknown file type", and what it says of parts that nobody looks at
            node = rdata.parser.parse_file(path).object
    except Exception as error:  # what is no R file raises one of many types
        raise ValueError(f"no R file: {first_line(error)}") from None
    return take_apart(node) if node.info.type == rdata.parser.RObjectType.LIST else {"x": node}


def convert(node):
    """Return a parsed part of a file as Python's or pandas' own; what rdata has no form for stays a bag of slots."""
    import rdata

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Missing constructor")
        return rdata.conversion.convert(node)


def find_slots(node) -> dict:
    """Return slot -> node of a parsed S4 object; of any other, its attributes."""
    return dict(_walk_pairs(node.attributes))


def _walk_pairs(pair):
    import rdata

    while pair is not None and pair.info.type == rdata.parser.RObjectType.LIST:
        tag = pair.tag.referenced_object or pair.tag
        yield tag.value.value.decode(), pair.value[0]
        pair = pair.value[1]


def take_apart(node) -> dict:
    """Return name -> node of a list, a data frame, a SimpleList or an environment; empty for anything else."""
    from rdata.parser import RObjectType

    node, kind = node.referenced_object or node, node.info.type
    if kind == RObjectType.LIST:
        return dict(_walk_pairs(node))
    if kind == RObjectType.ENV:
        pairs = [node.value.frame, *(node.value.hash_table.value or [])]
        return {name: part for pair in pairs for name, part in _walk_pairs(pair)}
    slots = find_slots(node)
    if kind == RObjectType.VEC:
        names = convert(slots["names"]) if "names" in slots else range(1, len(node.value) + 1)
        return dict(zip(map(str, names), node.value, strict=True))
    return take_apart(slots["listData"]) if "listData" in slots else {}


def find_class(node) -> str:
    """Return the class of a parsed object as R's class(x)[1] would."""
    slots = find_slots(node)
    if "class" in slots:
        return str(convert(slots["class"])[0])
    plain = {"VEC": "list", "CLO": "function", "STR": "character"}
    return "matrix" if "dim" in slots else plain.get(node.info.type.name, node.info.type.name.lower())


def find_names(node) -> np.ndarray | None:
    """Return a parsed vector of names; None for NULL."""
    names = None if node is None else convert(node)
    return np.asarray(names).astype(str) if isinstance(names, np.ndarray | list) else None


def is_matrix(node) -> bool:
    """Return whether a parsed object is a matrix of numbers, sparse or dense."""
    return bool(SPARSE.fullmatch(find_class(node))) or (find_class(node) == "matrix" and _is_numeric(node))


def _is_numeric(node):
    return node.info.type.name in ("INT", "REAL", "LGL")


def read_matrix(node) -> tuple[sparse.csr_matrix, np.ndarray | None, np.ndarray | None]:
    """Return a parsed matrix with its names of rows and columns, None where it has none.

    Raises a Refusal if it is of a class that is not read, such as one whose values are in another file.
    """
    slots, kind = find_slots(node), find_class(node)
    if "dim" in slots and _is_numeric(node):
        values = np.ma.filled(np.ma.asarray(node.value, np.float64), np.nan)
        matrix = sparse.csr_matrix(values.reshape(convert(slots["dim"]), order="F"))
        names = list(take_apart(slots["dimnames"]).values()) if "dimnames" in slots else [None, None]
        return matrix, *map(find_names, names)
    if not SPARSE.fullmatch(kind):
        raise Refusal(
            f"it has a matrix of class {kind}, whose values are in another file or of no form that is read: in R, make it "
            'as(MATRIX, "dgCMatrix") and saveRDS again'
        )
    return _fill(convert(node)), *map(find_names, slots["Dimnames"].value)


def _fill(slots):
    kind, shape = str(slots.__dict__["class"][0]), tuple(int(n) for n in slots.Dim)
    form = SPARSE.fullmatch(kind)
    if not form:
        raise Refusal(f"a matrix of class {kind} is not read here, only dgCMatrix, dgRMatrix, dgTMatrix and their like")
    values = np.asarray(getattr(slots, "x", np.ones(len(getattr(slots, "i", getattr(slots, "j", ()))))), np.float64)
    if form[1] == "e":
        return sparse.csr_matrix(values.reshape(shape, order="F"))
    if form[1] == "T":
        return sparse.coo_matrix((values, (slots.i, slots.j)), shape=shape).tocsr()
    if form[1] == "R":
        return sparse.csr_matrix((values, slots.j, slots.p), shape=shape)
    return sparse.csc_matrix((values, slots.i, slots.p), shape=shape).tocsr()


def read_frame(node) -> pd.DataFrame:
    """Return a parsed data frame or DataFrame as columns that h5ad can hold; what is no column of values is left out."""
    slots, parts = find_slots(node), take_apart(node)
    names = slots.get("row.names", slots.get("rownames"))
    names = find_names(names) if names is not None and names.info.type.name == "STR" else None
    columns = {}
    for name, part in parts.items():
        with suppress(Exception):  # rdata raises one of many types
            columns[name.replace("/", "|")] = pd.Series(convert(part))  # h5ad allows no slash
    n_rows = max(map(len, columns.values()), default=0) if names is None else len(names)
    columns = {name: c for name, c in columns.items() if len(c) == n_rows and all(map(pd.api.types.is_scalar, c))}
    table = pd.DataFrame(columns, index=range(n_rows))
    return make_plain(table if names is None else table.set_axis(names, axis=0))


def make_plain(table: pd.DataFrame) -> pd.DataFrame:
    """Return an R data frame with plain column names, strings and floats, which h5ad can hold."""
    plain = {}
    for name, column in table.items():
        is_number = pd.api.types.is_numeric_dtype(column)
        options = {"dtype": np.float64, "na_value": np.nan} if is_number else {"dtype": object}
        plain[str(name)] = column.to_numpy(**options)
    return pd.DataFrame(plain, index=table.index)
