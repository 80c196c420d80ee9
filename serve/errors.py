"""Refusals: one exception with all that an answer in OpenAI's form needs."""

from collections.abc import Mapping

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
