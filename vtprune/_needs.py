"""What a method reads, sorted by where that comes from."""

from __future__ import annotations

from functools import cached_property

from vtprune.glances import Glance, Need, SinkReading, StateGlance, Transition
from vtprune.readings import Reading


class Reads:
    """Base of what is made of stages."""

    @cached_property
    def wanted(self) -> frozenset[Need]:
        """What the stages say they need; only scorers must say so."""
        raise NotImplementedError

    @cached_property
    def needs(self) -> frozenset[str]:
        """Names of the evidence its stages read."""
        return frozenset(need if isinstance(need, str) else need.name for need in self.wanted)

    @cached_property
    def readings(self) -> dict[str, Reading]:
        """How to take evidence from the vision encoder, by name; what is not there comes from elsewhere."""
        return {need.name: need for need in self.wanted if isinstance(need, Reading)}

    @cached_property
    def glances(self) -> dict[str, Glance]:
        """How to take evidence from attention of the language model at drop points, by name."""
        return {need.name: need for need in self.wanted if isinstance(need, Glance)}

    @cached_property
    def states(self) -> dict[str, StateGlance]:
        """How to take evidence from hidden states of the language model at drop points, by name."""
        return {need.name: need for need in self.wanted if isinstance(need, StateGlance)}

    @cached_property
    def transitions(self) -> dict[str, Transition]:
        """How to take evidence from what layers of the language model change up to drop points, by name."""
        return {need.name: need for need in self.wanted if isinstance(need, Transition)}

    @cached_property
    def sinks(self) -> dict[str, SinkReading]:
        """How to tell sinks by hidden states at drop points, by name."""
        return {need.name: need for need in self.wanted if isinstance(need, SinkReading)}

    @cached_property
    def asked(self) -> frozenset[str]:
        """Names of the evidence that is not taken from the language model."""
        return self.needs - {*self.glances, *self.states, *self.transitions, *self.sinks}


class _ReadsNothing(Reads):
    wanted = frozenset()


NOTHING = _ReadsNothing()
