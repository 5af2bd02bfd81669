"""The command that measures the longest step runs, and times what it says."""

from __future__ import annotations

import sys

import pytest
from support import ROOT

sys.path[:0] = [str(ROOT / "examples" / "benchmarks")]

import stalls  # noqa: E402


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_every_way_is_timed_and_the_plan_has_taken_a_number(
    ranks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", "tiny", "--ranks", ranks, "--refresh-every", "18"]
    rows = {row["way"]: row for row in stalls.main(asked)}
    assert list(rows) == list(stalls.ways(2))
    assert [row["lag"] for row in rows.values()] == [0, 0, 2, stalls.LAG_AT_ONCE]
    slots = [row["slots"] for row in rows.values()]
    assert slots[0] == slots[3] == 1 and slots[1] == slots[2] > 1
    assert all(row["longest_ms"] >= row["median_ms"] > 0 for row in rows.values())
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)
