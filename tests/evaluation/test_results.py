"""Result files of benchmarks, and the commands of exported models."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from common import merged, row

from deltify.evaluation.report import commands_for_exports


def test_a_part_of_a_benchmark_keeps_the_rest_and_what_other_devices_said():
    ours = {"device": "new", "versions": {"torch": "2"}, "commit": "b"}
    before = {"device": "old", "versions": {"torch": "2"}, "commit": "a"}
    first = [row("forward/x", "s", 2.0, 4.0, "fla"), row("forward/y", "s", 1.0, 3.0, "fla")]
    second = [row("forward/x", "s", 1.0, 4.0, "fla")]
    rows = merged(second, before | {"rows": first}, ours)
    assert rows == [*second, *({**r, "device": "old", "commit": "a"} for r in first)]
    alone = [row("forward/x", "s", 1.0, None, "fla: not installed")]  # keeps the keys that have no value
    assert merged([], before | {"rows": alone}, ours) == [alone[0] | {"device": "old", "commit": "a"}]
    third = [row("forward/x", "s", 0.5, 4.0, "fla")]
    rows = merged(third, ours | {"rows": rows}, ours | {"commit": "c"})
    assert [r["ours"] for r in rows] == [0.5, 2.0, 1.0]
    assert rows[0]["ratio"] == 8 and rows[1]["device"] == "old" and "device" not in rows[0]


def test_commands_for_exports_name_what_is_there(tmp_path):
    assert commands_for_exports(tmp_path) == []
    for folder, kind in (("native", "kimi_linear"), ("match", "deltify")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "gguf-f16.gguf").touch()
    commands = dict(commands_for_exports(tmp_path))
    assert commands["vLLM"] == f"vllm serve {tmp_path / 'native'}"
    assert commands["llama.cpp"] == f"llama-server -m {tmp_path / 'gguf' / 'gguf-f16.gguf'}"
    assert not any("match" in command for command in commands.values())
