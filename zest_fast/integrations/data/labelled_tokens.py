"""Samples whose tokens have labels of their own: chat, prompts, tags, and sequences. Made before the first batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zest_fast.foundation.documents import parse_json
from zest_fast.integrations.data.conversations import Conversation, encode_conversations, messages_of, use_template
from zest_fast.integrations.data.forms import Form, uses_template
from zest_fast.integrations.data.prompts import Prompt, alpaca_prompt, encode_prompts
from zest_fast.integrations.data.reading import Samples, parts_of, second, texts_of
from zest_fast.integrations.data.tables import Table
from zest_fast.integrations.data.tags import encode_tags, tag_names
from zest_fast.integrations.data.tokens import (
    Tokens,
    check_vocabulary,
    cut,
    longest_of,
    share_learnt,
    token_collate,
    tokenizer_of,
)
from zest_fast.integrations.pretrained import LoadedModel


def read_tokens(
    data: Table, form: Form, loaded: LoadedModel, max_length: int | None, same_length: bool, template: str | None
) -> Samples:
    limit = longest_of(loaded, max_length)
    if form.kind == "chat" or (template is not None and uses_template(data, form)):
        use_template(tokenizer_of(loaded), template, loaded.source)
    parts, notes = [], []
    for part in parts_of(data):
        encode = {"tags": _tags, "spans": _tags, "sequences": _sequences}.get(form.kind, _causal)
        samples, told = encode(part, form, loaded, limit)
        if not samples:
            raise ValueError(f"{part.path} has no sample")
        parts.append(samples)
        notes += told
    every = [sample for part in parts for sample in part]
    check_vocabulary(loaded, max(max(sample.ids) for sample in every))
    collate = token_collate(loaded, every, same_length=same_length)
    return Samples(parts[0], collate, _taken_tokens(form, loaded, parts[0]), tuple(notes), second(parts))


def _taken_tokens(form: Form, loaded: LoadedModel, samples: Sequence[Tokens]) -> str:
    columns = ", ".join(map(repr, (*form.texts, *form.labels)))
    share = share_learnt(samples)
    return {
        "chat": f"chat messages of column {columns}, loss on the assistant's tokens ({share})",
        "prompts": f"prompts and completions of columns {columns}, loss on the completions ({share})",
        "instructions": f"instructions and answers of columns {columns}, loss on the answers ({share}), "
        + ("in the tokenizer's chat template" if _has_template(loaded) else "in Alpaca's words"),
        "tags": f"words and tags of columns {columns}, loss on the first token of each word ({share})",
        "spans": f"texts and spans of columns {columns}, loss on the first token of each word ({share})",
        "sequences": f"sources and targets of columns {columns}, loss on the targets",
    }[form.kind]


def _has_template(loaded: LoadedModel) -> bool:
    return bool(getattr(loaded.processor, "chat_template", None))


def _causal(data: Table, form: Form, loaded: LoadedModel, limit: int) -> tuple[list[Tokens], list[str]]:
    tokenizer = tokenizer_of(loaded)
    read = {"chat": _chats, "prompts": _prompts, "instructions": _instructions}[form.kind]
    found = read(data, form, loaded)
    if isinstance(found[0], Prompt):
        samples, notes = encode_prompts(found, tokenizer)
    else:
        samples, notes = encode_conversations(found, tokenizer), []
    kept, cuts = cut(samples, limit, shifted=True)
    return kept, [*notes, *cuts]


def _chats(data: Table, form: Form, loaded: LoadedModel) -> list[Any]:
    systems, tools = (data.columns.get(name, [None] * len(data.places)) for name in ("system", "tools"))
    found: list[Any] = []
    for place, value, system, offered in zip(data.places, data.column(form.texts[0]), systems, tools, strict=True):
        where = f"{data.path}, {place}"
        said, messages = _system(system), messages_of(value, where)
        if said and messages[0]["role"] == "system":
            raise ValueError(f"{where} has a column 'system' and a message of the system; which is it?")
        found.append(Conversation(where, [*said, *messages], tools=_tools(offered)))
    return found


def _system(text: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def _tools(value: Any) -> Any:
    return parse_json(value) if isinstance(value, str) and value.strip() else value or None


def _prompts(data: Table, form: Form, loaded: LoadedModel) -> list[Any]:
    before, after = (data.column(name) for name in form.texts)
    chats = isinstance(before[0], list)
    if chats:
        use_template(tokenizer_of(loaded), None, loaded.source)
    found: list[Any] = []
    for place, prompt, completion in zip(data.places, before, after, strict=True):
        where = f"{data.path}, {place}"
        if chats:
            messages = messages_of(prompt, where)
            found.append(Conversation(where, [*messages, *messages_of(completion, where)], len(messages)))
        else:
            found.append(Prompt(where, _text(prompt, where), _text(completion, where)))
    return found


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: a {type(value).__name__} stands where a text is needed")
    return value


def _instructions(data: Table, form: Form, loaded: LoadedModel) -> list[Any]:
    """As a conversation where the tokenizer has a template, else in Alpaca's words."""
    asked, answered = data.column(form.texts[0]), data.column(form.texts[-1])
    empty: list[Any] = [None] * len(data.places)
    more = data.columns[form.texts[1]] if len(form.texts) > 2 else empty
    systems, histories = (data.columns.get(name, empty) for name in ("system", "history"))
    found: list[Any] = []
    for place, instruction, given, answer, system, history in zip(
        data.places, asked, more, answered, systems, histories, strict=True
    ):
        where = f"{data.path}, {place}"
        words = [_text(value, where) for value in (instruction, given or "", answer)]
        if _has_template(loaded):
            turns = [message for pair in history or () for message in _turns(pair, where)]
            question = "\n\n".join(part for part in words[:2] if part)
            messages = [*_system(system), *turns, *_turns([question, words[2]], where)]
            found.append(Conversation(where, messages, len(messages) - 1))
        elif history or system:
            raise ValueError(f"{where} has a {'history' if history else 'system'}, for which a chat template is needed")
        else:
            found.append(Prompt(where, alpaca_prompt(words[0], words[1]), words[2]))
    return found


def _turns(pair: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError(f"{place}: a history is a list of pairs, of what was said and what was answered")
    roles = ("user", "assistant")
    return [{"role": role, "content": _text(text, place)} for role, text in zip(roles, pair, strict=True)]


def _tags(data: Table, form: Form, loaded: LoadedModel, limit: int) -> tuple[list[Tokens], list[str]]:
    names = loaded.class_names or tag_names(data, form.labels[0], form.kind)
    tokenizer = tokenizer_of(loaded)
    samples, notes = encode_tags(data, form.texts[0], form.labels[0], form.kind, tokenizer, names, limit)
    kept, cuts = cut(samples, limit, shifted=False)
    return kept, [*notes, *cuts]


def _sequences(data: Table, form: Form, loaded: LoadedModel, limit: int) -> tuple[list[Tokens], list[str]]:
    tokenizer = tokenizer_of(loaded)
    if hasattr(tokenizer, "src_lang") and getattr(tokenizer, "tgt_lang", None) is None:
        raise ValueError(
            f"the tokenizer of {loaded.source!r} writes languages into its texts, and does not say which is the "
            "target: set src_lang and tgt_lang in its tokenizer_config.json"
        )
    sources, targets = texts_of(data, form.texts[0]), texts_of(data, form.labels[0])
    encoded, labels = tokenizer(sources)["input_ids"], tokenizer(text_target=targets)["input_ids"]
    longer = sum(len(ids) > limit or len(wanted) > limit for ids, wanted in zip(encoded, labels, strict=True))
    if longer:  # again, so that what ends a text stays at its end
        encoded = tokenizer(sources, truncation=True, max_length=limit)["input_ids"]
        labels = tokenizer(text_target=targets, truncation=True, max_length=limit)["input_ids"]
    notes = [f"{longer} of {len(sources)} samples are longer than {limit} tokens and are cut"] if longer else []
    return [Tokens(list(ids), list(wanted)) for ids, wanted in zip(encoded, labels, strict=True)], notes
