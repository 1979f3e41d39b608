"""The methods: one file each. A key of `METHODS` is a name `wrap` takes; its value builds the `Pipeline`."""

from __future__ import annotations

from collections.abc import Callable

from vtprune.methods.divprune import divprune
from vtprune.methods.fastervlm import fastervlm
from vtprune.methods.identity import identity
from vtprune.methods.random import random
from vtprune.methods.uniform import uniform
from vtprune.methods.vtprune import vtprune
from vtprune.pipeline import Pipeline

METHODS: dict[str, Callable[..., Pipeline]] = {
    "vtprune": vtprune,
    "fastervlm": fastervlm,
    "divprune": divprune,
    "random": random,
    "uniform": uniform,
    "identity": identity,
}
