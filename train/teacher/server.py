"""A teacher behind a server of vLLM, or behind one that speaks its protocol.

Asked is /completions of OpenAI's protocol, with two things that are vLLM's own: a prompt of token ids is read as it
stands, and `prompt_logprobs: k` tells of every token of it the k likeliest in its place, by id. Log-probabilities are
raw there: no temperature, no penalty. (Written from the code of vLLM's main branch of November 2026:
vllm/entrypoints/openai/completion/protocol.py and serving.py.)
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2

from shoal.errors import UserError
from shoal.recipe.distill import Record, Server
from shoal.redaction import HIDDEN

from .prompt_scores import Answer

log = logging.getLogger(__name__)

T = TypeVar("T")
PLACE = "record.server"
SPARE_POSITIONS = 2
"""Positions that a document needs beside its own: for the token that nobody reads, and for the one that is written."""
BUSY = (408, 429)
"""Statuses below 500 that may be another one later."""
LONGEST_WAIT_S = 30
GOES_ON = "what is written stays, and the same command goes on"


class ServerEngine:
    """The server of ``record``, asked what it serves.

    ``length``: of the longest document.

    Raises:
        UserError: it does not answer, wants a key, does not serve the model, or takes shorter prompts only.
    """

    def __init__(self, record: Record, *, length: int) -> None:
        assert record.server is not None
        self._settings, self._top_k = record.server, record.top_k
        self.place = f"{PLACE}: {self._settings.url}"
        self._key = _key(self._settings)
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        limits = httpx2.Limits(max_connections=self._settings.parallel)
        self._client = httpx2.Client(headers=headers, timeout=self._settings.timeout_s, limits=limits)
        served = self._served()
        self._model = served["id"]
        longest = served.get("max_model_len")
        if isinstance(longest, int) and longest < length + SPARE_POSITIONS:
            raise UserError(
                f"{self.place}: takes {longest} tokens, and a row of {length} needs {length + SPARE_POSITIONS}; start "
                f"it with --max-model-len {length + SPARE_POSITIONS} or more, or lower distill.sequence_length"
            )
        self.about: dict[str, Any] = {
            "engine": "server",
            "url": self._settings.url,
            "model": self._model,
            "version": self._version(),
        }

    def scored(self, prompts: Sequence[list[int]], read: Callable[[list[int], Answer], T]) -> Iterator[T]:
        """As PromptEngine says; so many requests are under way as the recipe allows."""
        with ThreadPoolExecutor(self._settings.parallel) as pool:
            asked = [pool.submit(lambda prompt: read(prompt, self._answer(prompt)), prompt) for prompt in prompts]
            try:
                for answer in asked:
                    yield answer.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _answer(self, prompt: list[int]) -> Answer:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": 1,  # nothing but a prompt is to be scored, and something has to be written
            "temperature": 1.0,
            "prompt_logprobs": self._top_k,
            "return_token_ids": True,
        }
        answer = self._json("POST", "/completions", body)
        try:
            choice = answer["choices"][0]
            told = choice["prompt_logprobs"]
            read = choice.get("prompt_token_ids")
            entries = [
                None if of_token is None else {int(token): float(entry["logprob"]) for token, entry in of_token.items()}
                for of_token in told
            ]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.place}: answers without prompt_logprobs by token id ({type(error).__name__}: {error}); a "
                "teacher needs vLLM's server, or one that answers as it does"
            ) from error
        if read is not None and read != prompt:
            raise UserError(
                f"{self.place}: has read {len(read)} tokens, and not the {len(prompt)} that it was sent: it cuts "
                "prompts short or puts tokens of its own before them; start it without that"
            )
        return entries

    def _served(self) -> dict[str, Any]:
        """What the server says of the model."""
        listed = self._json("GET", "/models")
        data = listed.get("data") if isinstance(listed, dict) else None
        served = {
            entry["id"]: entry for entry in data or () if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        }
        wanted = self._settings.model
        if wanted is None and len(served) == 1:
            (wanted,) = served
        if wanted not in served:
            raise UserError(
                f"{PLACE}.model: {self._settings.url} serves {', '.join(served) or 'nothing'}"
                f"{'' if wanted is None else f', and not {wanted}'}; name one of them"
            )
        return served[wanted]

    def _version(self) -> str | None:
        """What vLLM calls its version, which others do not tell."""
        url = httpx2.URL(self._settings.url).copy_with(path="/version")
        try:
            answer = self._client.get(url)
            return str(answer.json()["version"]) if answer.is_success else None
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            log.debug("%s tells no version (%s)", url, error)
            return None

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers; where it may answer later, it is asked again.

        Raises:
            UserError: it does not, or refuses.
        """
        url, problem = self._settings.url.rstrip("/") + path, ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                wait_s = min(2 ** (attempt - 1), LONGEST_WAIT_S)
                log.warning("%s: %s; asking again in %d s", self.place, problem, wait_s)
                time.sleep(wait_s)
            try:
                answer = self._client.request(method, url, json=body)
                if answer.is_success:
                    return answer.json()
            except httpx2.TimeoutException:
                problem = f"gives no answer within {self._settings.timeout_s:g} s"
                continue
            except httpx2.TransportError as error:
                problem = f"cannot be reached ({type(error).__name__}: {error})"
                continue
            except (ValueError, httpx2.DecodingError) as error:
                raise UserError(f"{self.place}: answers {path} with what is no JSON ({error})") from error
            problem = f"answers {path} with HTTP {answer.status_code}: {self._said(answer)}"
            if answer.status_code < 500 and answer.status_code not in BUSY:
                raise UserError(f"{self.place}: {problem}; {self._remedy(answer.status_code)}")
        raise UserError(
            f"{self.place}: {problem}, {self._settings.retries + 1} times; see that it runs, raise {PLACE}.timeout_s "
            f"or {PLACE}.retries, or lower {PLACE}.parallel: {GOES_ON}"
        )

    def _said(self, answer: httpx2.Response) -> str:
        """The beginning of an error's text, without the key, which some servers repeat."""
        text = " ".join(answer.text.split())
        return (text if self._key is None else text.replace(self._key, HIDDEN))[:400]

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            return f"name in {PLACE}.api_key_env the environment variable that holds its key"
        if status in (404, 405):
            return f"give in {PLACE}.url the address up to the version, such as http://127.0.0.1:8000/v1"
        return (
            f"vLLM wants --max-logprobs {self._top_k} for record.top_k: {self._top_k}, and a model with the recipe's "
            "vocabulary"
        )


def _key(settings: Server) -> str | None:
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise UserError(
            f"{PLACE}.api_key_env: {settings.api_key_env} is not set; export the server's key under this name"
        )
    if not (key.isascii() and key.isprintable()) or key != key.strip():  # what refuses it later would print it
        raise UserError(
            f"{PLACE}.api_key_env: {settings.api_key_env} holds what no header can: blanks or line ends around the "
            "key, or letters beyond ASCII; export the key alone"
        )
    return key
