"""Modules of decoder layers that hooks lie on: what takes the place of one after wrap has none."""

from __future__ import annotations

from vtprune.adapters.decoder import Decoder
from vtprune.errors import UnsupportedCall


class Hooked:
    """What hooks of one pipeline lie on in one decoder, by number of the layer and name in it, as it was at wrap."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._modules: dict[tuple[int, str], object] = {}

    def note(self, number: int, *names: str) -> None:
        """Remember modules of a layer, and the layer itself."""
        for name in ("", *names):
            self._modules[number, name] = self._now(number, name)

    def check(self) -> None:
        """Raise `UnsupportedCall` where another module stands in the place of one of them; a compiled one may."""
        for (number, name), module in self._modules.items():
            if self._now(number, name) is not module:
                what = f"{name.rpartition('.')[2]} of a decoder layer" if name else f"decoder layer {number}"
                raise UnsupportedCall(
                    f"{what} was replaced after wrap (by an adapter, say), and with it went hooks of this method: "
                    "unwrap, change the model, then wrap it again"
                )

    def _now(self, number: int, name: str) -> object:
        found: object = self._decoder.layers[number]
        if not name and self._decoder.listed is not None:
            found = self._decoder.listed[number] if number < len(self._decoder.listed) else None
        for part in name.split(".") if name else ():
            found = getattr(found, part, None)
        return getattr(found, "_orig_mod", found)
