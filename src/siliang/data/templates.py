"""How an instruction becomes the text in front of the answer."""

from __future__ import annotations

from typing import Any

from siliang.types import DataError


def human_assistant(instruction: str, input: str = "") -> str:
    """The template of bloom-1b4-zh's tutorials: "Human: <instruction>\\n<input>\\n\\nAssistant: "."""
    return "\n".join(["Human: " + instruction, input]).strip() + "\n\nAssistant: "


def chat_prompt(tokenizer: Any, instruction: str, input: str = "") -> str:
    """The tokenizer's own chat template, up to where the assistant begins.

    Raises:
        DataError: The tokenizer has none.
    """
    messages = [{"role": "user", "content": "\n".join([instruction, input]).strip()}]
    return _render(tokenizer, messages, add_generation_prompt=True)


def chat_answer(tokenizer: Any, instruction: str, input: str, output: str) -> str:
    """What the chat template writes after `chat_prompt`: the answer and what ends the turn.

    Raises:
        DataError: The template does not continue its own prompt, so that the answer cannot be told from it.
    """
    prompt = chat_prompt(tokenizer, instruction, input)
    messages = [
        {"role": "user", "content": "\n".join([instruction, input]).strip()},
        {"role": "assistant", "content": output},
    ]
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise DataError(
            "The tokenizer's chat template does not continue its own prompt: use data.template=human-assistant."
        )
    return whole[len(prompt) :]


def _render(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("The tokenizer has no chat template: use data.template=human-assistant.")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
