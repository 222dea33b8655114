"""A stub of vLLM's server on loopback, as far as shoal asks it; its answers are those of transformers.

Refusals and their words are those of vLLM's main branch of November 2026.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

NAME = "served"
VERSION = "0.99.0"
Fault = Callable[[dict[str, Any]], Any]
"""Changes the choice of an answer, or gives another answer in its place."""


class PromptServer(ThreadingHTTPServer):
    """Runs the checkpoint in ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.names = [NAME]
        self.key: str | None = None
        self.max_logprobs = 300
        self.max_model_len = 1024
        self.fault: Fault | None = None
        self.statuses: list[int] = []
        """Statuses of the next requests for completions, in place of answers."""
        self.delay_s = 0.0
        self.dies_after: int | None = None
        """Number of completions after which connections are closed without an answer."""
        self.asked: list[dict[str, Any]] = []
        """Bodies of requests for completions."""
        self.at_work = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""

    @torch.no_grad()
    def told(self, prompt: list[int], count: int) -> list[dict[str, Any] | None]:
        with self.at_work:
            log_probs_SV = self.model(torch.tensor([prompt]), use_cache=False).logits[0].float().log_softmax(-1)
        entries: list[dict[str, Any] | None] = [None]
        for row, token in zip(log_probs_SV, prompt[1:], strict=False):
            best = row.topk(count).indices.tolist()
            shown = dict.fromkeys([token, *best])
            entries.append(
                {str(one): {"logprob": float(row[one]), "rank": 1 + int((row > row[one]).sum())} for one in shown}
            )
        return entries


class Answer(BaseHTTPRequestHandler):
    server: PromptServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/version":
            self.answer(200, {"version": VERSION})
        elif self.path != "/v1/models":
            self.answer(404, {"detail": "Not Found"})
        elif self.is_let_in():
            length = self.server.max_model_len
            self.answer(200, {"data": [{"id": name, "max_model_len": length} for name in self.server.names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_let_in():
            return
        server = self.server
        server.asked.append(body)
        if server.dies_after is not None and len(server.asked) > server.dies_after:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        time.sleep(server.delay_s)
        if server.statuses:
            self.refuse(server.statuses.pop(0), "overloaded")
            return
        prompt, count = body["prompt"], body["prompt_logprobs"]
        if body["model"] not in server.names:
            self.refuse(404, f"The model `{body['model']}` does not exist.")
        elif count > server.max_logprobs:
            self.refuse(
                400,
                f"Requested prompt logprobs of {count}, which is greater than max allowed: {server.max_logprobs}",
            )
        elif max(prompt) >= server.model.config.vocab_size:
            self.refuse(400, f"Token id {max(prompt)} is out of vocabulary")
        elif len(prompt) + body["max_tokens"] > server.max_model_len:
            self.refuse(400, f"This model's maximum context length is {server.max_model_len} tokens.")
        else:
            choice = {
                "index": 0,
                "text": "x",
                "prompt_logprobs": server.told(prompt, count),
                "prompt_token_ids": prompt if body.get("return_token_ids") else None,
            }
            other = None if server.fault is None else server.fault(choice)
            self.answer(200, {"model": body["model"], "choices": [choice]} if other is None else other)

    def is_let_in(self) -> bool:
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        # as some servers do
        self.refuse(401, f"wrong key {self.headers.get('Authorization')}")
        return False

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})

    def answer(self, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(folder: Path) -> Iterator[PromptServer]:
    """The server, until the block ends."""
    with PromptServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
