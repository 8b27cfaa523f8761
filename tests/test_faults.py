"""A share of the faults of `tests/faults`, drawn anew by each seed: kills, full disks, damaged and foreign files."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are injected into forked processes")
sys.path.insert(0, str(Path(__file__).parent / "faults"))

import damage  # noqa: E402
import kills  # noqa: E402

SEED = int(os.environ.get("SCBERT_FAULTS", "0"))
QUICK = [name for name in kills.WRITERS if name not in ("jobs", "jobs over jobs", "download", "report over report")]


@pytest.mark.parametrize("name", QUICK)
def test_a_writer_that_fails_anywhere_leaves_the_old_or_the_new(name):
    draw = np.random.default_rng(SEED)
    rows = list(kills.fault_writer(name, take=lambda faults: [faults[i] for i in draw.permutation(len(faults))[:3]]))
    assert [row for row in rows if row["outcome"] != "survived"] == []
    assert len(rows) == 3


@pytest.mark.parametrize("name", [name for name in damage.FORMATS if name != "result of a job"])
def test_a_damaged_file_is_refused_in_a_sentence_or_read_as_it_was(name):
    rows = list(damage.damage(name, 24, SEED))
    wrong = ("traceback", "died") + (("otherwise",) if damage.FORMATS[name].checked else ())
    assert [row for row in rows if row["outcome"] in wrong] == []
    assert len(rows) == 24


@pytest.mark.parametrize(("outcome", "now"), [("half", "x"), ("silent", "old")])
def test_what_did_not_survive_is_told(tmp_path, outcome, now):
    (tmp_path / "a.txt").write_text(now)
    writer = kills.Writer(kills.nothing, kills.nothing, lambda folder: (folder / "a.txt").read_text())
    assert kills.judge(writer, tmp_path, 0, "", "old", "new", []).startswith(outcome)
