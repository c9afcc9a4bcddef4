"""Requests to a server: JSON over HTTP, with retries."""

import json
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from distill.errors import UserError

log = logging.getLogger("distill")

KEY = "DISTILL_TEACHER_KEY"  # environment variable; a key is in no recipe, log or file
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that a later request may not have
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds
_MAX_SHOWN = 300  # characters of a server's message


class Refusal(Exception):
    """The server refused a request, and would refuse it again.

    Args:
        status: HTTP status.
        message: The server's text, shortened.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}")
        self.status, self.message = status, message


class _NoRedirect(HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = build_opener(_NoRedirect)
_RANDOM = random.Random()  # not the global generator, whose draws decide a training


@dataclass(frozen=True)
class Client:
    """A server of a teacher, or of the student.

    Args:
        url: Address that the paths of the OpenAI API follow, such as ``http://127.0.0.1:8000/v1``.
        setting: Key of the recipe that holds it.
        attempts: Requests before it counts as unreachable; 8 wait for about a minute.
        timeout: Seconds without a byte after which a request has failed.
        delay: Seconds before the second attempt; it doubles with each.
    """

    url: str
    setting: str = "teacher.url"
    attempts: int = 8
    timeout: float = 600.0
    delay: float = _FIRST_DELAY

    def get(self, path: str) -> Any:
        """The JSON at a path below the address."""
        return self._repeat(f"{self.url.rstrip('/')}{path}", None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON to a path below the address.

        Raises:
            Refusal: The request is invalid for this server.
            UserError: The server cannot be reached, or stays busy.
        """
        return self._repeat(f"{self.url.rstrip('/')}{path}", body)

    def post_to_root(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON to a path beside the OpenAI API, which is at ``/v1``."""
        return self._repeat(f"{self.url.rstrip('/').removesuffix('/v1')}{path}", body)

    def command(self, path: str, body: dict[str, Any]) -> None:
        """Send JSON to a path below the address, whose reply is a text or empty.

        Raises:
            Refusal: The request is invalid for this server, or has taken effect before.
            UserError: The server cannot be reached, or stays busy.
        """
        self._repeat(f"{self.url.rstrip('/')}{path}", body, bytes)

    def _repeat(
        self, address: str, body: dict[str, Any] | None, read: Callable[[bytes], Any] = json.loads
    ) -> Any:
        failure = ""
        for attempt in range(self.attempts):
            after = 0.0  # seconds that the server wants to wait
            try:
                return read(_request(address, body, self.timeout))
            except HTTPError as error:
                with error:
                    if error.code not in _BUSY:
                        raise Refusal(error.code, _message(error)) from None
                    failure, after = f"{error.code} {error.reason}", _retry_after(error)
            except (OSError, HTTPException, ValueError) as error:  # cut, late, or not JSON
                failure = str(error)
            log.debug("%s: attempt %d failed (%s)", address, attempt + 1, failure)
            if attempt + 1 < self.attempts:
                time.sleep(max(after, self._delay(attempt)))
        raise UserError(
            f"{self.setting} is {self.url}, but {self.attempts} requests to {address} failed "
            f"({failure}): start the server there and run the same command again, which "
            "keeps what the server gave"
        )

    def _delay(self, attempt: int) -> float:
        """Seconds to wait, spread so that requests that failed together do not return together."""
        return min(_LONGEST_DELAY, self.delay * 2**attempt) * _RANDOM.uniform(0.5, 1)


def list_models(client: Client) -> dict[str, dict[str, Any]]:
    """What a server lists about each of its models, by name; at least one.

    Raises:
        UserError: It cannot be reached, or lists none.
    """
    try:
        listed = {str(each["id"]): dict(each) for each in client.get("/models")["data"]}
    except Refusal as refusal:
        raise UserError(
            f"{client.setting} is {client.url}, but its list of models is refused ({refusal}): "
            f"give the address that ends in /v1, and a key in {KEY} where it needs one"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        log.debug("%s/models has another form: %s", client.url, error)
        listed = {}
    if not listed:
        raise UserError(
            f"{client.setting} is {client.url}, but {client.url}/models lists no models: give the "
            "address of an OpenAI-compatible server, which ends in /v1"
        )
    return listed


def _retry_after(error: HTTPError) -> float:
    after = error.headers.get("Retry-After", "")
    return min(float(after), _LONGEST_DELAY) if after.isdecimal() else 0.0


def _request(address: str, body: dict[str, Any] | None, timeout: float) -> bytes:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    content = None if body is None else json.dumps(body).encode()
    with _OPENER.open(Request(address, content, headers), timeout=timeout) as response:
        return bytes(response.read())


def _message(error: HTTPError) -> str:
    """The sentence in an error's body."""
    try:
        text = error.read().decode(errors="replace")
        content = json.loads(text)
        for key in ("error", "message", "detail"):
            if isinstance(content, dict) and key in content:
                content = content[key]
        text = content if isinstance(content, str) else text
    except (OSError, HTTPException, ValueError):
        text = str(error.reason)
    line = " ".join(text.split())
    return line[:_MAX_SHOWN] + ("..." if len(line) > _MAX_SHOWN else "")
