"""From a request to token ids: what a dialogue must be, where its 资料 comes from, what fits.

Everything here may take a while (a long text, a search), so it runs outside of the event loop.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from babyllama.chat.session import Conversation
from babyllama.errors import DataError
from babyllama.language.letters import as_trained
from babyllama.retrieval.index import excerpt
from babyllama.retrieval.retriever import Retriever
from serve.schema import MOST_CHARACTERS, ChatRequest, CompletionRequest, Refused, bad
from serve.vision import Eyes
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Ids to continue.

    extra: what the answer tells beside the reply: dropped_messages, which did not fit, if any;
        sources, the passages that became the 资料, where they were asked for
    image: what the model gets of the image, of one that sees
    """

    ids: list[int]
    extra: dict = field(default_factory=dict)
    image: Tensor | None = None


def chat_prompt(
    request: ChatRequest,
    tokenizer: Tokenizer,
    context: int,
    retriever: Retriever | None,
    truncate: bool = False,
    eyes: Eyes | None = None,
) -> Prompt:
    """The prompt for the assistant's next message.

    eyes: of a model that sees; then the dialogue has one image, in whichever message of the user
    raises: Refused (400)
    """
    _check(request, eyes is not None)
    context -= eyes.n_positions if eyes else 0
    talk = Conversation(tokenizer, context - min(request.longest or context, context // 4))
    truncates = truncate if request.truncate is None else request.truncate
    reference, extra = request.reference or "", dict[str, Any]()
    if request.retrieve:
        reference, extra["sources"] = _retrieved(request, talk, retriever)
    messages: list[dict] = [{"role": m.role, "content": m.text} for m in request.messages]
    n_system = _n_system(request)
    given = [m["content"].strip() for m in messages[:n_system]] + [reference.strip()]
    messages, text = messages[n_system:], "\n".join(filter(None, given))
    if text and truncates:
        text = excerpt(text, messages[-1]["content"], talk.room * 2 // 3, talk.n_tokens)
    if text:
        messages.insert(0, {"role": "system", "content": text})
    # Each content is encoded once, however often the dialogue is laid out.
    messages = [
        {**m, "content": [tokenizer.encode_content(m["content"])]} for m in as_trained(messages)
    ]
    ids = tokenizer.render_prompt(messages)
    if truncates:
        ids, n_dropped = _shortened(messages, ids, tokenizer, talk.room)
        extra |= {"dropped_messages": n_dropped} if n_dropped else {}
    _require_fit(ids, context, "messages")
    if eyes is None:
        return Prompt(ids, extra)
    try:
        image = eyes.look([url for message in request.messages for url in message.images])
    except DataError as error:
        raise bad("messages", str(error)) from None
    return Prompt(eyes.laid(ids), extra, image)


def text_prompts(request: CompletionRequest, tokenizer: Tokenizer, context: int) -> list[Prompt]:
    """The texts to continue, as documents begin in pretraining."""
    if sum(map(len, request.prompt)) > MOST_CHARACTERS:
        raise bad("prompt", f"at most {MOST_CHARACTERS} characters")
    prompts = [Prompt(tokenizer.encode(text, bos=True)) for text in request.prompt]
    for prompt in prompts:
        _require_fit(prompt.ids, context, "prompt")
    return prompts


def _check(request: ChatRequest, sees: bool) -> None:
    """What types cannot say of a dialogue."""
    messages, n_system = request.messages, _n_system(request)
    n_characters = sum(len(m.text) for m in messages) + len(request.reference or "")
    if n_characters > MOST_CHARACTERS:
        text = f"found {n_characters} characters, at most {MOST_CHARACTERS} are read"
        raise bad("messages", text)
    for number, message in enumerate(messages):
        is_last, role = number == len(messages) - 1, message.role
        faults = {
            "this model takes no images; leave them out": message.images and not sees,
            "images come in messages of the user": message.images and role != "user",
            "system (资料) only comes first": role == "system" and number >= n_system,
            "is blank; write a message": role == "user" and not message.text.strip(),
            f"the last message must be the user's, found {role!r}": is_last and role != "user",
        }
        for fault in (text for text, holds in faults.items() if holds):
            raise bad(f"messages.{number}", fault)
    has_system = any(m.text.strip() for m in messages[:n_system])
    if has_system + bool(request.reference) + bool(request.retrieve) > 1:
        text = "one 资料 only: a system message, `reference` or `retrieve`"
        raise bad("reference" if request.reference else "retrieve", text)


def _n_system(request: ChatRequest) -> int:
    """System messages at the beginning: some clients send several, which are one 资料."""
    return next(n for n, m in enumerate([*request.messages, None]) if not m or m.role != "system")


def _retrieved(
    request: ChatRequest, talk: Conversation, retriever: Retriever | None
) -> tuple[str, list[dict]]:
    if retriever is None:
        text = "this server has no index; python -m data_process.run wiki --index makes one"
        raise bad("retrieve", text)
    question = request.messages[-1].text
    found = retriever.context(question, talk.reference_room(question), talk.n_tokens)
    return found.text, [
        {"citation": p.citation, "title": p.title, "paragraph": p.paragraph, "text": p.text}
        for p in found.passages
    ]


def _shortened(
    messages: list[dict], ids: list[int], tokenizer: Tokenizer, room: int
) -> tuple[list[int], int]:
    """The prompt without its oldest turns, as few as must go; the 资料 and the last one stay."""
    first = int(messages[0]["role"] == "system")
    n_dropped = 0
    for start, message in enumerate(messages):
        if start > first and message["role"] == "user" and len(ids) > room:
            n_dropped = start - first
            ids = tokenizer.render_prompt(messages[:first] + messages[start:])
    return ids, n_dropped


def _require_fit(ids: list[int], context: int, param: str) -> None:
    if len(ids) >= context:
        text = (
            f"the prompt has {len(ids)} tokens, the model's context is {context}, of which the "
            f"reply needs one at least; shorten the prompt"
            + " or send truncate: true"
            * (param == "messages")
        )
        raise Refused(400, text, param, "context_length_exceeded")
