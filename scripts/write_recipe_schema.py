"""Write docs/recipe.schema.json, which editors complete recipes with, from the settings."""

from __future__ import annotations

import json
from pathlib import Path

from pared.recipe_schema import json_schema

target = Path(__file__).parents[1] / "docs" / "recipe.schema.json"
target.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf8")
print(target)
