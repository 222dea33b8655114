"""The push against a stub of the Hub's HTTP API on loopback: what arrives, what is resent, what a failure says."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from results import evaluation, write_run
from tiny import tiny_model, tiny_tokenizer

import shoal
from shoal.artifacts.artifact import Provenance
from shoal.errors import UserError
from shoal.eval.report.card import model_card
from shoal.eval.report.hub import push
from shoal.models.resolve import resolve_model

TOKEN = "hf_" + "t" * 34
REPO = "someone/shallow"
WEIGHTS = b"w" * 4000
CARD = "---\nlicense: mit\n---\n# card\n"


class Hub(ThreadingHTTPServer):
    """Holds one repository: files by path, large objects by content hash."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, str] = {}
        self.small: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.validated: list[str] = []
        self.commits = 0
        self.fail: dict[str, int | bytes] = {}
        """Part of a path -> status with which it is answered, or the answer."""
        self.private = True
        """What the repository is, whatever it was asked to be."""


class Answer(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refused():
            return
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/{REPO}"})
        elif path == "/api/validate-yaml":
            self.server.validated.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif path == f"/api/models/{REPO}/preupload/main":
            self.answer({"files": [self.upload_mode(file) for file in json.loads(body)["files"]]})
        elif path == f"/{REPO}.git/info/lfs/objects/batch":
            self.answer({"transfer": "basic", "objects": [self.lfs_action(o) for o in json.loads(body)["objects"]]})
        elif path == f"/api/models/{REPO}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{self.server.url}/{REPO}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"error": f"the stub has no {self.path}"}, 418)

    def do_PUT(self) -> None:
        length = self.headers.get("Content-Length")
        content = self.rfile.read(int(length)) if length else b"".join(self.chunks())
        if self.refused():
            return
        oid = self.path.removeprefix("/objects/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.objects[oid] = content
        self.server.uploads.append(oid)
        self.answer({})

    def do_GET(self) -> None:
        if "/tree/" in self.path and not self.refused():
            entries = [{"type": "file", "path": path, "oid": oid, "size": 1} for path, oid in self.server.files.items()]
            self.answer(entries)
        elif not self.refused():
            about = {"id": REPO, "sha": "1" * 40, "siblings": [], "tags": [], "downloads": 0}
            self.answer({**about, "private": self.server.private})

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
        known = self.server.files.get(file["path"])
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known}

    def lfs_action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.objects:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.server.url}/objects/{wanted['oid']}"}}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        self.server.commits += 1
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del self.server.files[value["path"]]
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.server.objects
                self.server.files[value["path"]] = value["oid"]
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                self.server.small[value["path"]] = content
                blob = b"blob %d\0" % len(content) + content
                self.server.files[value["path"]] = hashlib.sha1(blob).hexdigest()

    def refused(self) -> bool:
        # the storage behind the Hub is addressed by signed links and must not be shown the token
        expected = None if self.path.startswith("/objects/") else f"Bearer {TOKEN}"
        if self.headers.get("Authorization") != expected:
            self.answer({"error": "bad token"}, 401)
            return True
        for part, status in self.server.fail.items():
            if part in self.path:
                is_body = isinstance(status, bytes)
                self.answer(status if is_body else {"error": "broken on purpose"}, 200 if is_body else status)
                return True
        return False

    def answer(self, body: Any, status: int = 200) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # Xet speaks a protocol of its own to servers of its own; without it everything goes through the HTTP API.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """distilled/ with figures/ beside it, as a run leaves them."""
    checkpoint = tmp_path / "distilled"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(WEIGHTS)
    figures = tmp_path / "figures"
    figures.mkdir()
    (figures / "before_after.png").write_bytes(b"png")
    return checkpoint


def is_whole(folder: Path) -> bool:
    return (
        (folder / "README.md").read_text() == CARD
        and (folder / "figures" / "before_after.png").read_bytes() == b"png"
        and (folder / "model.safetensors").read_bytes() == WEIGHTS
        and not list(folder.rglob("*.tmp"))
    )


def send(folder: Path, hub: Hub, **options: Any) -> str:
    return push(folder, CARD, REPO, private=True, endpoint=hub.url, **options)


def test_push_sends_checkpoint_card_and_figures_and_sends_them_once(folder: Path, hub: Hub) -> None:
    assert send(folder, hub) == f"{hub.url}/{REPO}"
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors", "figures/before_after.png"}
    assert hub.small["README.md"].decode() == CARD
    assert hub.objects[hub.files["model.safetensors"]] == WEIGHTS
    assert hub.created[0]["visibility"] == "private"
    assert is_whole(folder)
    before = (len(hub.uploads), hub.commits)
    assert send(folder, hub) == f"{hub.url}/{REPO}"
    assert (len(hub.uploads), hub.commits) == before


def test_the_card_of_a_run_arrives_so_that_its_results_can_be_read(tmp_path: Path, hub: Hub) -> None:
    run = write_run(tmp_path / "run", recipe={"export": {"hub_repo": REPO}})
    checkpoint = run / "distilled"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    push(checkpoint, model_card(run), REPO, private=True, endpoint=hub.url)
    assert hub.small["README.md"] == (checkpoint / "README.md").read_bytes()
    arrived: Any = ModelCard.load(checkpoint / "README.md").data
    assert {result.dataset_name for result in arrived.eval_results} == {t.task for t in evaluation("distilled").tasks}
    assert set(hub.validated) == {hub.small["README.md"].decode()}


def test_a_model_in_memory_arrives_with_a_card_of_its_results(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plan = shoal.Plan(Provenance({"model": "llama"}), 6, (2, 3), "named")
    student = shoal.cut_model(model, plan)
    scores = [
        shoal.evaluate(own, tokenizer, "knowledge_continuation", limit=8, role=role)
        for own, role in ((model, "teacher"), (student, "pruned"))
    ]
    with pytest.raises(UserError, match=r"push_to_hub: plan: is missing"):
        shoal.push_to_hub(student, tokenizer, REPO)
    with pytest.raises(UserError, match=r"scores: two have the same role"):
        shoal.push_to_hub(student, tokenizer, REPO, plan=plan, scores=[scores[0], scores[0]])
    with pytest.raises(UserError, match=r"commit_massage: huggingface_hub's create_repo"):
        shoal.push_to_hub(student, tokenizer, REPO, plan=plan, scores=scores[0], commit_massage="x")
    assert not hub.created
    url = shoal.push_to_hub(student, tokenizer, REPO, plan=plan, scores=scores, endpoint=hub.url)
    assert url == f"{hub.url}/{REPO}"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    card = hub.small["README.md"].decode()
    assert "Dropped layers (of the base model, counted from 0): 2" in card
    assert "from this recipe" not in card
    assert "base_model:" not in card
    assert "knowledge_continuation" in card


def test_nothing_goes_into_a_public_repository_that_was_to_be_private(folder: Path, hub: Hub) -> None:
    hub.private = False
    with pytest.raises(UserError, match=rf"export\.private: {REPO} already exists and is public; make it private"):
        send(folder, hub)
    assert not hub.files
    assert not hub.uploads
    push(folder, CARD, REPO, private=False, endpoint=hub.url)
    assert hub.files


@pytest.mark.parametrize("where", ["/commit/", "/objects/"])
def test_a_failure_midway_leaves_a_whole_export_and_the_retry_sends_the_rest(
    folder: Path, hub: Hub, where: str
) -> None:
    hub.fail = {where: 500}
    with pytest.raises(UserError, match="HTTP status 500") as failure:
        send(folder, hub)
    assert f"The local export is complete at {folder}" in str(failure.value)
    assert is_whole(folder)
    assert not hub.files
    arrived = set(hub.uploads)
    assert len(arrived) == (2 if where == "/commit/" else 0)
    hub.fail, hub.uploads = {}, []
    send(folder, hub)
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors", "figures/before_after.png"}
    assert not arrived & set(hub.uploads)


@pytest.mark.parametrize(
    ("status", "said"), [(401, "does not accept the token; run `hf auth login`"), (403, "may not write there")]
)
def test_a_refused_token_is_explained(folder: Path, hub: Hub, status: int, said: str) -> None:
    hub.fail = {"/api/": status}
    with pytest.raises(UserError, match=said):
        send(folder, hub)
    assert is_whole(folder)


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"<html>log in here</html>"])
def test_what_answers_and_is_no_hub_is_explained(
    folder: Path, hub: Hub, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail = {"/api/": answer}
    with pytest.raises(UserError, match=r"the server that answers is not a Hub .*check the network, and HF_ENDPOINT"):
        send(folder, hub)
    assert is_whole(folder)
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.endpoint", hub.url, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    with pytest.raises(UserError, match="model 'some/one': the server that answers is not a Hub"):
        resolve_model("some/one")


def test_no_token_says_how_to_log_in(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.eval.report.hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no Hugging Face token was found; run `hf auth login`"):
        send(folder, hub)
    assert is_whole(folder)
    assert not hub.created


def test_an_unreachable_hub_is_explained(folder: Path, hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="cannot be reached"):
        send(folder, hub)
    assert is_whole(folder)
