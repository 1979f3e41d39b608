"""VAR: attention of sinks goes to the picture, and every token stays."""

from __future__ import annotations

from vtprune.pipeline import Pipeline
from vtprune.stages.sinks import MassiveActivations, Redistribute


def attention_sink(
    *,
    share: float = 0.6,
    threshold: float = 20.0,
    most: float = 0.5,
    least: float = 0.2,
    channels: tuple[int, ...] | None = None,
) -> Pipeline:
    """Keep everything, and let heads that look at the picture give attention of sinks to the rest of it.

    Title: See What You Are Told: Visual Attention Sink in Large Multimodal Models
    Source: arXiv 2503.03321
    Deviations: the last layer is left out, as the authors meant to (their code does not). Channels are found for any
        model: those of the first token of the conversation, layer by layer (the authors give those of LLaMA-2). Text
        between and behind all pictures is changed. The model runs any attention: what changes is computed beside it.
        Batches and chats work. `wrap` refuses any other `keep` than 1.0 with it; at `share=1.0` nothing changes.

    Published:
        llava: keep=1.0, channels=(1415,2533) | (2100,4743)

    Args:
        share: what sinks keep of their attention.
        threshold: from which an activation is massive, in root mean squares of the hidden state.
        most: the largest share of sinks in the attention that a head pays to pictures, where it is changed.
        least: the least attention that a head pays to pictures, where it is changed.
        channels: where massive activations lie; None finds them. The authors' are those of LLaVA-1.5 7B and 13B.
    """
    sinks = MassiveActivations(threshold=threshold, channels=channels)
    edit = Redistribute(share=share, most=most, least=least, sinks=sinks)
    return Pipeline(name="attention_sink", picks=(), attention=edit)
