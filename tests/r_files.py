"""Write R's files: its serialisation, version 2, of the few kinds of objects that the readers meet."""

import gzip
import struct

import numpy as np

GLOBAL, NULL, MISSING = 253, 254, 251


class R:
    """An object with attributes: `kind` is what R calls its type, and `value` what it holds."""

    def __init__(self, value, kind=None, **attributes):
        self.value, self.kind, self.attributes = value, kind, {k.replace("__", "."): v for k, v in attributes.items()}


def S4(name, **slots):
    return R(None, "S4", **slots, **{"class": R([name], package=["Matrix"])})


def frame(columns, rows):
    return R(columns, names=list(columns), row__names=list(rows), **{"class": ["data.frame"]})


def sparse_matrix(matrix, rows, columns, name="dgCMatrix"):
    """The slots of a sparse matrix of this class."""
    from scipy import sparse

    slots = {"Dim": R(list(np.shape(matrix)), "INT"), "Dimnames": [rows, columns]}
    stored = {"C": sparse.csc_matrix, "R": sparse.csr_matrix, "T": sparse.coo_matrix}[name[2]](
        np.asarray(matrix, float)
    )
    if name[2] == "T":
        slots |= {"i": stored.row, "j": stored.col}
    else:
        slots |= {"i" if name[2] == "C" else "j": stored.indices, "p": stored.indptr}
    if name[0] != "n":
        slots["x"] = stored.data if name[0] == "d" else stored.data > 0
    return S4(name, **slots)


def write_rds(path, value):
    path.write_bytes(gzip.compress(_head() + _Writer().write(value)))


def write_rda(path, objects):
    path.write_bytes(gzip.compress(b"RDX2\n" + _head() + _Writer().write_pairs(objects)))


def _head():
    return b"X\n" + struct.pack(">3i", 2, 0x40300, 0x20300)


def _int(*numbers):
    return struct.pack(f">{len(numbers)}i", *(int(n) for n in numbers))


class _Writer:
    def __init__(self):
        self.symbols = {}

    def write(self, value):
        if isinstance(value, R):
            return self.write_object(value)
        if isinstance(value, dict):
            return self.write_object(R(value, names=list(value)))
        return self.write_object(R(value)) if not isinstance(value, int) and value is not None else _int(value or NULL)

    def write_object(self, item):
        value, kind, flags = item.value, item.kind, 0
        if item.attributes:
            flags = 0x200 | (0x100 if "class" in item.attributes else 0)
        after = self.write_pairs(item.attributes) if kind == "S4" or not item.attributes else None
        if kind == "S4":
            return _int(25 | flags | 0x10000) + after
        if kind == "function":  # function(x) x, without a source reference
            return _int(3 | 0x400) + _int(GLOBAL) + self.write_pairs({"x": MISSING}) + self.write_symbol("x")
        if kind == "symbol":
            return self.write_symbol(value)
        if kind == "environment":
            self.symbols[id(item)] = len(self.symbols) + 1  # later references count it
            return _int(4, 0, GLOBAL) + self.write_pairs(value) + _int(NULL, NULL)
        body = self.write_vector(value, kind, flags)
        return body + (self.write_pairs(item.attributes) if item.attributes else b"")

    def write_vector(self, value, kind, flags):
        if isinstance(value, dict):
            value = list(value.values())
        array = np.asarray(value) if not isinstance(value, list) or kind or _is_plain(value) else None
        if array is None:
            return _int(19 | flags, len(value)) + b"".join(map(self.write, value))
        if array.dtype.kind in "UO" and len(array):
            return _int(16 | flags, len(array)) + b"".join(map(_write_char, array))
        if array.dtype.kind == "b":
            return _int(10 | flags, array.size) + _int(*array.ravel(order="F"))
        if kind == "INT" or array.dtype.kind in "iu":
            return _int(13 | flags, array.size) + _int(*array.ravel(order="F"))
        return _int(14 | flags, array.size) + array.astype(">f8").ravel(order="F").tobytes()

    def write_symbol(self, name):
        if name in self.symbols:
            return _int(self.symbols[name] << 8 | 255)
        self.symbols[name] = len(self.symbols) + 1
        return _int(1) + _write_char(name)

    def write_pairs(self, pairs):
        return b"".join(_int(0x402) + self.write_symbol(k) + self.write(v) for k, v in pairs.items()) + _int(NULL)


def _is_plain(value):
    return bool(value) and not any(isinstance(part, R | dict | list | np.ndarray | None) for part in value)


def _write_char(text):
    return _int(9 | 0x40000, len(str(text).encode())) + str(text).encode()
