"""What the `datasets` library streams: a dataset of the hub, or a local directory laid out like one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from olmoe_train.data.prepare.corpus import Layout, Part
from olmoe_train.data.prepare.record_spec import Reading
from olmoe_train.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

_ROWS = 256


@dataclass(frozen=True)
class HubDataset:
    name: str
    builder: "DatasetBuilder"

    def rows(self, split: str, skip: int, how: Reading) -> Iterator[dict[str, Any]]:
        """Each row of `split` after the first `skip`, with the columns that are asked for."""
        dataset = self.builder.as_streaming_dataset(split)
        names = dataset.column_names or list(next(iter(dataset), {}))
        columns = how.columns(f"data.source.name={self.name}", names)
        for batch in dataset.select_columns(columns).skip(skip).iter(batch_size=_ROWS):
            yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))

    @property
    def fingerprint(self) -> str:
        """Of the files' contents on the hub (their commit), or of the local files' names and times."""
        return str(self.builder.hash)


def open_hub_dataset(name: str, subset: str | None, revision: str | None) -> HubDataset:
    """UserError where there is none, it has no such subset, or the hub cannot be reached."""
    from datasets import load_dataset_builder  # seconds to import, and only this source needs it

    try:
        return HubDataset(name, load_dataset_builder(name, subset, revision=revision))
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.source.name={name}: {error}\n"
            "  Give a dataset of the Hugging Face hub or a local directory of parquet files, "
            "and its data.source.subset if it has several."
        ) from error


def hub_parts(dataset: HubDataset, split: str, validation_split: str | None) -> list[Part]:
    """Its training split and, if asked for, its validation split. UserError for one that there is not."""
    parts = []
    for key, wanted, validation in (("split", split, False), ("validation_split", validation_split, True)):
        if wanted is None:
            continue
        try:
            dataset.builder.as_streaming_dataset(wanted)
        except ValueError as error:
            raise UserError(f"data.source.{key}={wanted}: {error}") from error
        parts.append(Part(wanted, wanted, Layout.hub, validation, size=0))
    return parts
