"""The words that tiny models know, and a tokenizer made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vtprune.tiny.scenes import COLORS, NUMBERS, PLACES, PLURALS, SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<video>", "<vision_start>", "<vision_end>")
_ROLES = ("user", "assistant", ":", "?")
_DIGITS = tuple("0123456789")
_ASKING = ("what", "which", "color", "is", "the", "shape", "where", "there", "a", "how", "many", "left", "of")
_REST = ("number", "shown", "yes", "no", "in", "video", "this", ".", ",")
VOCABULARY = (*SPECIAL, *_ROLES, *COLORS, *SHAPES, *PLURALS, *PLACES, *NUMBERS, *_DIGITS, *_ASKING, *_REST)
WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}

PAD, BEGIN, END, IMAGE, VIDEO = (WORD_IDS[word] for word in ("<pad>", "<s>", "</s>", "<image>", "<video>"))
VISION_START, VISION_END = (WORD_IDS[word] for word in ("<vision_start>", "<vision_end>"))
VOCABULARY_SIZE = 128
"""Rounded up; the rest is never used."""


def encode(text: str) -> list[int]:
    """Ids of words with a space between any two; KeyError for a word that is not known."""
    return [WORD_IDS[word] for word in text.split()]


def build_tokenizer(ending: str = "", special: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """One id a word, lower case, `<s>` first, `ending` last. `special`: more tokens, by attribute.

    Padded on the left, as generation wants it; with an ending on the right, as text towers want it.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(WORD_IDS, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {ending}".strip(),
        pair=f"<s> $A $B {ending}".strip(),
        special_tokens=[("<s>", BEGIN), ("</s>", END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special or {},
        padding_side="right" if ending else "left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
