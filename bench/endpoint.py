"""A chat endpoint that speaks OpenAI's protocol: one question, one answer, patient with limits."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException

from babyllama.errors import ConfigError

_BUSY = (408, 425, 429, 500, 502, 503, 504)
_TRIES = 6


class TooLong(Exception):
    """The text and its answer do not fit into the context of the endpoint's model."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    url: up to and with /v1
    key: sent as a bearer token; shown nowhere
    pause_s: wait after the first refusal; doubled each time
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    pause_s: float = 1.0

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The answer to a dialogue, at temperature 0.

        raises: ConfigError if the endpoint refuses, is not there, or says something else;
            TooLong if another text may do better
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "stream": False}
        head = {"Content-Type": "application/json"}
        if self.key:
            head["Authorization"] = f"Bearer {self.key}"
        address = self.url.rstrip("/") + "/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"--endpoint: wanted http://… or https://…, found {self.url!r}")
        asked = urllib.request.Request(address, json.dumps(body).encode(), head)
        for number in range(_TRIES):
            try:
                with urllib.request.urlopen(asked, timeout=self.timeout_s) as answer:
                    return self._text(answer.read(1 << 24))
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode("utf-8", "replace")
                if "context_length_exceeded" in said:
                    raise TooLong from None
                if error.code not in _BUSY:
                    said = " ".join(said.split())[:300]
                    raise ConfigError(
                        f"{self.url}: refused with {error.code}: {said}; look at --endpoint, "
                        f"--model and --key_env"
                    ) from None
                reason = f"{error.code}"
                pause = _seconds(error.headers.get("Retry-After"))
            except (OSError, HTTPException) as error:
                reason, pause = str(error), None
            if number + 1 < _TRIES:
                time.sleep(self.pause_s * 2**number if pause is None else pause)
        raise ConfigError(
            f"{self.url}: no answer after {_TRIES} tries ({reason}); is it running? Start the same "
            f"command again later: what was translated is kept"
        )

    def _text(self, body: bytes) -> str:
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ConfigError(
                f"{self.url}: wanted a chat completion, found {body[:100]!r}; the address must end "
                f"with /v1"
            )
        return text.strip()


def _seconds(text: str | None) -> float | None:
    return min(float(text), 60.0) if text and text.replace(".", "", 1).isdigit() else None
