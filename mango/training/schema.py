"""JSON schemas (draft 2020-12) of the configuration and the run record:

``python -m mango.training.schema config > workflow/schemas/config.schema.json``
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel

from mango.training.config import TierConfig
from mango.training.record import RunRecord

SCHEMAS: dict[str, type[BaseModel]] = {"config": TierConfig, "run": RunRecord}


def export(name: str) -> str:
    """The schema as JSON text that ends with a newline.

    Defaults are left out: a validator that fills them in would fill those of every alternative (each model's options) into the one
    that was chosen.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **SCHEMAS[name].model_json_schema()}
    return json.dumps(_without_defaults(schema), indent=2) + "\n"


def _without_defaults(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_defaults(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _without_defaults(inner) for name, inner in value.items()}
        if key in ("properties", "$defs")
        else _without_defaults(value)
        for key, value in node.items()
        if key != "default"
    }


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SCHEMAS:
        sys.exit(f"usage: python -m mango.training.schema {{{','.join(SCHEMAS)}}}")
    sys.stdout.write(export(sys.argv[1]))
