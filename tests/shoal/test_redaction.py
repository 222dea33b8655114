"""What is printed or leaves the machine holds no secret, and moves nothing on a terminal."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import cases

from shoal.launch.cli import main
from shoal.redaction import printable, redacted, redacted_arguments

LETTERS = "aB3dE5gH7jK9mN1pQ2sT4vW6yZ8bC0fL"


def _part(of: dict[str, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(of).encode()).decode().rstrip("=")


SECRETS = {
    **{f"GitHub {kind}": f"{kind}_{LETTERS}abcd" for kind in ("ghp", "gho", "ghu", "ghs", "ghr")},
    "GitHub, fine-grained": f"github_pat_{LETTERS[:22]}_{LETTERS}{LETTERS}",
    "Google": f"AIza{LETTERS}abc",
    "JSON Web Token": f"{_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part({'sub': '1'})}.{LETTERS}",
    "Hugging Face": "hf_" + "s" * 34,
    "OpenAI": f"sk-proj-{LETTERS}T3BlbkFJ{LETTERS}",
    "OpenAI of before": "sk-proj-" + "a1-b_" * 5,
    "Anthropic": "sk-ant-api03-" + "x" * 20,
    "AWS": "AKIA" + "A" * 16,
    "GitLab": "glpat-" + "y" * 20,
    "Slack": f"xoxb-123456789012-123456789012-{LETTERS[:24]}",
    "W&B": f"wandb_v1_{LETTERS}",
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{LETTERS}\n{LETTERS}\n-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_known_by_its_form(kind: str) -> None:
    assert redacted({"note": [f"with {SECRETS[kind]} in it"]}) == {"note": ["with (hidden) in it"]}


@pytest.mark.parametrize(
    "text", ["a sk-lift and AKIA", "sha256 " + "0123456789abcdef" * 4, "s3://bucket/part@3", "1.2.3.4"]
)
def test_what_only_looks_long_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("name", ["MY_SECRET", "DB_PASS", "MYSQL_PWD", "OPENAI_KEY", "CI_TOKEN"])
def test_a_secret_is_known_because_the_environment_holds_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "swordfish-1")
    monkeypatch.setenv("PWD", "/srv/someone")
    assert redacted(["the swordfish-1 is out", "/srv/someone/x"]) == ["the (hidden) is out", "/srv/someone/x"]


def test_a_secret_is_known_by_its_key() -> None:
    kept = {"num_tokens": 5, "keys": "a", "mail": "me@host"}
    secret = {"API_KEY": "x", "api-key": "y", "aws_secret_access_key": "x", "a": [{"password": "y"}], "db_pass": "z"}
    hidden = {**dict.fromkeys(secret, "(hidden)"), "a": [{"password": "(hidden)"}]}
    assert redacted({**kept, **secret}) == {**kept, **hidden}
    urls = {"url": "https://u:p@h/", "git": "https://just-a-token@h/x"}
    assert redacted(urls) == {"url": "https://(hidden)@h/", "git": "https://(hidden)@h/x"}


def test_a_command_line_keeps_its_numbers() -> None:
    words = [
        "distill.num_tokens=80_000",
        "distill.trainer.hub_token=abc def",
        f"x={SECRETS['Hugging Face']}",
        "--config",
    ]
    told = ["distill.num_tokens=80_000", "distill.trainer.hub_token=(hidden)", "x=(hidden)", "--config"]
    assert redacted_arguments(words) == told
    nested = "distill.trainer={hub_token: 'ab c', eval_tokens: 5_000, other: {api_key: \"x, y\"}, last: 1}"
    assert redacted_arguments([nested]) == [
        "distill.trainer={hub_token: (hidden), eval_tokens: 5_000, other: {api_key: (hidden)}, last: 1}"
    ]


def test_the_list_of_forms_is_loaded_for_what_may_be_one_alone() -> None:
    script = "from shoal.redaction import redacted; redacted(['a recipe of runs/mine_and_yours', {'a': 1}])"
    done = f"import sys; {script}; assert 'detect_secrets' not in sys.modules"
    subprocess.run([sys.executable, "-c", done], check=True)


def test_control_characters_are_printed_by_their_numbers() -> None:
    assert printable("a\x1b[2Jb\r\x9b1m\u202e\tc\n") == "a\\x1b[2Jb\\r\\x9b1m\\u202e\tc\n"


@pytest.mark.parametrize("words", cases(__file__))
def test_no_argument_moves_a_terminal(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "\x1b" not in said.err + said.out
    assert r"x1b[2J" in said.err


def test_no_file_name_moves_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a\x1b[2J.yaml").write_text('model: m/x\nrun_dir: "r\\x1b[2J"\nnonsense: 1\n')
    with pytest.raises(SystemExit):
        main(["prune", "a\x1b[2J.yaml"])
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert r"a\x1b[2J.yaml: nonsense: unknown key" in said
