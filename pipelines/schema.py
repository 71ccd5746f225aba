"""The JSON schema of a pipeline file, made from spec.py, by which editors complete and check it.

python -m pipelines.schema        writes pipelines/speedrun.schema.json anew
"""

import json
from pathlib import Path
from typing import Any

from pipelines.spec import Pipeline

SCHEMA = Path(__file__).with_name("speedrun.schema.json")


def schema_text() -> str:
    """What belongs into speedrun.schema.json."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Pipeline.model_json_schema()}
    return json.dumps(_underscored(made), indent=1, sort_keys=True) + "\n"


def _underscored(node: Any) -> Any:
    """Lets an integer be written 32_768: a number to us and to YAML 1.1, but a word to the YAML 1.2 of most editors."""
    if isinstance(node, list):
        return [_underscored(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _underscored(value) for key, value in node.items()}
    if node.get("type") == "integer":
        limits = {
            k: node.pop(k)
            for k in list(node)
            if k in ("type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        }
        node["anyOf"] = [limits, {"type": "string", "pattern": "^[0-9]+(_[0-9]+)+$"}]
    return node


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
