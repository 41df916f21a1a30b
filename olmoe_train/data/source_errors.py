"""Checks of the keys that name the sources of the data: data.mixture and data.stages."""

from pathlib import Path

from olmoe_train.config.data import DataConfig, MixtureSource
from olmoe_train.data.mixture import VALIDATION, mixture_of, stage_components


def mixture_errors(data: DataConfig) -> list[str]:
    """Return what is wrong with the sources, one message per problem. The directories are not read."""
    if data.stages:
        return _stages_errors(data)
    return _sources_errors(data, "data.mixture", data.mixture) if data.mixture else []


def _sources_errors(data: DataConfig, key: str, mixture: list[MixtureSource]) -> list[str]:
    """What is wrong with one mixture. key: that of the mixture."""
    errors = []
    for index, part in enumerate(mixture):
        if (part.weight is None) == (part.tokens is None):
            errors.append(
                f"{key}[{index}]: give either weight or tokens; it has weight={part.weight}, "
                f"tokens={part.tokens}"
            )
        for name in ("weight", "tokens"):
            value = getattr(part, name)
            if value is not None and value <= 0:
                errors.append(
                    f"{key}[{index}].{name}={value}: must be positive; leave the source out instead"
                )
    by_weight = [part.weight is not None for part in mixture]
    if not errors and any(by_weight) and not all(by_weight):
        errors.append(f"{key}: some sources have weights and others tokens; use the same for all")
    names = [source.name for source in mixture_of(data, mixture)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        errors.append(f"{key}: {names.count(name)} sources are named {name}; give each a different name")
    if VALIDATION in names:
        errors.append(f"{key}: a source may not be named {VALIDATION}, the name of all of them together")
    return errors


def _stages_errors(data: DataConfig) -> list[str]:
    """What is wrong with data.stages: each stage alone, and the names of sources in all of them."""
    errors = []
    if data.mixture:
        errors.append(
            "data.mixture and data.stages are both set: move data.mixture into the stages that it is for"
        )
    for index, stage in enumerate(data.stages):
        key = f"data.stages[{index}]"
        if (stage.dir is None) == (not stage.mixture):
            found = f"dir={stage.dir} and {len(stage.mixture)} sources in mixture"
            errors.append(f"{key}: give either dir or mixture; it has {found}")
        elif stage.mixture and any(part.tokens is not None for part in stage.mixture):
            errors.append(
                f"{key}.mixture: tokens of a source have no meaning in a stage, whose length is given by "
                "until_tokens; give each source a weight"
            )
        else:
            of_stage = [MixtureSource(stage.dir, weight=1.0)] if stage.dir is not None else stage.mixture
            errors += _sources_errors(data, f"{key}.mixture" if stage.mixture else key, of_stage)
    return errors or _stage_names_errors(data)


def _stage_names_errors(data: DataConfig) -> list[str]:
    """Whether a source has one name and one directory in all stages."""
    names: dict[Path, tuple[str, str]] = {}
    directories: dict[str, tuple[Path, str]] = {}
    errors = []
    for index, stage in enumerate(data.stages):
        key = f"data.stages[{index}]"
        for one in stage_components(data, stage):
            directory = one.directory.resolve()
            name, where = names.setdefault(directory, (one.name, key))
            if name != one.name:
                errors.append(
                    f"{key}: {one.directory} is named {one.name}, and {name} in {where}; a source of several "
                    "stages has one name, under which it continues"
                )
            first, where = directories.setdefault(one.name, (directory, key))
            if first != directory:
                errors.append(
                    f"{key}: {one.name} is {one.directory}, and {first} in {where}; give one of them another "
                    "name"
                )
    return errors
