"""The sources of verbs that take several: source=A source=B is the same as source=[A,B]."""

from hydra.core.override_parser.types import Quote, QuotedString


def collect_sources(arguments: list[str], key: str = "source") -> list[str]:
    """Arguments in which every `source=NAME` is collected into one `key=[...]`, quoted for Hydra."""
    names = [word.partition("=")[2] for word in arguments if word.startswith("source=")]
    if not names or any(name.startswith("[") for name in names):
        return arguments
    quoted = ",".join(QuotedString(name, Quote.single).with_quotes() for name in names)
    return [*(word for word in arguments if not word.startswith("source=")), f"{key}=[{quoted}]"]
