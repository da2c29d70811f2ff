"""The embedded world: entities, their facts, and the compact table they are read from.

    country ──< place        every place and mountain lies in exactly one country
       └──── mountain        the highest point of its country
    element                  stands alone

An entity's passage tells every fact that the entity holds, and no question asks for anything else. An
invented world (`data.atlas.invented`) is the same type with other names in it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data.errors import DataError
from data.records import FORMAT_VERSION

TABLE = Path(__file__).with_name("world.json.gz")
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Entity:
    """Something with a name and facts.

    id: "type/slug", unique.
    name: what its passage is titled and what questions call it; ASCII, unique in its world.
    type: "country" | "territory" | "place" | "mountain" | "element".
    facts: relation -> accepted values; the first is the one its passage prints.
    country: id of the country it lies in; "" for countries, territories and elements.
    aliases: other accepted forms of the name (with diacritics, local, official).
    nearby: ids of entities of the same type that are close on the map or in the periodic table.
    """

    id: str
    name: str
    type: str
    facts: Mapping[str, tuple[str, ...]]
    country: str = ""
    aliases: tuple[str, ...] = ()
    nearby: tuple[str, ...] = ()
    split: str = "train"

    @property
    def cluster(self) -> str:
        """Id of what it is split with and resampled with: its country, or itself."""
        return self.country or self.id

    @property
    def names(self) -> tuple[str, ...]:
        """Accepted forms of its name, the printed one first."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class World:
    """Entities and the ways to find them."""

    entities: tuple[Entity, ...]
    source: str = field(default="", compare=False)

    @cached_property
    def by_id(self) -> dict[str, Entity]:
        """Entity of each id."""
        return {entity.id: entity for entity in self.entities}

    @cached_property
    def by_name(self) -> dict[str, Entity]:
        """Entity of each title."""
        return {entity.name: entity for entity in self.entities}

    @cached_property
    def places(self) -> dict[str, list[Entity]]:
        """Places of each country id."""
        found: dict[str, list[Entity]] = {}
        for entity in self.entities:
            if entity.type == "place":
                found.setdefault(entity.country, []).append(entity)
        return found

    @cached_property
    def mountains(self) -> dict[str, Entity]:
        """The mountain that is the highest point, of each country id that has one."""
        return {entity.country: entity for entity in self.entities if entity.type == "mountain"}


def load_world(path: Path = TABLE) -> World:
    """The world in a table. Raises DataError if the table is of another format."""
    table = json.loads(gzip.decompress(path.read_bytes()))
    if table.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version is {table.get('format_version')}, allowed is {FORMAT_VERSION}; "
            "rebuild it with `python -m examples.atlas.compile`"
        )
    return World(tuple(_entity(row) for row in table["entities"]), source=table["source"])


def _entity(row: dict) -> Entity:
    facts = {
        relation: (values,) if isinstance(values, str) else tuple(values)
        for relation, values in row.pop("facts", {}).items()
    }
    lists = {name: tuple(row.pop(name, ())) for name in ("aliases", "nearby")}
    return Entity(facts=facts, **lists, **row)


def of_split(world: World, split: str | None) -> Iterable[Entity]:
    """Entities of a split, all for None. Raises DataError for a split that does not exist."""
    if split is not None and split not in SPLITS:
        raise DataError(f"split is {split!r}, allowed are {', '.join(SPLITS)}")
    return (entity for entity in world.entities if split is None or entity.split == split)
