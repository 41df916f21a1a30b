"""What determines the stream of samples, as flat JSON values, and what of it two runs have in common."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from olmoe_train.config.data import DataConfig
from olmoe_train.data.manifest import Manifest, sample_files
from olmoe_train.data.mixture import SCHEDULE, MixtureComponent, mixture_components
from olmoe_train.data.stages import data_stages

STAGES = "stages"
"""Key of the number of stages. Data without stages lacks it."""
_OF_SOURCES = re.compile(r"(mixture|train_tokens|train_sha256)\b")
_OF_STAGE = re.compile(r"stages\.(\d+)\.")


def sources_fingerprint(data: DataConfig, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """Return what the sources and their shares contribute to the fingerprint of the data.

    Args:
        data: The `data` section of the configuration.
        manifests: Those of the sources, by name.
    """
    if not data.stages:
        return _of_components(mixture_components(data), manifests, bool(data.mixture))
    numbers = {one.name: number for number, one in enumerate(mixture_components(data))}
    values: dict[str, Any] = {STAGES: len(data.stages)}
    pairs = zip(data_stages(data), data.stages, strict=True)
    for number, (stage, section) in enumerate(pairs, start=1):
        of_stage = _of_components(stage.components, manifests, bool(section.mixture))
        # Order and position of a source follow from its number; those of the same name are the same source.
        of_stage["sources"] = _listed(numbers[one.name] for one in stage.components)
        of_stage["until_sample"] = stage.until
        values |= {f"{STAGES}.{number}.{key}": value for key, value in of_stage.items()}
    return values


def stream_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], samples: int | None = None
) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two fingerprints: key -> (value before, value now); None: no such key.

    Args:
        before, now: The fingerprints.
        samples: Compare only what determines the first `samples` samples: stages after them, and the end of
            the stage that has them, may differ. None: compare everything.
    """
    if samples is not None and (STAGES in before or STAGES in now):
        before, now = _begun(before, samples), _begun(now, samples)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return {key: (before.get(key), now.get(key)) for key in keys}


def _begun(fingerprint: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """The part of a fingerprint that determines the first `samples` samples, in the form of stages."""
    if STAGES not in fingerprint:
        mixture = fingerprint.get("mixture")
        count = 1 if mixture is None else mixture.count(",") + 1
        staged = {
            f"{STAGES}.1.{key}" if _OF_SOURCES.match(key) else key: value
            for key, value in fingerprint.items()
        }
        return staged | {f"{STAGES}.1.sources": _listed(range(count))}
    begun, first = 0, 0
    while begun < fingerprint[STAGES] and (begun == 0 or first < samples):
        begun += 1
        first = fingerprint[f"{STAGES}.{begun}.until_sample"]
        if first is None:
            break
    kept = {}
    for key, value in fingerprint.items():
        stage = _OF_STAGE.match(key)
        is_open = key.endswith(".until_sample") and (value is None or value >= samples)
        if key != STAGES and not (stage and int(stage[1]) > begun) and not is_open:
            kept[key] = value
    return kept


def _of_components(
    components: list[MixtureComponent], manifests: Mapping[str, Manifest], is_mixture: bool
) -> dict[str, Any]:
    if not is_mixture:
        return _contents(manifests[components[0].name])
    values: dict[str, Any] = {"mixture": f"{SCHEDULE}: {', '.join(one.name for one in components)}"}
    whole = sum(one.weight for one in components)
    for one in components:
        contents = _contents(manifests[one.name]) | {"share": one.weight / whole}
        values |= {f"mixture.{one.name}.{key}": value for key, value in contents.items()}
    return values


def _contents(manifest: Manifest) -> dict[str, Any]:
    hashes = "".join(digest for shard in manifest.train.shards for _, digest in sample_files(shard))
    return {
        "train_tokens": manifest.train.tokens,
        "train_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
    }


def _listed(numbers: Any) -> str:
    return ", ".join(str(number) for number in numbers)
