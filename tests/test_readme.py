"""Every snippet of the README runs: Python in order in one namespace, commands from the root."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from redknot.cli.main import main

pytestmark = pytest.mark.transformers
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_snippets(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {}
    assert len(blocks("python")) >= 3
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    assert "00:00" in capsys.readouterr().out


def test_commands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    ours = [c[1:] for c in commands if c[:1] == ["redknot"]]
    known = {"demo", "eval", "generate", "inspect", "profile", "store", "doctor"}
    assert {c[0] for c in ours} == known
    for command in ours:
        if command[0] == "demo":
            command = [*command, "--questions", "2", "--context", "200"]
        if command[0] == "eval":
            command = [*command, "-n", "2", "--lengths", "200"]
        assert main(command) == 0, command
        assert capsys.readouterr().out
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [c[1] for c in commands if c[:1] == ["make"]]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
