"""Refusals: one exception with all that an answer in OpenAI's form needs."""

import json
from collections.abc import Mapping, Sequence

from serve.schema import NEUTRAL

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that gets no reply, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = refusal(status, message, param, code)


def refusal(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, dict]:
    """The body of a refusal. Text that cannot be encoded is made visible."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")
    param = param and param.encode("utf-8", "backslashreplace").decode("utf-8")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(errors: Sequence[dict], body: object) -> Refused:
    """A request that is not of the schema, as its first fault in the reader's terms.

    errors: pydantic's; of the two halves of a union, the one that a value fits better goes deeper
    body: as it was sent; only what leads to a place in it is named, never a validator of ours
    """
    if errors[0]["type"].startswith("json"):
        return Refused(400, f"body: {errors[0]['msg']}", code="invalid_json")
    found = [(_place(error, body), error) for error in errors]
    place, first = max(found, key=lambda pair: (len(pair[0]), "_type" not in pair[1]["type"]))
    name = ".".join(map(str, place))
    n_others = len({tuple(other) for other, _ in found if other != place[: len(other)]})
    text = f"{name or 'body'}: {_reason(place, first)}"
    text += f" (and {n_others} more faults)" * bool(n_others)
    return Refused(400, text, name or None, "invalid_value")


def _place(error: dict, body: object) -> list[str | int]:
    """The way to a fault in the body, without the names that pydantic has for types."""
    way, last = [], len(error["loc"]) - 1
    for number, key in enumerate(error["loc"][1:], 1):
        if isinstance(body, dict) and body.get("type") == key and number < last:
            continue  # pydantic names which of the parts it took it for
        if isinstance(body, list):
            fits = isinstance(key, int) and key < len(body)
        else:
            fits = isinstance(body, dict) and key in body
        if fits:
            body = body[key]
        elif number < last or error["type"] != "missing":
            continue
        way.append(key)
    return way


def _reason(place: list[str | int], error: dict) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        others = [json.dumps(value) for value in NEUTRAL.get(str(place[-1]), ())]
        also = f", or send {' or '.join(others)}" if others else ""
        return f"this server cannot do what this field asks for; leave it out{also}"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind.startswith(("model_", "dict_", "dataclass_")):
        return "wanted an object"
    return {
        "missing": "this field is missing, or null",
        "union_tag_not_found": "wanted an object whose `type` is text or image_url",
        "union_tag_invalid": "wanted the type text or image_url",
    }.get(kind, error["msg"])
