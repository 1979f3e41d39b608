"""What was measured of one model on a small set, in a JSON file that `wrap(..., calibration=...)` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtprune._checks import check_positive, check_share
from vtprune.errors import InvalidOption
from vtprune.glances import Glance, Need
from vtprune.methods.vflowopt import vflowopt
from vtprune.picking import Pick
from vtprune.pipeline import LayerStage, Pipeline
from vtprune.schedule import AnySchedule
from vtprune.stages.glances import MeanAttention
from vtprune.stages.recency import WithoutRecency
from vtprune.stages.scorers import Debiased

FORMAT = 2
FEW = 32
"""Fewer pictures than this leave what is measured rough."""
LAYERS = ("horizon", "points")
"""Parameters it brings that say which averages a method reaches."""
_WITHOUT_SETTINGS = 1
_SAMPLED, _WEIGHTS = 256, 16


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Attention that `rows` pay to pictures in one `layer`, over the place u in [0, 1]: the constants of its trends."""

    rows: str
    layer: int
    exponential: tuple[float, ...]
    cubic: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a search found for `vflowopt` at the average `keep`, that is `kept` tokens of a picture: its parameters.

    `cosine` compares hidden states with those of the unpruned model, `published` is that of the published parameters;
    `trials` says how many settings were tried, those included.
    """

    keep: float
    kept: float
    shares: tuple[float, float, float]
    threshold: float
    recycled: float
    cosine: float
    published: float
    trials: int

    @property
    def parameters(self) -> dict[str, Any]:
        """Those that `vflowopt` takes."""
        return {"shares": self.shares, "threshold": self.threshold, "recycled": self.recycled}

    def distance(self, keep: float | int) -> float:
        """How far another budget is, as shares are powers: the logarithm of the ratio."""
        return abs(log(keep / (self.kept if isinstance(keep, int) else self.keep)))

    def check_values(self) -> None:
        """Raise `ValueError` for what `vflowopt` does not take, or numbers that are none."""
        check_share("keep", self.keep, above=0, below=1)
        check_positive("kept", self.kept)
        vflowopt(**self.parameters)
        if not isfinite(self.cosine) or not isfinite(self.published):
            raise ValueError(f"cosines {self.cosine} and {self.published}")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One model, named by `model` and told by `fingerprint`, measured on `data` of so many `pictures`.

    `inflections` are layers in front of which attention to pictures shifts most, `horizon` is the first layer in front
    of which all visual tokens can leave without changing answers; None where there is none. `settings` are those
    found for `vflowopt`, one for each average that was searched.
    """

    model: str
    fingerprint: str
    data: str
    pictures: int
    versions: str
    depth: int
    trends: tuple[Trend, ...]
    inflections: tuple[int, ...]
    horizon: int | None
    settings: tuple[Setting, ...] = ()

    @property
    def few(self) -> bool:
        """Whether it was measured on so few pictures that it is rough."""
        return self.pictures < FEW

    def write(self, path: str | Path) -> None:
        """Write the JSON file."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Read a JSON file; one of format 1, from before settings were searched, has none.

        Raises:
            InvalidOption: for one that cannot be read or is of another format.
        """
        try:
            found = cls._of(json.loads(Path(path).read_text(encoding="utf-8")))
            found.check_values()
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidOption(
                f"calibration={str(path)!r} cannot be read ({error}): write one with `vtprune calibrate`"
            ) from error

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> Calibration:
        """What a file holds."""
        own = dict(data)
        form = own.pop("format")
        if form not in (FORMAT, _WITHOUT_SETTINGS):
            raise ValueError(f"format {form!r}, this version reads {_WITHOUT_SETTINGS} and {FORMAT}")
        settings = own.pop("settings") if form == FORMAT else ()
        trends = own.pop("trends")
        return cls(
            **{**own, "inflections": tuple(own["inflections"])},
            trends=tuple(
                Trend(**{**one, "exponential": tuple(one["exponential"]), "cubic": tuple(one["cubic"])})
                for one in trends
            ),
            settings=tuple(Setting(**{**one, "shares": tuple(one["shares"])}) for one in settings),
        )

    def check_values(self) -> None:
        """Raise `ValueError` for numbers that are none, or not those of layers."""
        layers = (*self.inflections, *(trend.layer for trend in self.trends))
        layers += () if self.horizon is None else (self.horizon,)
        if not all(type(layer) is int and 0 <= layer < self.depth for layer in layers) or self.horizon == 0:
            raise ValueError(f"layers {layers} of {self.depth}")
        for trend in self.trends:
            WithoutRecency(constants=trend.exponential)
            WithoutRecency(form="cubic", constants=trend.cubic)
        if type(self.pictures) is not int:
            raise ValueError(f"pictures {self.pictures!r}")
        for setting in self.settings:
            setting.check_values()

    def check(self, inner: nn.Module) -> None:
        """Raise `InvalidOption` for a model that is not the one measured."""
        if quick_fingerprint(inner) != self.fingerprint:
            raise InvalidOption(f"the calibration is one of {self.model}, and this is another model: calibrate it")

    def parameters(self, method: str, keep: float | int) -> dict[str, Any]:
        """Parameters of a method that follow from what was measured, for a budget as near to `keep` as there is."""
        if method == "information_horizon" and self.horizon is not None:
            horizon = self.horizon / self.depth
            return {"horizon": horizon, "deep": min(0.5, horizon / 2)}
        if method == "adaptinfer" and len(self.inflections) == 3:
            return {"points": tuple(layer / self.depth for layer in self.inflections)}
        if method == "vflowopt" and self.settings:
            return min(self.settings, key=lambda setting: setting.distance(keep)).parameters
        return {}

    def applied(self, pipeline: Pipeline, schedule: AnySchedule | None) -> Pipeline:
        """The pipeline with the measured constants in place of trends that each picture would give.

        A stage that cuts in front of several layers has no layer of its own.
        """
        if schedule is None:
            return pipeline
        pairs = zip(schedule.stages, schedule.layers, strict=True)
        layers = {number: layer for number, layer in pairs if schedule.stages.count(number) == 1}
        inside = tuple(
            self._with_constants(stage, layers[number]) if number in layers else stage
            for number, stage in enumerate(pipeline.inside)
        )
        return replace(pipeline, inside=inside)

    def _with_constants(self, stage: LayerStage, layer: int) -> LayerStage:
        return replace(stage, picks=tuple(self._known(pick, layer) for pick in stage.picks))

    def _known(self, pick: Pick, layer: int) -> Pick:
        """A pick whose debiasers of a trend know its constants, where it looks at a layer that was measured."""
        trend = self._trend(pick.scorer.needs, layer)
        debiasers = tuple(_with_trend(one, trend) for one in pick.debiasers)
        return replace(pick, scorer=self._known_parts(pick.scorer, layer), debiasers=debiasers)

    def _known_parts(self, scorer: Any, layer: int) -> Any:
        """The same of scorers that others are made of."""
        if isinstance(scorer, Debiased):
            trend = self._trend(scorer.needs, layer)
            return replace(scorer, debiaser=_with_trend(scorer.debiaser, trend))
        own = fields(scorer) if hasattr(scorer, "__dataclass_fields__") else ()
        parts = {field.name: getattr(scorer, field.name) for field in own if field.init}
        known = {name: self._known_parts(part, layer) for name, part in parts.items() if hasattr(part, "needs")}
        return replace(scorer, **known) if known else scorer

    def _trend(self, needs: Iterable[Need], layer: int) -> Trend | None:
        """That of the one glance among what a scorer needs; measured are means over heads and rows, and no others.

        Rows that rate the pictures are some of those of text.
        """
        glances = [need for need in needs if isinstance(need, Glance)]
        if len(glances) != 1 or not isinstance(glances[0].rule, MeanAttention):
            return None
        rows = "last" if glances[0].rows == "last" else "text"
        looked_at = layer - 1 if glances[0].at == "before" else layer
        return next((one for one in self.trends if (one.rows, one.layer) == (rows, looked_at)), None)


def _with_trend(debiaser: Any, trend: Trend | None) -> Any:
    if trend is None or not isinstance(debiaser, WithoutRecency) or debiaser.constants is not None:
        return debiaser
    return replace(debiaser, constants=trend.exponential if debiaser.form == "exponential" else trend.cubic)


def quick_fingerprint(inner: nn.Module) -> str:
    """Tells base models apart, whatever their dtype: a hash of sizes and of some numbers of some of the weights."""
    text: Any = inner.config.get_text_config()  # type: ignore[union-attr, operator]
    sizes = [getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
    wide = [own for own in inner.parameters() if own.ndim > 1 and own.is_floating_point()]
    some = [wide[len(wide) * number // _WEIGHTS] for number in range(_WEIGHTS)] if wide else []
    embeddings = inner.get_input_embeddings().weight  # type: ignore[operator]
    numbers = [_sampled(weight) for weight in (embeddings, *some)]
    described = [inner.config.model_type, *sizes, *embeddings.shape, *numbers]  # type: ignore[union-attr]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _sampled(weight: Tensor) -> list[float]:
    """Some of its numbers, evenly apart, as bfloat16 has them."""
    flat = weight.detach().reshape(-1)
    found: list[float] = flat[:: max(1, flat.numel() // _SAMPLED)].to(torch.bfloat16).float().cpu().tolist()
    return found
