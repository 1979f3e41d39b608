"""Errors a user can act on: each says what was got, what was expected and what to do."""

from __future__ import annotations


class VtpruneError(Exception):
    """Base class of every error that vtprune raises on purpose."""


class InvalidOption(VtpruneError, ValueError):
    """An option has a value outside its range, or a name nobody knows."""


class UnsupportedModel(VtpruneError, TypeError):
    """The model has no seam to prune at, is compiled already, or is wrapped already."""


class UnsupportedCall(VtpruneError, RuntimeError):
    """The model can be pruned, but not in a call made this way."""


class MissingEvidence(VtpruneError, RuntimeError):
    """A stage needs evidence (attention scores, a question, frame scores) that nobody provides."""


class BackendUnavailable(VtpruneError, RuntimeError):
    """An explicitly requested kernel backend cannot run here."""
