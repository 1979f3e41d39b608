"""The bundled tiny model, a picture and a question for it: everything a first try needs, offline."""

from __future__ import annotations

from vtprune.tiny.loading import ANSWER, PICTURE, QUESTION, list_tiny, load_tiny

__all__ = ["ANSWER", "PICTURE", "QUESTION", "list_tiny", "load_tiny"]
