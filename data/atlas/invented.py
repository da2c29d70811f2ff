"""Invented worlds: the type of the real one, with nothing real in it, to warm a policy up on."""

from __future__ import annotations

import random
from collections.abc import Callable
from string import ascii_lowercase, ascii_uppercase

from data.atlas.names import Language, holds_real_name
from data.atlas.world import Entity, World

KINDS = (
    "city", "city", "port", "port", "province", "province", "region", "district", "county", "state",
    "department", "municipality", "governorate", "parish", "division",
)  # fmt: skip
UNITS = (
    "dollars", "francs", "pounds", "dinars", "rupees", "pesos", "kroner", "shillings", "rials", "lira",
    "marks", "crowns", "euros", "dirhams",
)  # fmt: skip
THINGS = (
    "lion", "eagle", "elephant", "rose", "lotus", "dragon", "falcon", "leopard", "dolphin", "palm",
    "tree", "white", "star", "condor", "bear", "tiger", "cedar", "sun", "swan", "wolf", "olive",
    "branch", "golden", "harp", "orchid", "parrot", "bull", "horse", "crane",
)  # fmt: skip
SEAS = ("Atlantic Ocean", "Pacific Ocean", "Indian Ocean", "Caribbean Sea", "Mediterranean Sea", "Red Sea")
REGIONS = (
    "Africa", "Europe", "Asia", "Oceania", "Middle East", "South America", "North America",
    "Southeast Asia", "Central America and the Caribbean",
)  # fmt: skip
SERIES = (
    "nonmetals", "metals", "halogens", "noble gases", "alkali metals", "alkaline earth metals",
    "actinides", "transition metals", "poor metals", "metalloids", "lanthanides",
)  # fmt: skip
OPTIONAL_FACTS = 3


def invent_world(
    rng: random.Random,
    countries: tuple[int, int] = (3, 6),
    places: tuple[int, int] = (2, 5),
    elements: tuple[int, int] = (2, 4),
) -> World:
    """A small world of invented names and values; the pairs are least and most (of places: a country)."""
    tongues = [Language(rng) for _ in range(2)]
    used: set[str] = set()

    def fresh() -> str:
        name = rng.choice(tongues).name(rng)
        while name in used:
            name = rng.choice(tongues).name(rng)
        used.add(name)
        return name

    count = rng.randint(*countries)
    ids = [f"country/{at}" for at in range(count)]
    entities: list[Entity] = []
    for at in ids:
        nearby = tuple(rng.sample([i for i in ids if i != at], min(4, count - 1)))
        entities += _country(at, nearby, rng.randint(*places), fresh, rng)
    return World((*entities, *_elements(rng.randint(*elements), fresh, rng)))


def _country(
    at: str, nearby: tuple[str, ...], places: int, fresh: Callable[[], str], rng: random.Random
) -> list[Entity]:
    name = fresh()
    members = [
        Entity(f"place/{at}/{n}", fresh(), "place", {"kind": (rng.choice(KINDS),)}, at) for n in range(places)
    ]
    facts = {}
    if rng.random() < 0.95:
        facts["capital"] = members[0].name if rng.random() < 0.7 else fresh()
    if rng.random() < 0.85:
        summit = fresh()
        facts["highest_point"] = summit
        height = f"{int(10 ** rng.uniform(1.6, 3.95)):,}"
        members.append(Entity(f"mountain/{at}", summit, "mountain", {"elevation": (height,)}, at))
    facts["currency"] = _currency(fresh, rng)
    facts["area"] = f"{int(10 ** rng.uniform(1.3, 7)):,}"
    for relation in rng.sample(list(VALUES), OPTIONAL_FACTS):
        facts[relation] = VALUES[relation](fresh, rng)
    order = list(facts)
    rng.shuffle(order)
    country = Entity(at, name, "country", {r: (facts[r],) for r in order}, nearby=nearby)
    return [country, *members]


def _elements(count: int, fresh: Callable[[], str], rng: random.Random) -> list[Entity]:
    made = []
    for at in range(count):
        name = _word(fresh)
        ending = rng.choice(("", "ium", "ium", "on", "ine", "um"))
        name += "" if holds_real_name(name + ending) else ending
        symbol = name[0] + rng.choice(("", *name[1:].lower(), *ascii_lowercase))
        facts = {
            "symbol": symbol if symbol.isalpha() else symbol[0],
            "atomic_number": str(rng.randint(1, 140)),
            "period": str(rng.randint(1, 8)),
            "group": str(rng.randint(1, 18)),
            "series": rng.choice(SERIES),
            "discovery_year": str(rng.randint(1650, 2020)),
            "block": rng.choice("spdf"),
        }
        near = tuple(f"element/{n}" for n in (at - 1, at + 1) if 0 <= n < count)
        values = {relation: (value,) for relation, value in facts.items()}
        made.append(Entity(f"element/{at}", name, "element", values, nearby=near))
    return made


def _word(fresh: Callable[[], str]) -> str:
    return max(fresh().split(), key=len).strip(".")


def _currency(fresh: Callable[[], str], rng: random.Random) -> str:
    draw = rng.random()
    unit = rng.choice(UNITS) if rng.random() < 0.7 else _word(fresh).lower()
    if draw < 0.25:
        return unit
    return f"{_demonym(fresh, rng)} {unit}"


def _demonym(fresh: Callable[[], str], rng: random.Random) -> str:
    return _word(fresh) + rng.choice(("", "n", "an", "ian", "ese", "i", "ish", "er"))


def _symbol(fresh: Callable[[], str], rng: random.Random) -> str:
    thing = " ".join(rng.sample(THINGS, rng.choice((1, 1, 2))))
    return thing if rng.random() < 0.8 else f"{_word(fresh).lower()} {thing}"


def _lowest(fresh: Callable[[], str], rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(SEAS)
    return fresh() + rng.choice((" Sea", " River", " Ocean", " Basin", "", " Lake", " River"))


def _prefix(fresh: Callable[[], str], rng: random.Random) -> str:
    text = "".join(rng.choices(ascii_uppercase + "0123456789", k=rng.choice((1, 2, 2, 2, 3))))
    return text + (f"-{rng.choice(ascii_uppercase)}" if rng.random() < 0.1 else "")


VALUES: dict[str, Callable[[Callable[[], str], random.Random], str]] = {
    "currency_code": lambda fresh, rng: "".join(rng.choices(ascii_uppercase, k=3)),
    "internet_code": lambda fresh, rng: "." + "".join(rng.choices(ascii_lowercase, k=2)),
    "aircraft_prefix": _prefix,
    "lowest_point": _lowest,
    "coastline": lambda fresh, rng: f"{int(10 ** rng.uniform(1, 4.6)):,}",
    "independence": lambda fresh, rng: str(
        rng.randint(1700, 2020) if rng.random() < 0.8 else rng.randint(900, 1700)
    ),
    "demonym": _demonym,
    "symbol": _symbol,
    "region": lambda fresh, rng: rng.choice(REGIONS) if rng.random() < 0.7 else fresh(),
}
"""Facts that only some countries hold."""
