"""The command line: what it accepts, and how it says no: one message, exit code 2, no traceback.

Covers: shoal.errors, shoal.launch.arguments, shoal.launch.early.asked, shoal.launch.early.model_files,
shoal.launch.early.run_directory, shoal.launch.early.settings, shoal.launch.help.options, shoal.launch.verbs.results,
shoal.recipe.keys.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from ranks import as_rank
from results import evaluation

from shoal.launch import arguments, cli
from shoal.launch.cli import main, run_verb
from shoal.launch.help.explain import explanation
from shoal.launch.verbs import launch, prune
from shoal.launch.verbs.launch import GOES_ON
from shoal.launch.verbs.results import result
from shoal.launch.verbs.run import Run
from shoal.recipe.recipe import apply_override, parse_recipe, read_settings, settled

CASES = cases(__file__)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher around us."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe that drops two layers of the tiny model, on a machine with two cores."""
    monkeypatch.setattr("shoal.ranks.allowed_cores", lambda: 2)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {teacher}\nrun_dir: {tmp_path}/run\nprune: {{drop: [1, 3]}}\ntrack: {{wandb: off}}\n")
    return str(file)


def parsed(*argv: str) -> tuple[str, str, list[str]]:
    found = arguments.parse(list(argv))
    return found.verb, found.config, found.words


def test_the_recipe_is_the_first_word_that_is_no_override_and_overrides_stand_anywhere() -> None:
    for recipe in (["r.yaml"], ["--config", "r.yaml"], ["--config=r.yaml"], ["--quiet", "r.yaml", "--dry-run"]):
        for words in ([*recipe, "seed=1", "a.b=-2"], ["seed=1", *recipe, "a.b=-2"], ["seed=1", "a.b=-2", *recipe]):
            assert parsed("prune", *words) == ("prune", "r.yaml", ["seed=1", "a.b=-2"])
    assert parsed("prune", "--config", "a=b", "seed=1") == ("prune", "a=b", ["seed=1"])


@pytest.mark.parametrize(("argv", "words"), CASES["options"])
def test_every_key_is_an_option(argv: str, words: list[str]) -> None:
    verb = argv.partition(" ")[0]
    assert parsed(*argv.split()) == (verb, "m/x", words)
    assert parsed(verb, "m/x", *words) == (verb, "m/x", words)


def test_a_folder_with_a_setting_in_its_name_is_a_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=0").mkdir()
    assert parsed("report", "seed=0", "--gguf") == ("report", "seed=0", ["export.gguf=true"])


@pytest.mark.parametrize(("argv", "message"), CASES["wrong"])
def test_wrong_words_end_with_the_usage(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_help_names_every_verb_and_what_it_makes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{verb} {row.help}" in said for verb, row in arguments.VERBS.items())


@pytest.mark.parametrize("verb", arguments.VERBS)
def test_every_verb_has_its_function_and_help_with_examples_that_can_be_given(
    capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    said, row = " ".join(capsys.readouterr().out.split()), arguments.VERBS[verb]
    assert cli._function(row.function).__module__ == f"shoal.{row.function.rpartition('.')[0]}"
    assert ("section.key=value" in said) == row.reads_recipe
    assert len(row.examples) == 3
    for example in row.examples:
        words = example.partition("  ")[0]
        assert f"shoal {verb} {words}".strip() in said
        known = arguments.parse([verb, *shlex.split(words)])
        if row.reads_recipe:
            raw: dict[str, Any] = {"model": "m"}
            for override in known.words:
                explanation(override.partition("=")[0])
                apply_override(raw, override)
            parse_recipe(raw)


def test_run_inside_a_launcher_is_refused(
    capsys: pytest.CaptureFixture[str], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in as_rank(0, 1).items():
        monkeypatch.setenv(name, value)
    assert run_verb("run", recipe, []) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error") == err.count("shoal: error: `shoal run` starts its own launcher") == 1


def test_a_rank_that_has_lost_another_says_so_in_a_line(
    capsys: pytest.CaptureFixture[str], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its traceback would stand below the reason, which the other one has said."""

    def lose(_: Run) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21429")

    monkeypatch.setattr(prune, "prune", lose)
    monkeypatch.setattr("shoal.launch.cli.time.sleep", lambda _: None)
    assert run_verb("prune", recipe, []) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "shoal: rank 0: another rank has ended, so this one does"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_said_in_one_line(
    capfd: pytest.CaptureFixture[str], recipe: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Destructor:
        def __del__(self) -> None:
            os.write(2, b"now\n")
            os.kill(os.getpid(), number)  # an exception that is raised in here is lost

    before = signal.getsignal(number)
    monkeypatch.setattr(prune, "prune", lambda _: Destructor() and None)
    child = multiprocessing.get_context("fork").Process(target=run_verb, args=("prune", recipe, []))
    child.start()
    child.join(60)
    assert child.exitcode == 128 + number
    said = [line for line in capfd.readouterr().err.partition("now\n")[2].splitlines() if line]
    assert said == ["shoal: stopped; answered and finished work is kept, and the same command resumes from there"]
    monkeypatch.setattr(prune, "prune", lambda _: None)
    assert run_verb("prune", recipe, []) == 0
    assert signal.getsignal(number) is before


def test_defect_of_ours_keeps_its_traceback(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Run) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(prune, "prune", fail)
    with pytest.raises(ZeroDivisionError):
        run_verb("prune", recipe, [])


@pytest.mark.parametrize("control", [True, False, None])
def test_scores_of_a_control_are_told_where_one_is_asked_for(tmp_path: Path, control: bool | None) -> None:
    """Those that lie there may be of other settings."""
    replace(evaluation("teacher"), role="control").save(tmp_path / "eval" / "control.json")
    run = Run(parse_recipe({"model": "m", "run_dir": str(tmp_path), "eval": {"control": control}}))
    assert bool(result("eval", run)["scores"]) == bool(control)


class Launcher:
    """Stands in for the DeepSpeed launcher: remembers its command and ends with a code, and whether it was stopped."""

    def __init__(self, code: int, asked: int | None = None) -> None:
        self.end = code, asked
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], _: dict[str, str], **__: object) -> tuple[int, int | None]:
        self.commands.append(command)
        return self.end


def test_refused_distill_ends_with_code_2_and_adds_nothing_to_what_the_rank_said(
    capsys: pytest.CaptureFixture[str], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Launcher(2)
    monkeypatch.setattr(launch, "run_launcher", launcher)
    assert run_verb("distill", recipe, ["num_processes=2"]) == 2
    assert "error" not in capsys.readouterr().err
    (command,) = launcher.commands
    assert command[command.index("--num_gpus") + 1] == "2"
    assert command[-4:] == ["distill", "--config", recipe, "num_processes=2"]


@pytest.mark.parametrize("verb", ["eval", "record"])
def test_vllm_has_one_process_whatever_ranks_there_are(recipe: str, verb: str) -> None:
    """Which has devices of its own; ranks would each refuse it, after hours of training."""
    by_vllm = ["eval.backend=vllm", "distill.teacher={kind: recorded, backend: vllm}", "num_processes=2"]
    said, file = read_settings(recipe, by_vllm)
    settings = settled(said, file, by_vllm)
    assert (launch.ranks_of(verb, settings), launch.ranks_of("measure", settings)) == (1, 2)


@pytest.mark.parametrize(
    ("verb", "stages"), [("run", ["measure", "prune", "distill", "eval"]), ("measure", ["measure"]), ("eval", ["eval"])]
)
def test_several_ranks_share_every_stage(
    recipe: str, monkeypatch: pytest.MonkeyPatch, verb: str, stages: list[str]
) -> None:
    launcher = Launcher(0)
    monkeypatch.setattr(launch, "run_launcher", launcher)
    monkeypatch.setattr("shoal.ranks.allowed_cores", lambda: 2)
    assert run_verb(verb, recipe, ["num_processes=2"]) == (2 if verb == "run" else 0), "the report finds no scores"
    assert [command[command.index("shoal.launch.cli") + 1] for command in launcher.commands] == stages


@pytest.mark.parametrize(
    ("launcher", "exit_code", "said"),
    [
        (Launcher(1), 1, f"distill ended with exit code 1; its message is above, and {GOES_ON}"),
        (Launcher(-9), 137, f"a rank was ended by signal 9, Killed, most often because memory ran out; {GOES_ON}"),
        (Launcher(247), 137, f"a rank was ended by signal 9, Killed, most often because memory ran out; {GOES_ON}"),
        (Launcher(245), 139, "a rank was ended by signal 11, Segmentation fault; " + GOES_ON),
        (Launcher(143), 143, ""),
        (Launcher(130, signal.SIGINT), 130, ""),
        (Launcher(254, signal.SIGINT), 130, f"shoal: stopped; {GOES_ON}"),
        (Launcher(0, signal.SIGTERM), 143, "shoal: stopped; the stage had just ended, and the same command resumes"),
    ],
)
def test_failed_distill_says_how_and_passes_its_exit_code_on(
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    launcher: Launcher,
    exit_code: int,
    said: str,
) -> None:
    monkeypatch.setattr(launch, "run_launcher", launcher)
    assert run_verb("distill", recipe, []) == exit_code
    _, _, after = capsys.readouterr().err.partition("under the DeepSpeed launcher\n")
    assert said in after if said else not after


@pytest.mark.parametrize("verb", arguments.VERBS)
def test_every_verb_can_be_quiet_or_verbose(verb: str) -> None:
    words = {"compare": ["a", "b"], "list": ["tasks"], "doctor": []}.get(verb, ["r"])
    assert arguments.parse([verb, *words]).loudness == "usual"
    assert arguments.parse([verb, "--quiet", *words]).loudness == "quiet"
    assert arguments.parse([verb, *words, "--verbose"]).loudness == "verbose"


def test_quiet_leaves_results_warnings_and_errors(
    capsys: pytest.CaptureFixture[str], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(run: Run) -> None:
        logging.getLogger("shoal.launch.verbs.prune").info("going on")
        logging.getLogger("shoal.launch.verbs.prune").warning("take care of %s", run.recipe.seed)

    monkeypatch.setattr(prune, "prune", work)
    assert cli._main(["prune", recipe, "--quiet"]) == 0
    said = capsys.readouterr().err
    assert said[said.index(" ") :] == " take care of 0\n"
    assert cli._main(["explain", "seed", "--quiet"]) == 0
    assert "Seed of every random choice" in capsys.readouterr().out
    assert cli._main(["prune", recipe, "--quiet", "seed=x"]) == 2
    assert capsys.readouterr().err.startswith("shoal: error: override 'seed=x'")
    assert cli._main(["prune", recipe]) == 0
    assert "going on" in capsys.readouterr().err


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    """What a command prints as JSON."""
    assert cli._main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_results_are_printed_as_json(capsys: pytest.CaptureFixture[str], recipe: str, tmp_path: Path) -> None:
    assert printed(capsys, "list", "losses")["forward_kl"]
    assert printed(capsys, "explain", "seed")[0]["default"] == "0"
    before = printed(capsys, "prune", recipe, "--dry-run")
    assert [(stage["name"], stage["state"]) for stage in before["stages"]] == [("prune", "to do")]
    made = printed(capsys, "prune", recipe)
    assert made["run_dir"] == str(tmp_path / "run")
    assert [row["layer"] for row in made["plan"] if row["dropped"]] == [1, 3]
    assert printed(capsys, "prune", recipe, "--dry-run")["stages"][0]["state"] == "done"


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("measure", "to do; block_influence, angular over 20,000 tokens"),
        ("eval", "to do; teacher, each: 5 items"),
        ("record", "to do; 200,000 tokens in rows of 64"),
    ],
)
def test_every_verb_says_before_what_it_would_do(
    capsys: pytest.CaptureFixture[str], recipe: str, tmp_path: Path, verb: str, words: str
) -> None:
    small = ["eval.tasks=knowledge_continuation", "eval.limit=5", "distill.teacher=recorded"]
    small += [f"{section}.sequence_length=64" for section in ("measure", "distill")]
    assert cli._main([verb, recipe, "--dry-run", *small]) == 0
    assert words in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_any_model_is_scored_without_a_recipe(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["eval", str(teacher), "--tasks", "knowledge_continuation", "--limit", "8", "--speed", "false"]
    argv += ["--perplexity-tokens", "64"]
    assert cli._main(argv) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "metric", "teacher"]
    assert [line.split()[0] for line in lines] == ["knowledge_continuation", "perplexity"]
    made = printed(capsys, *argv)
    assert made["run_dir"] == f"runs/{teacher.name}"
    assert [(row["role"], row["task"]) for row in made["scores"]] == [
        ("teacher", "knowledge_continuation"),
        ("teacher", "perplexity"),
    ]


@pytest.mark.slow
def test_shoal_as_a_user_types_it(recipe: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("shoal")), "prune", "--config", recipe]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "dropping 2 of 6 layers: 1, 3" in done.stderr
    assert {file.name for file in (tmp_path / "run").iterdir()} >= {"plan.json", "student"}
    refused = subprocess.run([*command, "prune.dorp=1"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == "shoal: error: override 'prune.dorp=1': prune.dorp: unknown key; did you mean 'drop'?\n"


SAID = "shoal: error: r.yaml: track.wandb: must be 'online', 'offline' or 'off' (got 'modèle')"
SHOAL = f"{shlex.quote(sys.executable)} -m shoal.launch.cli"
PRINTED = r"from shoal.launch import cli; cli._accept_streams(); cli._print('mod\xe8le')"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(
    ("command", "environment", "code", "said"),
    [
        (f"{SHOAL} prune r.yaml", {}, 2, SAID),
        (f"{SHOAL} prune r.yaml", ASCII, 2, SAID.replace("è", r"\xe8")),
        (f"{SHOAL} prune r.yaml 2>&-", {}, 2, ""),
        (f"{SHOAL} prune r.yaml 2>/dev/full", {}, 2, ""),
        (f"{SHOAL} prune modèle.yaml", ASCII, 2, "contains letters that the encoding of this locale ("),
        (
            f"{SHOAL} explain seed >/dev/full",
            {},
            2,
            "shoal: error: standard output: cannot be written (No space left on",
        ),
        (f"{SHOAL} explain seed >&-", {}, 0, ""),
        (f"{SHOAL.partition(' ')[0]} -c {shlex.quote(PRINTED)} >&2", ASCII, 0, r"mod\xe8le"),
        (f"{SHOAL} explain seed | head -c 1 >&2", {"COLUMNS": "", "TERM": "dumb"}, 0, "s"),
    ],
)
def test_streams_and_locales_of_all_kinds(
    tmp_path: Path, command: str, environment: dict[str, str], code: int, said: str
) -> None:
    (tmp_path / "r.yaml").write_text("model: m\ntrack: {wandb: modèle}\n", encoding="utf-8")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert (done.stderr == "") == (said == "")
    assert code == 0 or done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    "override",
    [
        "distill.trainer.hub_token=opensesame",
        "track.api_key=opensesame",
        "track.api_key=open opensesame",
        "track={api_key: opensesame}",
        "track.tags=opensesame{",
        "model=https://user:opensesame@host/model",
        "measure.data=[{path: https://user:opensesame@host/x, weight: none}]",
        "seed=opensesame",
    ],
)
def test_no_refusal_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    if override.startswith(("seed", "track.tags")):
        monkeypatch.setenv("SITE_PASSWORD", "opensesame")  # as a value of the environment it is known for one
    (tmp_path / "r.yaml").write_text(f"model: nowhere\nrun_dir: {tmp_path}/run\n")
    assert run_verb("measure", str(tmp_path / "r.yaml"), [override]) == 2
    said = capsys.readouterr().err
    assert "shoal: error: " in said
    assert "opensesame" not in said
    assert "(hidden)" in said


def test_a_process_that_may_take_no_more_memory_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(cli, "_told", full)
    with pytest.raises(SystemExit, match="2"):
        main(["list"])
    assert (
        capsys.readouterr().err == "shoal: error: this process may take no more memory; raise its limit (`ulimit -v`)\n"
    )
