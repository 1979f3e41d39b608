"""Bundled tiny models, a picture and a question for them: everything a first try needs, offline."""

from __future__ import annotations

from vtprune.tiny.loading import ANSWER, PICTURE, QUESTION, list_tiny, load_tiny, load_tiny_clip

__all__ = ["ANSWER", "PICTURE", "QUESTION", "list_tiny", "load_tiny", "load_tiny_clip"]
