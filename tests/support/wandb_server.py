"""A stub of W&B's server on loopback: it takes what W&B's client uploads and keeps what a test wants to know of it."""

from __future__ import annotations

import gzip
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY, PROJECT = "someone", "shoal"


class WandbServer(ThreadingHTTPServer):
    """Holds one run."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.run: str | None = None
        self.history: list[dict[str, Any]] = []
        self.artifacts: list[str] = []
        """Names of those that were created; the id of the first is a0."""
        self.committed: set[str] = set()
        self.used: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.seen: list[bytes] = []
        """Bodies of all requests."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""

    def name_of(self, artifact: str) -> str:
        return self.artifacts[int(artifact.removeprefix("a"))]


class Answer(BaseHTTPRequestHandler):
    server: WandbServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.server.uploads[self.path.removeprefix("/upload/")] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/graphql":
            request = json.loads(body)
            (name,) = re.findall(r"^\s*(?:query|mutation)\s+(\w+)", request["query"])
            variables = request.get("variables") or {}
            self.answer({"data": self.graphql(name, variables.get("input") or variables)})
            return
        if self.path.endswith("/file_stream"):
            rows = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if rows:
                self.server.history[rows["offset"] :] = map(json.loads, rows["content"])
        self.answer({})

    def graphql(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        server = self.server
        project = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}}
        match name:
            case "Viewer":
                return {"viewer": {"id": "u", "entity": ENTITY, "flags": "{}", "teams": {"edges": []}}}
            case "RunResumeStatus":
                return {"model": {**project, "bucket": self.resumed()}}
            case "UpsertBucket":
                server.run = asked["name"]
                bucket = {"id": "b", "name": server.run, "displayName": "run", "config": "{}", "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            case "CreateRunFiles":
                files = [{"name": file, "uploadUrl": f"{server.url}/upload/{file}"} for file in asked["files"]]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                server.artifacts.append(asked["artifactCollectionName"])
                made = {"id": f"a{len(server.artifacts) - 1}", "state": "PENDING"}
                return {"createArtifact": {"artifact": {**made, "artifactSequence": {"id": "s"}}}}
            case "CreateArtifactManifest":
                file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": f"{server.url}/upload/manifest"}
                file |= {"uploadHeaders": []}
                return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
            case "CreateArtifactFiles":
                return {"createArtifactFiles": {"files": {"edges": [*map(self.slot, asked["artifactFiles"])]}}}
            case "CommitArtifact":
                server.committed.add(server.name_of(asked["artifactID"]))
                return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}
            case "UseArtifact":
                assert asked["runName"] == server.run
                server.used.add(server.name_of(asked["artifactID"]))
                return {"useArtifact": {"artifact": {"id": asked["artifactID"]}}}
        return {}  # what is not known here is asked out of curiosity: features, organisations

    def slot(self, file: dict[str, Any]) -> dict[str, Any]:
        """Where a file of an artifact is uploaded to."""
        address = f"{self.server.url}/upload/{self.server.name_of(file['artifactID'])}/{file['name']}"
        node = {"id": "f", "name": file["name"], "displayName": file["name"], "uploadUrl": address, "uploadHeaders": []}
        return {"node": {**node, "storagePath": "x", "artifact": {"id": file["artifactID"]}}}

    def resumed(self) -> dict[str, Any] | None:
        """What is known of a run that is gone on with; it counts as begun once its configuration holds a `t`."""
        if self.server.run is None:
            return None
        tail = [json.dumps(row) for row in self.server.history[-1:]]
        counts = {"historyLineCount": len(self.server.history), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        return {"id": "b", "name": self.server.run, "tags": [], "wandbConfig": '{"t": 1}', **counts, **tails}

    def body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        self.server.seen.append(content)
        return content

    def answer(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
