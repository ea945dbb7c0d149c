"""Result files of benchmarks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from common import merged, row


def test_a_part_of_a_benchmark_keeps_the_rest_and_what_other_devices_said():
    ours = {"device": "new", "versions": {"torch": "2"}, "commit": "b"}
    before = {"device": "old", "versions": {"torch": "2"}, "commit": "a"}
    first = [row("forward/x", "s", 2.0, 4.0, "fla"), row("forward/y", "s", 1.0, 3.0, "fla")]
    second = [row("forward/x", "s", 1.0, 4.0, "fla")]
    rows = merged(second, before | {"rows": first}, ours)
    assert rows == [*second, *({**r, "device": "old", "commit": "a"} for r in first)]
    third = [row("forward/x", "s", 0.5, 4.0, "fla")]
    rows = merged(third, ours | {"rows": rows}, ours | {"commit": "c"})
    assert [r["ours"] for r in rows] == [0.5, 2.0, 1.0]
    assert rows[0]["ratio"] == 8 and rows[1]["device"] == "old" and "device" not in rows[0]
