"""Sequences of each optimizer step: the batch-size warm-up, and then trainer.global_batch_size.

The size of a step follows from the number of sequences drawn before it, and so does the position of every
later step: the state of the data remains one integer. A size ends with a whole step, the first one that
begins at or after its tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

from olmoe_train.config.train import TrainerConfig


class Phase(NamedTuple):
    """Steps of one size."""

    step: int
    """Steps before the first of them."""
    sample: int
    """Sequences before the first of them."""
    size: int
    """Sequences per step."""


@dataclass(frozen=True)
class BatchSizes:
    """The global batch size of every step of a run."""

    last: int
    """Sequences per step after the warm-up."""
    warmup: tuple[tuple[int, int], ...] = ()
    """(Sequences drawn, size): up to so many sequences, a step has this size."""
    sequence_length: int = 1
    """Tokens per sequence, for the methods that count tokens."""

    @classmethod
    def of(cls, trainer: TrainerConfig, sequence_length: int) -> "BatchSizes":
        """The batch sizes of trainer.batch_size_warmup and trainer.global_batch_size."""
        warmup = [
            (-(-stage.until_tokens // sequence_length), stage.global_batch_size)
            for stage in trainer.batch_size_warmup
        ]
        return cls(trainer.global_batch_size, tuple(warmup), sequence_length)

    @property
    def warmup_steps(self) -> int:
        """Steps before the first one of the last size."""
        return self.phases()[-1].step

    @property
    def all(self) -> list[int]:
        """Every size that a step can have."""
        return [*(size for _, size in self.warmup), self.last]

    def after(self, samples: int) -> int:
        """Return the size of the step that begins when `samples` sequences have been drawn."""
        return next((size for until, size in self.warmup if samples < until), self.last)

    def samples_after(self, steps: int, start: int = 0) -> int:
        """Return the sequences drawn before and in the next `steps` steps. start: those drawn before."""
        phase = [phase for phase in self.phases(start) if phase.step <= steps][-1]
        return phase.sample + (steps - phase.step) * phase.size

    def steps_for(self, samples: int) -> int:
        """Return the fewest steps from the start of the run that draw at least `samples` sequences."""
        phase = [phase for phase in self.phases() if phase.sample <= samples][-1]
        return phase.step - (phase.sample - samples) // phase.size

    def step_of_tokens(self, tokens: float) -> float:
        """Return the steps that so many tokens take, fractional inside of a step."""
        of_sequence = self.sequence_length
        phase = [phase for phase in self.phases() if phase.sample * of_sequence <= tokens][-1]
        return phase.step + (tokens - phase.sample * of_sequence) / (phase.size * of_sequence)

    def tokens_after(self, steps: float) -> float:
        """Return the tokens, with padding, of so many steps, fractional inside of a step."""
        phase = [phase for phase in self.phases() if phase.step <= steps][-1]
        return (phase.sample + (steps - phase.step) * phase.size) * self.sequence_length

    def in_words(self) -> str:
        """Describe the sizes, with the steps at which they end."""
        phases = self.phases()
        ends = [*(f" to step {phase.step:,}" for phase in phases[1:]), ""]
        return ", then ".join(f"{phase.size:,}{end}" for phase, end in zip(phases, ends, strict=True))

    def phases(self, start: int = 0) -> list[Phase]:
        """List the sizes that are used from `start` drawn sequences on; the first phase begins there."""
        phases, step, sample = [], 0, start
        for until, size in self.warmup:
            if sample < until:
                phases.append(Phase(step, sample, size))
                steps = -(-(until - sample) // size)
                step, sample = step + steps, sample + steps * size
        return [*phases, Phase(step, sample, self.last)]
