"""What a cluster would say of an object, without one: schemas of custom resources and of core Kubernetes."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.33"
CRDS = Path(__file__).with_name("kubernetes_crds.json")


@cache
def custom_resources() -> dict[str, dict[str, Any]]:
    resources: dict[str, dict[str, Any]] = json.loads(CRDS.read_text())["resources"]
    return resources


def check_custom_resource(document: dict[str, Any]) -> None:
    """Validate against the schema of its kind; a field that the schema does not have is an error, too."""
    resource = custom_resources()[document["kind"]]
    assert document["apiVersion"] == resource["apiVersion"]
    jsonschema.validate(document, _closed(resource["schema"]), cls=jsonschema.Draft4Validator)


def check_job(spec: dict[str, Any]) -> None:
    """Validate the template of a job, with its pod, which the schemas of custom resources leave out."""
    _check_core({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}} | spec)


def check_pod(template: dict[str, Any]) -> None:
    """Validate the template of a pod."""
    _check_core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}} | template)


def _check_core(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def _closed(schema: Any) -> Any:
    """The schema with no room for further properties where it names some."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed
