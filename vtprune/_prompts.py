"""The text that goes to a processor for one picture or clip and one question."""

from __future__ import annotations

from typing import Any

from vtprune.types import Modality


def prompt_text(processor: Any, prompt: str, modality: Modality = "image") -> str:
    """The prompt in the chat template where there is one; one that holds the token already is taken as it is."""
    token = getattr(processor, f"{modality}_token", None) or f"<{modality}>"
    if token in prompt:
        return prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": modality}, {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return text
    return f"{token}\n{prompt}"
