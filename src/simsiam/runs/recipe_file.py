"""recipe.yaml: reading and writing a recipe."""

from pathlib import Path
from typing import Any

import yaml

from simsiam.config.recipes import Recipe
from simsiam.distributed.process_group import rank_zero_only
from simsiam.errors import UsageError, printable, truncate
from simsiam.utils.files import atomic_write

MAX_RECIPE_BYTES = 2**18  # of a recipe.yaml


class NoAliasLoader(yaml.SafeLoader):
    """YAML without aliases: a recipe has none, and a few lines of them can stand for terabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*), which a recipe has no use for")
        return super().compose_node(parent, index)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises UsageError, naming the file."""
    where = printable(str(path))
    try:
        if (size := path.stat().st_size) > MAX_RECIPE_BYTES:
            raise UsageError(f"{size:,} bytes; a recipe has at most {MAX_RECIPE_BYTES:,}")
        content = yaml.load(path.read_text(encoding="utf-8"), NoAliasLoader)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except Exception as error:  # a document made to hurt makes the parser raise anything
        raise UsageError(f"{where} is not YAML: {truncate(' '.join(str(error).split()))}") from None
    try:
        return Recipe.from_dict(content)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


@rank_zero_only
def write_recipe(path: Path, recipe: Recipe) -> None:
    with atomic_write(path / "recipe.yaml") as part:
        text = yaml.safe_dump(
            recipe.to_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True
        )
        part.write_text(text, encoding="utf-8")
