"""Shares of the sources in the tokens of a run: achieved, and requested by data.mixture or data.stages."""

from olmoe_train.data.loader import TrainSamples
from olmoe_train.data.stages import Stage


def source_shares(data: TrainSamples, samples: int) -> dict[str, dict[str, float]]:
    """Return statistics per source over the first `samples` samples.

    Returns:
        By source name: `share`, the source's fraction of the tokens; `requested_share`, the fraction in the
        configuration, over the stages so far; and `epochs`, the number of passes over the source's sequences.
    """
    drawn = data.schedule.samples_per_source(samples)
    tokens = _tokens(data, drawn)
    requested = dict.fromkeys([source.name for source in data.sources], 0.0)
    for stage in [one for one in data.stages if one.first == 0 or one.first < samples]:
        part = sum(_tokens(data, _drawn_in(data, stage, samples))) / sum(tokens) if samples else 1.0
        for name, share in stage.requested_shares().items():
            requested[name] += part * share
    return {
        source.name: {
            "share": tokens[i] / max(1, sum(tokens)),
            "requested_share": requested[source.name],
            "epochs": drawn[i] / len(data.sequences[i]),
        }
        for i, source in enumerate(data.sources)
    }


def stage_shares(data: TrainSamples, stage: Stage, samples: int) -> dict[str, dict[str, float]]:
    """Return the shares of the sources in one stage, as far as the first `samples` samples have it.

    Returns:
        By name of every source of the data: `stage_share`, its fraction of the tokens, and
        `requested_stage_share`, the fraction in the configuration; 0 for sources of other stages.
    """
    tokens, requested = _tokens(data, _drawn_in(data, stage, samples)), stage.requested_shares()
    return {
        source.name: {
            "stage_share": tokens[i] / max(1, sum(tokens)),
            "requested_stage_share": requested.get(source.name, 0.0),
        }
        for i, source in enumerate(data.sources)
    }


def _drawn_in(data: TrainSamples, stage: Stage, samples: int) -> list[int]:
    """Samples of each source that a stage has among the first `samples` samples."""
    before = data.schedule.samples_per_source(stage.first)
    after = data.schedule.samples_per_source(stage.first + stage.overlap(samples))
    return [late - early for early, late in zip(before, after, strict=True)]


def _tokens(data: TrainSamples, drawn: list[int]) -> list[float]:
    """Tokens without padding of these numbers of samples of each source."""
    return [n * s.tokens_per_sequence for n, s in zip(drawn, data.sequences, strict=True)]
