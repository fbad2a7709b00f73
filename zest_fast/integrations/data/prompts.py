"""A prompt and what is to follow it, as tokens with labels on the latter alone; Alpaca's instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zest_fast.integrations.data.tokens import IGNORED, Tokens, own_start

# The words of Stanford Alpaca, for a tokenizer without a template of its own.
_TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_CONTEXT = ", paired with an input that provides further context"
_INSTRUCTION, _INPUT, _RESPONSE = "### Instruction:\n{}", "### Input:\n{}", "### Response:\n"


@dataclass(frozen=True)
class Prompt:
    place: str
    prompt: str
    completion: str


def alpaca_prompt(instruction: str, more: str) -> str:
    parts = [_TASK.format(_CONTEXT if more else ""), _INSTRUCTION.format(instruction)]
    return "\n\n".join([*parts, *([_INPUT.format(more)] if more else []), _RESPONSE])


def encode_prompts(prompts: Sequence[Prompt], tokenizer: Any) -> tuple[list[Tokens], list[str]]:
    """Tokens of prompt, completion and the end of a text, with labels on the last two; and notes.

    Both are read as one text, as long as the tokens of the prompt are the beginning of it; else apart, as they are when
    the model is asked and answers. Where the tokenizer puts a token before each text, one that is written there
    already counts as that. Raises ValueError, naming the sample, for an empty completion.
    """
    samples, apart, start = [], 0, own_start(tokenizer)
    for one in prompts:
        if not one.completion:
            raise ValueError(f"{one.place}: the completion is empty: there is nothing to learn from")
        prompt = one.prompt.removeprefix(start)
        before, _ = _without_end(prompt, tokenizer)
        whole, end = _without_end(prompt + one.completion, tokenizer)
        if whole[: len(before)] != before:
            apart += 1
            whole = before + tokenizer(one.completion, add_special_tokens=False)["input_ids"]
        if not end and tokenizer.eos_token_id is not None and whole[-1] != tokenizer.eos_token_id:
            end = [tokenizer.eos_token_id]
        learnt = whole[len(before) :] + end
        if not learnt:
            raise ValueError(f"{one.place}: the completion has no tokens: there is nothing to learn from")
        samples.append(Tokens(before + learnt, [IGNORED] * len(before) + learnt))
    notes = [f"{apart} of {len(prompts)} completions begin within a token of the prompt: both are read apart"]
    return samples, notes if apart else []


def _without_end(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of a text with the special ones at its beginning, and those that the tokenizer puts at its end."""
    found = tokenizer(text, return_special_tokens_mask=True)
    ids, special = list(found["input_ids"]), list(found["special_tokens_mask"])
    length = len(ids)
    while length and special[length - 1] and 0 in special:
        length -= 1
    return ids[:length], ids[length:]
