"""`deltify completion`: a real bash completes commands, recipes and fields with the script."""

import shutil
import subprocess
import sys

import pytest

from deltify.cli import COMMANDS, main
from deltify.completion import field_flags
from deltify.recipes import recipe_names
from deltify.schema import sections


def complete(script: str, words: list[str]) -> set[str]:
    """Return what bash offers for the last of these words."""
    state = f"COMP_WORDS=({' '.join(words)}'')\nCOMP_CWORD={len(words) - 1}"
    call = f"{script}\n{state}\n_shtab_deltify deltify\n" + 'printf "%s\\n" "${COMPREPLY[@]}"'
    found = subprocess.run(["bash", "-c", call], capture_output=True, text=True, timeout=60)
    assert not found.stderr, found.stderr
    return set(found.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_recipes_and_fields(capsys, tmp_path, monkeypatch):
    pytest.importorskip("shtab", reason="shtab is not installed: pip install shtab")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert set(COMMANDS) <= complete(script, ["deltify", ""])
    assert complete(script, ["deltify", "dist"]) == {"distill"}
    assert {*recipe_names(), "mine.yaml"} <= complete(script, ["deltify", "distill", ""])
    assert complete(script, ["deltify", "recipes", "smollm2-135m-h"]) == {"smollm2-135m-hybrid"}
    assert "--match.tokens" in complete(script, ["deltify", "plan", "x.yaml", "--match."])
    assert complete(script, ["deltify", "init", "x", "--gp"]) == {"--gpu"}


def test_zsh_gets_a_script_for_its_function_path(capsys):
    pytest.importorskip("shtab", reason="shtab is not installed: pip install shtab")
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef deltify") and "_deltify_recipes" in script and "--align.tokens" in script


def test_without_shtab_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "completion needs shtab. Run: pip install shtab" in capsys.readouterr().err


def test_every_field_of_a_recipe_is_completed():
    flags = field_flags()
    assert {"--name", "--teacher.model", "--align.tokens", "--extend.tokens", "--run.device"} <= set(flags)
    assert len(flags) == len(set(flags)) and len(flags) > sum(len(fields) for _, _, fields in sections())
