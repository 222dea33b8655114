"""`shoal completion`: the script, in a real shell."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from shoal.launch.cli import VERBS, main
from shoal.launch.help.completion import ZSH


def script(capsys: pytest.CaptureFixture[str], shell: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert ended.value.code == 0
    return capsys.readouterr().out


def completed(text: str, *words: str) -> list[str]:
    """What bash offers for the last of ``words``."""
    ask = (
        f"COMP_WORDS=({' '.join(words)} ''); COMP_CWORD={len(words) - 1}; _shoal; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", f"{text}\n{ask}"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_verbs_options_choices_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, "bash")
    assert set(VERBS) | {"init", "list", "explain", "completion", "delta", "compare"} == set(
        completed(text, "shoal", "''")
    )
    assert completed(text, "shoal", "me") == ["measure"]
    assert completed(text, "shoal", "prune", "--d") == ["--dry-run"]
    assert completed(text, "shoal", "list", "s") == ["suites"]
    assert completed(text, "shoal", "explain", "distill.losses.taid.mo") == ["distill.losses.taid.momentum"]
    assert completed(text, "shoal", "explain", "--json", "prune.num") == ["prune.num_drop"]
    assert "--local_rank" not in text


def test_bash_completes_files_where_one_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    assert completed(script(capsys, "bash"), "shoal", "run", "--config", "mi") == ["mine.yaml"]


def test_zsh_reads_the_script_for_bash(capsys: pytest.CaptureFixture[str]) -> None:
    before, _, rest = script(capsys, "zsh").partition("_shoal() {")
    assert before == ZSH
    assert f"_shoal() {{{rest}" == script(capsys, "bash")
