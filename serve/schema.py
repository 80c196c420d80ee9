"""Requests as they may be, and the refusal of others, in the form of OpenAI.

An unknown field, a wrong type, a number out of range: each is refused with the field's name, never
passed over. Null means the server's choice, as if the field were absent; of OpenAI's fields that we
lack, the values that change nothing pass (NEUTRAL). Fields of our own come after the comment that
says so; OpenAI's client sends them by `extra_body`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.responses import JSONResponse

from babyllama.sampling import SamplingConfig

MOST_MESSAGES = 500
MOST_CHARACTERS = 32_000  # of all messages together
MOST_REPLIES = 8

# OpenAI's fields that this server lacks, with their values that ask for nothing.
NEUTRAL: dict[str, tuple] = {
    "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,),
    "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "store": (False,), "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "include_obfuscation": (True, False), "tool_calls": ([],),
    "annotations": ([],), "prediction": (), "audio": (), "refusal": ("",),
    "web_search_options": (), "thinking": (), "tool_call_id": (),
}  # fmt: skip


# With a longest length pydantic refuses half a character, which JSON can spell.
Text = Annotated[str, Field(max_length=2**20)]
Name = Annotated[Text, Field(max_length=200)]


class Strict(BaseModel):
    """No unknown field, no number in quotes, neither NaN nor infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def without_neutral(cls, data: object) -> object:
        """The fields that ask for something."""
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and (name in cls.model_fields or not is_neutral(name, value))
        }


def is_neutral(name: str, value: object) -> bool:
    """True if a field of OpenAI's that we lack asks for nothing; true is no 1, nor false a 0."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool)
        for other in NEUTRAL.get(name, ())
    )


# A text alone stands for a list of it.
_ONE_OR_SEVERAL = BeforeValidator(
    lambda value: [value] if isinstance(value, str) else value,
    json_schema_input_type=str | list[str],
)
Stop = Annotated[Text, Field(min_length=1, max_length=100)]
Beginning = Annotated[Text, Field(min_length=1, max_length=MOST_CHARACTERS)]


class StreamOptions(Strict):
    include_usage: bool = False


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ImageAddress(Strict):
    url: Text
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """An image inside the message, as a data URL; nothing is ever fetched."""

    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


# The newer name of the same.
Role = Annotated[
    Literal["system", "developer", "user", "assistant"],
    AfterValidator(lambda role: "system" if role == "developer" else role),
]


class Message(Strict):
    role: Role
    content: Annotated[
        list[Part],
        Field(max_length=50),
        BeforeValidator(
            lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value,
            json_schema_input_type=str | list[Part],
        ),
    ]
    name: Name | None = Field(None, description="accepted and not used")

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """Data URLs of images, for models that see."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class Request(Strict):
    """What both kinds of request share."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Stop], Field(max_length=16), _ONE_OR_SEVERAL] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    user: Name | None = Field(None, description="accepted and not used, as the next three")
    metadata: dict | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    # Our own.
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    no_repeat_ngram: Annotated[int, Field(ge=0, le=1000)] | None = None
    loop_guard: Literal["off", "end", "redraw"] | None = None

    @property
    def longest(self) -> int | None:
        return getattr(self, "max_completion_tokens", None) or self.max_tokens

    def sampling(self, most: int) -> SamplingConfig:
        """The settings of a reply; what the request leaves open is as in chat.py.

        most: tokens of a reply where the request names no number
        """
        asked = {
            name: value
            for name in SamplingConfig.__dataclass_fields__
            if (value := getattr(self, name, None)) is not None
        }
        asked.setdefault("loop_guard", "redraw")
        asked |= {"n": 1, "stop": self.stop or [], "max_new_tokens": self.longest or most}
        return SamplingConfig(**asked)


class ChatRequest(Request):
    """A dialogue to continue; an optional system message at its beginning is the 资料."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    # Our own.
    task: Literal["chat", "title"] | None = Field(
        None,
        description="title: the one message is a text; the reply is its title, n of them the best "
        "n, found by the search that the terminal and eval_rouge.py use; `read` says how many "
        "characters of a long text were read. The sampling fields do not go with it",
    )
    reference: Annotated[Text, Field(max_length=MOST_CHARACTERS)] | None = Field(
        None, description="资料: a text to answer from; instead of a system message"
    )
    retrieve: bool | None = Field(
        None, description="take the 资料 from the index: what fits the last message best"
    )
    truncate: bool | None = Field(
        None, description="leave out the oldest turns where a dialogue is too long"
    )


class CompletionRequest(Request):
    """A text to continue, as in pretraining."""

    prompt: Annotated[
        list[Beginning], Field(min_length=1, max_length=MOST_REPLIES), _ONE_OR_SEVERAL
    ]


def described(**fields: str | dict) -> dict:
    """JSON with an object of these fields, by their types, as OpenAPI describes it."""
    of = {name: {"type": kind} if isinstance(kind, str) else kind for name, kind in fields.items()}
    return {"schema": {"type": "object", "required": [*fields], "properties": of}}


# A reply is one JSON object; with "stream" it is events that each hold one, then [DONE].
_USAGE = described(prompt_tokens="integer", completion_tokens="integer", total_tokens="integer")
REPLY: dict[int | str, dict] = {200: {"content": {
    "application/json": described(id="string", object="string", created="integer", model="string",
                                  choices="array", usage=_USAGE["schema"]),
    "text/event-stream": described(data="string"),
}}}  # fmt: skip
_ERROR = described(error=described(message="string", type="string")["schema"])
# Without 4XX FastAPI describes a 422 of its own.
REFUSALS: dict[int | str, dict] = {
    status: {"description": "`error` says why", "content": {"application/json": _ERROR}}
    for status in ("4XX", "5XX")
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that gets no reply, and why. Text that cannot be encoded is made visible."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        message = message.encode("utf-8", "backslashreplace").decode("utf-8")
        param = param and param.encode("utf-8", "backslashreplace").decode("utf-8")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.answer = JSONResponse(self.body, status, headers)


def bad(param: str, text: str) -> Refused:
    """A request with a field that cannot be meant so."""
    return Refused(400, f"{param}: {text}", param, "invalid_value")


def invalid(errors: Sequence[dict]) -> Refused:
    """A request that is not of the schema, as its first fault in the reader's terms.

    errors: pydantic's
    """
    first = errors[0]
    if first["type"].startswith("json"):
        return Refused(400, f"body: {first['msg']}", code="invalid_json")
    place = list(first["loc"][1:])
    if "content" in place:  # behind the number of a part pydantic puts its type
        del place[place.index("content") + 2 : place.index("content") + 3]
    name = ".".join(map(str, place))
    more = f" (and {len(errors) - 1} more faults)" * (len(errors) > 1)
    text = f"{name or 'body'}: {_reason(place, first)}{more}"
    return Refused(400, text, name or None, "invalid_value")


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
