"""The documents of every sequence, whatever the packing, and in mixtures."""

from pathlib import Path

import pytest

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig, MixtureSource
from olmoe_train.data.loader import TrainSamples
from olmoe_train.data.origins import segments
from olmoe_train.data.sequences import Sequences
from tests.support.data import EOS, write_prepared

# Documents of 1 to 40 tokens, all different, in shards of 60 tokens: some are longer than a sequence.
DOCUMENTS = [[100 + 41 * n + i for i in range(n * 7 % 40)] for n in range(20)]
LENGTH = 16


@pytest.mark.parametrize("packing", Packing)
def test_segments_hold_the_tokens_of_their_documents(tmp_path: Path, packing: Packing) -> None:
    """Taken together, they are the documents of all sequences, each token once, except a dropped tail."""
    for name in ("a", "b"):
        write_prepared(tmp_path / name, DOCUMENTS, shard_tokens=60)
    mixture = [MixtureSource("a", weight=1), MixtureSource("b", weight=2)]
    data = DataConfig(dir=str(tmp_path), sequence_length=LENGTH, packing=packing, mixture=mixture)
    samples = TrainSamples(data, seed=3)
    for index in range(12):
        source, number = samples.place(index)
        sequences = samples.sequences[source]
        assert isinstance(sequences, Sequences)
        ids = samples[index]["input_ids"].tolist()
        held = sum(stop - start for start, stop in sequences.pieces(number))
        found = segments(sequences, number)
        assert [segment.start for segment in found] == [0, *(segment.stop for segment in found[:-1])]
        assert found[-1].stop == held
        for segment in found:
            document, part = [*DOCUMENTS[segment.document], EOS], ids[segment.start : segment.stop]
            assert part in [document[at : at + len(part)] for at in range(len(document) - len(part) + 1)]
