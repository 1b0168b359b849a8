"""recipe.yaml: reading and writing a recipe."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from simsiam.config.recipes import Recipe
from simsiam.config.settings import flatten
from simsiam.distributed.process_group import rank_zero_only
from simsiam.errors import UsageError, printable, truncate
from simsiam.utils.files import write_text
from simsiam.utils.read_files import read_text

MAX_RECIPE_BYTES = 2**18
MAX_DIFFERENCES = 5  # of two recipes, that a line names


class NoAliasLoader(yaml.SafeLoader):
    """A YAML loader that refuses aliases: a few lines of them can stand for terabytes."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """Compose a node of the document.

        Args:
            parent: The node that contains it.
            index: Its place in the parent.

        Raises:
            yaml.YAMLError: It is an alias.
        """
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*) is not allowed in a recipe")
        return super().compose_node(parent, index)  # type: ignore[arg-type]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: The file.

    Raises:
        UsageError: The file is no recipe; the message names the file.
    """
    name = printable(str(path))
    try:
        if (size := path.stat().st_size) > MAX_RECIPE_BYTES:
            raise UsageError(f"{name}: {size:,} bytes; a recipe has at most {MAX_RECIPE_BYTES:,}")
        content = yaml.load(read_text(path, MAX_RECIPE_BYTES), NoAliasLoader)
    except UsageError:
        raise
    except Exception as error:  # a malicious document can make the parser raise anything
        raise UsageError(f"{name} is not YAML: {truncate(' '.join(str(error).split()))}") from None
    try:
        return Recipe.from_dict(content)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


@rank_zero_only
def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write recipe.yaml.

    Args:
        path: The folder.
        recipe: The recipe.

    Raises:
        WorkFailed: The file cannot be written.
    """
    text = yaml.safe_dump(
        recipe.to_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True
    )
    write_text(path / "recipe.yaml", text)


def describe_differences(saved: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Name the settings in which two recipes differ.

    Args:
        saved: The recipe in a checkpoint, as plain data.
        now: The recipe in recipe.yaml.

    Returns:
        For example "epochs was 3 and is 5"; at most MAX_DIFFERENCES, and how many more there are.
    """
    before, after = flatten(saved), flatten(now)
    names = [
        name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)
    ]
    lines = [
        f"{name} was {truncate(before.get(name))} and is {truncate(after.get(name))}"
        for name in names[:MAX_DIFFERENCES]
    ]
    return lines + [f"and {len(names) - len(lines)} more"] * (len(names) > len(lines))
