#!/bin/sh
# rdata 1.1.0: one function in an .RData hides everything beside it.
#
# A workspace that R saved (save.image) nearly always holds a function. rdata parses the whole file, but its conversion
# stops at the first function without a source reference, with an AssertionError that has no message, and returns nothing:
# not even the numbers that stand before it. What to do: rdata.parser.parse_file, then convert object by object.
#
# Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check rdata==1.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import gzip
import struct
import warnings
from importlib.metadata import version

import rdata

warnings.simplefilter("ignore")
print("rdata", version("rdata"))


def ints(*numbers):
    return struct.pack(f">{len(numbers)}i", *numbers)


def symbol(name):
    return ints(1, 9 | 64 << 12, len(name)) + name.encode()


# The bytes of save(n, double, file = "x.RData") with n <- c(1, 2) and double <- function(x) x, in R's own format:
# a list of pairs (2), each with its name (1); numbers (14); a function (3) of its environment, arguments and body.
head = b"RDX2\nX\n" + ints(2, 0x40300, 0x20300)
numbers = ints(0x402) + symbol("n") + ints(14, 2) + struct.pack(">2d", 1, 2)
function = ints(0x402) + symbol("double") + ints(0x403, 253, 0x402) + symbol("x") + ints(251, 254, 3 << 8 | 255)
for name, objects in {"alone": numbers, "with a function": numbers + function}.items():
    with open("x.RData", "wb") as file:
        file.write(gzip.compress(head + objects + ints(254)))
    parsed = rdata.parser.parse_file("x.RData")
    first = parsed.object.tag.value.value.decode(), parsed.object.value[0].value.tolist()
    try:
        print(f"{name}: parsed {first}, read as", rdata.read_rda("x.RData"))
        changed = name != "alone"
    except AssertionError as error:
        print(f"{name}: parsed {first}, read as AssertionError({str(error)!r})")
        changed = name == "alone"
    assert not changed, "rdata reads a workspace with a function: this finding is over"
PYTHON
