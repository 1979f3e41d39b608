"""Methods as rows of a table ask them: by themselves, or with what `--debias` and `--calibration` bring."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vtprune.calibration import Calibration
from vtprune.catalog import build
from vtprune.debiasing import debiased
from vtprune.errors import InvalidOption
from vtprune.pipeline import Pipeline
from vtprune.stages.recency import WithoutRecency

CALIBRATED = "calibrated"


@dataclass(frozen=True, kw_only=True)
class Variants:
    """What methods get in second rows: a debiaser by its name, a file of `vtprune calibrate`.

    A row is called after what it has of these: `fastv+recency+calibrated`.
    """

    debias: str | None = None
    calibration: Path | None = None

    @cached_property
    def _measured(self) -> Calibration | None:
        return None if self.calibration is None else Calibration.read(self.calibration)

    def of(self, method: str) -> str | None:
        """The name of a method with all of it that it takes; None where it takes nothing."""
        name = method
        if self.debias is not None and self._takes_debiaser(method):
            name += f"+{self.debias}"
        if self._measured is not None and self._takes_calibration(name):
            name += f"+{CALIBRATED}"
        return None if name == method else name

    def all_of(self, methods: list[str]) -> list[str]:
        """Methods, each with its variant behind it.

        Raises:
            InvalidOption: where no method takes the debiaser, or none the calibration.
        """
        found = [name for method in methods for name in (method, self.of(method)) if name is not None]
        told = [label for name in found for label in name.split("+")[1:]]
        if methods and self.debias is not None and self.debias not in told:
            raise InvalidOption(f"--debias {self.debias}: none of these methods takes it: {', '.join(methods)}")
        if methods and self.calibration is not None and CALIBRATED not in told:
            raise InvalidOption(
                f"--calibration {self.calibration}: none of these methods takes it: {', '.join(methods)}"
            )
        return found

    def pipeline(self, name: str | Pipeline, keep: float | int) -> Pipeline:
        """The method behind a name, but for measured trends, which need the model."""
        if isinstance(name, Pipeline):
            return name
        method, debias, calibrated = _parts(name)
        known = self._measured.parameters(method, keep) if calibrated and self._measured is not None else {}
        return debiased(build(method, known), debias)

    def asked(self, name: str | Pipeline) -> tuple[str | Pipeline, dict[str, Any]]:
        """What `wrap` is given for a name: the method, and options."""
        if isinstance(name, Pipeline):
            return name, {}
        method, debias, calibrated = _parts(name)
        return method, {"debias": debias, "calibration": self.calibration if calibrated else None}

    def recipe(self, name: str, keep: float | int) -> Mapping[str, Any]:
        """What tells its answers from those of another version of it."""
        stored = self.pipeline(name, keep).to_dict()
        if self.calibration is None or not _parts(name)[2]:
            return stored
        return {**stored, "calibration": hashlib.sha256(self.calibration.read_bytes()).hexdigest()[:16]}

    def _takes_debiaser(self, method: str) -> bool:
        try:
            debiased(build(method), self.debias)
        except InvalidOption:
            return False
        return True

    def _takes_calibration(self, name: str) -> bool:
        """Whether it has parameters of it, or trends between decoder layers."""
        assert self._measured is not None
        inside = [pick for stage in self.pipeline(name, 1.0).inside for pick in stage.picks]
        trends = any(isinstance(debiaser, WithoutRecency) for pick in inside for debiaser in pick.debiasers)
        return trends or bool(self._measured.parameters(_parts(name)[0], 1.0))


def _parts(name: str) -> tuple[str, str | None, bool]:
    """Method, debiaser, and whether it is calibrated."""
    method, *labels = name.split("+")
    debias = next((label for label in labels if label != CALIBRATED), None)
    return method, debias, CALIBRATED in labels
