"""Chat messages as tokens of the tokenizer's own template, with labels on what the assistant says.

Where the template marks that ({% generation %}), transformers tells which tokens they are. Else each turn of the
assistant is what the template writes after the conversation before it: the tokens of that have to be the beginning of
the whole, or the mask would be off, and the conversation is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.text_table import first_line
from zest_fast.integrations.data.labels import shortened
from zest_fast.integrations.data.tokens import IGNORED, Tokens

# How ShareGPT and its descendants call the roles.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_WEIGHTS = ("weight", "train", "masked")  # of a single message, as other trainers know them
_BESIDE_WORDS = ("tool_calls", "reasoning_content", "thinking")  # what a message may say beside its content
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Conversation:
    """place: for errors. first: the message from which on the assistant's turns are learnt. tools: for the template."""

    place: str
    messages: list[dict[str, Any]]
    first: int = 0
    tools: Any = None


def messages_of(value: Any, place: str) -> list[dict[str, Any]]:
    """Messages with "role" and "content", also of ShareGPT's "from" and "value".

    Raises ValueError that names the place and the message for anything else, and for what would be left out silently:
    parts that are no text, weights of single messages.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: {shortened(value)} is no list of messages; a message has a role and a content")
    return [_message(message, f"{place}, message {number}") for number, message in enumerate(value, start=1)]


def _message(found: Any, place: str) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{place} is {shortened(found)}; a message has a role and a content")
    message = {key: value for key, value in found.items() if value is not None}  # what Parquet fills in
    for key in _WEIGHTS:
        if key in message:
            raise ValueError(
                f"{place} has a {key!r} of its own, which is not supported: every turn of the assistant counts"
            )
    if "from" in message:
        role = _ROLES.get(str(message.pop("from")))
        if role is None:
            raise ValueError(f"{place} is from {found['from']!r}; {nearest(found['from'], _ROLES)}")
        message = {"role": role, "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise ValueError(
            f"{place} holds {sorted(map(str, found))}; a message has a role and a content, or from and value"
        )
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_of(part, place) for part in content)
    if not isinstance(content, str) and not (content is None and "tool_calls" in message):
        raise ValueError(f"{place} has the content {shortened(content)}, which is no text")
    return {**message, "content": content if content is not None else ""}


def _text_of(part: Any, place: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else shortened(part)
        raise ValueError(f"{place} has a part {kind!r}; only parts of text are read")
    return text


def use_template(tokenizer: Any, template: str | None, source: str) -> None:
    """Give the tokenizer a template of the user's; ValueError where there is none at all."""
    if template is not None:
        tokenizer.chat_template = template
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer of {source!r} has no chat template, which says how messages become one text: pass the one "
            "it was trained with as chat_template=FILE"
        )


def encode_conversations(conversations: Sequence[Conversation], tokenizer: Any) -> list[Tokens]:
    """Raises ValueError, naming the sample, where the template refuses it, or no token is the assistant's."""
    return [_encoded(one, tokenizer) for one in conversations]


def _encoded(one: Conversation, tokenizer: Any) -> Tokens:
    learnt = [
        index for index, message in enumerate(one.messages) if message["role"] == "assistant" and index >= one.first
    ]
    if not learnt:
        raise ValueError(f"{one.place} has no turn of the assistant: there is nothing to learn from")
    template = tokenizer.get_chat_template(tools=one.tools)
    marked = _MARKED.search(template) is not None and tokenizer.is_fast
    tokens = _by_marks(one, learnt[0], tokenizer) if marked else _by_prefixes(one, learnt, tokenizer)
    _check_written(one, tokens.ids, tokenizer)
    if all(label == IGNORED for label in tokens.labels):
        raise ValueError(
            f"{one.place}: the chat template marks no token as the assistant's: is {{% generation %}} around its words?"
        )
    return tokens


def _check_written(one: Conversation, ids: list[int], tokenizer: Any) -> None:
    """Raises ValueError for tools, calls and thoughts that the template leaves out: the model would learn silence."""
    without = {"tools": replace(one, tools=None)}
    for key in _BESIDE_WORDS:
        messages = [{name: value for name, value in m.items() if name != key or not value} for m in one.messages]
        without[key] = replace(one, messages=messages)
    for what, other in without.items():
        if other != one and _writes(other, ids, tokenizer):
            raise ValueError(
                f"{one.place}: the chat template writes nothing of the {what}, and the model would never see them; use "
                "one that does (chat_template=FILE), or leave them out of the data"
            )


def _writes(one: Conversation, ids: list[int], tokenizer: Any) -> bool:
    try:
        return list(_rendered(one, one.messages, tokenizer)["input_ids"]) == ids
    except ValueError:  # it needs what is left out
        return False


def _by_marks(one: Conversation, learnt: int, tokenizer: Any) -> Tokens:
    found = _rendered(one, one.messages, tokenizer, return_assistant_tokens_mask=True)
    ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
    start = len(_before(one, learnt, ids, tokenizer)) if one.first else 0
    pairs = enumerate(zip(ids, mask, strict=True))
    return Tokens(ids, [token if said and place >= start else IGNORED for place, (token, said) in pairs])


def _by_prefixes(one: Conversation, learnt: Sequence[int], tokenizer: Any) -> Tokens:
    ids = list(_rendered(one, one.messages, tokenizer)["input_ids"])
    labels = [IGNORED] * len(ids)
    for turn in learnt:
        start = len(_before(one, turn, ids, tokenizer))
        whole = list(_rendered(one, one.messages[: turn + 1], tokenizer)["input_ids"])
        _check_prefix(one, turn, whole, ids)
        labels[start : len(whole)] = ids[start : len(whole)]
    return Tokens(ids, labels)


def _before(one: Conversation, turn: int, ids: list[int], tokenizer: Any) -> list[int]:
    """Tokens of what the assistant sees before it speaks in this turn."""
    before = list(_rendered(one, one.messages[:turn], tokenizer, add_generation_prompt=True)["input_ids"])
    _check_prefix(one, turn, before, ids)
    return before


def _check_prefix(one: Conversation, turn: int, part: list[int], ids: list[int]) -> None:
    if ids[: len(part)] != part:
        raise ValueError(
            f"{one.place}, message {turn + 1}: the chat template writes the beginning of this conversation otherwise "
            "once it goes on, so that nobody can say which tokens are the assistant's; use a template with "
            "{% generation %} around its words (chat_template=FILE), or conversations of one turn"
        )


def _rendered(one: Conversation, messages: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tools=one.tools, tokenize=True, return_dict=True, **options)
    except Exception as error:  # a template raises what it likes, and jinja whatever it meets
        reason = first_line(error)
        raise ValueError(f"{one.place}: the chat template refuses this conversation ({reason})") from error
