"""Stages: parts of one stream of samples, each with a mixture of its own (annealing mixes, curricula).

A stage begins at a global sample index, so its border is exact to the sample, whatever the ranks and the
batches: one step may have samples of two stages. A source of several stages continues in each of them at the
sample where the one before left off, so no sample comes twice before its source's epoch ends. Data without
stages is one stage without end.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from olmoe_train.config.data import DataConfig
from olmoe_train.data.mixture import MixtureComponent, SourceSchedule, mixture_components, stage_components


@dataclass(frozen=True)
class Stage:
    """One stage of the data."""

    first: int
    """Global index of its first sample."""
    until: int | None
    """Global index of the first sample after it. None: it has no end."""
    components: list[MixtureComponent]
    """Its sources."""

    def overlap(self, samples: int) -> int:
        """Number of its samples among the first `samples` samples of the stream."""
        end = samples if self.until is None else min(samples, self.until)
        return max(0, end - self.first)

    def requested_shares(self) -> dict[str, float]:
        """Share of the tokens that each source should have in this stage, by name."""
        whole = sum(one.weight for one in self.components)
        return {one.name: one.weight / whole for one in self.components}


def data_stages(data: DataConfig) -> list[Stage]:
    """List the stages of the data. The last one has no end: it also fills the last step of the run."""
    if not data.stages:
        return [Stage(0, None, mixture_components(data))]
    ends = [(stage.until_tokens or 0) // data.sequence_length for stage in data.stages[:-1]]
    return [
        Stage(first, until, stage_components(data, stage))
        for first, until, stage in zip([0, *ends], [*ends, None], data.stages, strict=True)
    ]


class StagedSchedule:
    """Which source each sample of the stream comes from.

    Creating it costs O(stages x sources), and a sample O(log stages + sources x log sources).
    """

    def __init__(self, sources: int, firsts: Sequence[int], shares: Sequence[Mapping[int, float]]):
        """Create the schedule.

        Args:
            sources: Number of sources of all stages.
            firsts: Global index of the first sample of each stage; the first one is 0.
            shares: For each stage, number of a source -> its share, positive, in any unit.
        """
        self._firsts, self._sources = list(firsts), [list(of_stage) for of_stage in shares]
        self._schedules = [SourceSchedule(list(of_stage.values())) for of_stage in shares]
        self._drawn = [[0] * sources]
        """For each stage, the samples of every source before the stage."""
        for first in self._firsts[1:]:
            self._drawn.append(self.samples_per_source(first))

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source of sample `index`, number of earlier samples of that source)."""
        stage = self.stage_of(index)
        place, had = self._schedules[stage].locate(index - self._firsts[stage])
        source = self._sources[stage][place]
        return source, self._drawn[stage][source] + had

    def stage_of(self, index: int) -> int:
        """Return the number, from 0, of the stage of sample `index`."""
        return bisect_right(self._firsts, index) - 1

    def samples_per_source(self, count: int) -> list[int]:
        """Return how many of the first `count` samples come from each source."""
        # While the stages are being listed, the last known one goes on.
        stage = min(self.stage_of(max(0, count - 1)), len(self._drawn) - 1)
        drawn = list(self._drawn[stage])
        of_stage = self._schedules[stage].samples_per_source(count - self._firsts[stage])
        for source, had in zip(self._sources[stage], of_stage, strict=True):
            drawn[source] += had
        return drawn
