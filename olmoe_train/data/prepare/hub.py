"""Streams a dataset with the `datasets` library: one of the hub, or a local directory laid out like one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from olmoe_train.data.prepare.corpus import CorpusFile, FileFormat
from olmoe_train.data.prepare.record_spec import RecordSpec
from olmoe_train.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder


@dataclass(frozen=True)
class HubDataset:
    """A dataset that is read as a stream, without downloading it first."""

    name: str
    builder: "DatasetBuilder"

    def rows(self, split: str, skip: int, spec: RecordSpec, rows_per_read: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of `split` after the first `skip`, with the columns that `spec` needs.

        `rows_per_read` rows are in memory at a time.
        """
        dataset = self.builder.as_streaming_dataset(split)
        names = dataset.column_names or list(next(iter(dataset), {}))
        columns = spec.columns(f"data.source.name={self.name}", names)
        for batch in dataset.select_columns(columns).skip(skip).iter(batch_size=rows_per_read):
            yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))

    @property
    def fingerprint(self) -> str:
        """Hash of the files' contents on the hub (their commit), or of local files' names and times."""
        return str(self.builder.hash)


def open_hub_dataset(name: str, subset: str | None, revision: str | None) -> HubDataset:
    """Open the dataset that data.source.name, subset and revision describe.

    Raises:
        UserError: There is no such dataset or subset, or the hub cannot be reached.
    """
    from datasets import load_dataset_builder  # takes seconds to import, and only this source needs it

    try:
        return HubDataset(name, load_dataset_builder(name, subset, revision=revision))
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.source.name={name}: {error}\n"
            "  Give a dataset of the Hugging Face hub or a local directory of parquet files, "
            "and data.source.subset if the dataset has several subsets."
        ) from error


def hub_splits(dataset: HubDataset, split: str, validation_split: str | None) -> list[CorpusFile]:
    """Return the training split and, if one is named, the validation split.

    Raises:
        UserError: The dataset has no split of that name.
    """
    found = []
    for key, wanted, validation in (("split", split, False), ("validation_split", validation_split, True)):
        if wanted is None:
            continue
        try:
            dataset.builder.as_streaming_dataset(wanted)
        except ValueError as error:
            raise UserError(f"data.source.{key}={wanted}: {error}") from error
        found.append(CorpusFile(wanted, wanted, FileFormat.hub, validation, size=0))
    return found
