"""The JSON Schema of recipe files, for editors: ``python -m dist_adamw.recipes.schema`` prints it.

``recipe.schema.json`` in this folder is the same text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_adamw.recipes.sections import RecipeFile

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")


def recipe_schema() -> dict[str, Any]:
    """Return the schema as plain data. Local."""
    schema = RecipeFile.model_json_schema()
    for section in schema["properties"].values():
        section.pop("default", None)  # its keys have defaults
    schema["properties"]["$schema"] = {"type": "string", "description": "The schema of a recipe in JSON."}
    schema = _without_titles(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "dist_adamw recipe", **schema}


def _without_titles(value: Any) -> Any:
    """Remove the titles that pydantic makes of names: editors show names anyway."""
    if isinstance(value, dict):
        # No key of a recipe is called "title", whose schema would be a dict.
        return {key: _without_titles(one) for key, one in value.items() if key != "title" or isinstance(one, dict)}
    return [_without_titles(one) for one in value] if isinstance(value, list) else value


def schema_text() -> str:
    """Return the schema as the text of a file. Local."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
