"""One page of the CIA World Factbook -> clean short values. Read only when the table is compiled.

The pages are HTML-laden prose ("Suva (on Viti Levu)", "19 regions (<em>régions</em>, ...); Bamako*, ..."), so
each reader takes what it can parse without doubt and returns nothing otherwise.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterable

# Codes still listed although the currency has been redenominated, is gone, or the code was never ISO's.
STALE_CODES = frozenset(
    ("MRO", "STD", "ZMK", "MZM", "SLL", "GHC", "VEB", "BYR", "AFA", "SAT", "LVL", "LTL", "EEK", "SKK", "TMM",
     "AZM", "ROL", "ZWD", "HRK", "ANG")
)  # fmt: skip
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
SPELLED = str.maketrans(
    {"ø": "o", "Ø": "O", "ß": "ss", "ł": "l", "Ł": "L", "đ": "d", "ı": "i", "æ": "ae", "Æ": "Ae", "ð": "d",
     "ə": "a", "–": "-"}
)  # fmt: skip


def clean(text: str) -> str:
    """Text without tags and entities, single spaces, typewriter quotes."""
    text = html.unescape(TAG.sub(" ", html.unescape(text)))
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("\xa0", " ")
    return " ".join(text.split())


def fold(text: str) -> str:
    """ASCII form: diacritics dropped, a few letters spelled out."""
    decomposed = unicodedata.normalize("NFKD", text.translate(SPELLED))
    return decomposed.encode("ascii", "ignore").decode()


def is_name(text: str) -> bool:
    """Return whether it is fit to be a title: a capital, 1-3 words, letters with ' - . inside, 3-24 long."""
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


def get_text(page: dict, *path: str) -> str:
    """The cleaned text at a path of section titles, "" where there is none."""
    for key in path:
        page = page.get(key, {}) if isinstance(page, dict) else {}
    return clean(page.get("text", "")) if isinstance(page, dict) else ""


# One fact each: a page -> accepted values, the one to print first; [] where it is not clean.


def capital(page: dict) -> list[str]:
    """The capital, where there is one and it has one name."""
    text = re.split(r"; note", get_text(page, "Government", "Capital", "name"))[0]
    if re.search(r"capital|government|official|;|city\)", text):
        return []
    return forms(re.sub(r" in [A-Z].*", "", text))


def currency(page: dict) -> list[str]:
    """The currency in plural, then in singular."""
    match = re.match(
        r"(.+?) \(([A-Z]{3})\) per US", fold(get_text(page, "Economy", "Exchange rates", "Currency"))
    )
    if not match or " or " in match[1] or "/" in match[1]:
        return []
    name = re.sub(r"(Communaute|Cooperation) Financiere .*francs", "CFA francs", match[1])
    name = re.sub(r"Comptoirs Francais du Pacifique francs", "CFP francs", name)
    singular = [name[:-1]] if name.endswith("s") else []
    return [name, *singular] if len(name.split()) <= 3 and PLAIN.fullmatch(name) else []


def currency_code(page: dict) -> list[str]:
    """The three letters of the currency."""
    match = re.search(r"\(([A-Z]{3})\) per US", get_text(page, "Economy", "Exchange rates", "Currency"))
    return [match[1]] if match and match[1] not in STALE_CODES else []


def internet_code(page: dict) -> list[str]:
    """The top-level domain, with and without its dot."""
    text = get_text(page, "Communications", "Internet country code")
    return [text, text[1:]] if re.fullmatch(r"\.[a-z]{2}", text) else []


def aircraft_prefix(page: dict) -> list[str]:
    """Return the letters that civil aircraft carry before their registration."""
    text = get_text(page, "Transportation", "Civil aircraft registration country code prefix")
    return [text] if re.fullmatch(r"[A-Z0-9]{1,3}(-[A-Z])?", text) else []


def lowest_point(page: dict) -> list[str]:
    """The name of the lowest point."""
    match = re.match(r"([^;\d]+?) -?[\d.,]+ ?m?\b", get_text(page, "Geography", "Elevation", "lowest point"))
    return forms(match[1]) if match and "unnamed" not in match[1] else []


def highest_point(page: dict) -> list[str]:
    """The name of the highest point."""
    return summit(page)[0]


def area(page: dict) -> list[str]:
    """The area in square kilometres, with and without its unit."""
    match = re.match(r"([\d,]+) sq km", get_text(page, "Geography", "Area", "total "))
    return [match[1], f"{match[1]} sq km", f"{match[1]} square kilometres"] if match else []


def coastline(page: dict) -> list[str]:
    """The coast in kilometres, with and without its unit; none for landlocked countries."""
    match = re.match(r"([\d,]+) km", get_text(page, "Geography", "Coastline"))
    return [match[1], f"{match[1]} km"] if match and match[1] != "0" else []


def independence(page: dict) -> list[str]:
    """The year of independence, where one date is given."""
    text = get_text(page, "Government", "Independence")
    years = re.findall(r"\b\d{4}\b", text)
    return years if len(years) == 1 and re.match(r"\d{1,2} [A-Z][a-z]+ \d{4}( \(|$)", text) else []


def demonym(page: dict) -> list[str]:
    """The adjective of nationality."""
    text = fold(get_text(page, "People and Society", "Nationality", "adjective"))
    return [text] if is_name(text) and " or " not in text else []


def symbol(page: dict) -> list[str]:
    """The national symbol, if it is a few common words."""
    text = fold(get_text(page, "Government", "National symbol(s)"))
    return [text] if PLAIN.fullmatch(text) and len(text.split()) <= 3 and text.islower() else []


def region(page: dict) -> list[str]:
    """The part of the world that maps put it in."""
    text = get_text(page, "Geography", "Map references")
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


def summit(page: dict) -> tuple[list[str], str]:
    """Name forms and height in metres of the highest point; ([], "") if either is unclear."""
    text = get_text(page, "Geography", "Elevation", "highest point")
    match = re.match(r"([^;\d]+?) ([\d,]+)( m\b|$)", text)
    if not match or re.search(r"unnamed|location|located|range", match[1]) or "/" in match[1]:
        return [], ""
    return forms(re.sub(r" (on|in|at) [A-Z].*", "", match[1])), match[2]


def places_of(page: dict) -> list[tuple[list[str], str]]:
    """(name forms, kind) of the cities, divisions and ports that a country's page lists."""
    found: list[tuple[list[str], str]] = []
    if names := capital(page):
        found.append((names, "city"))
    urban = get_text(page, "People and Society", "Major urban areas - population")
    for name in re.findall(r"(?:million|\d{3}) ([^\d(,]+)", urban):
        found.append((forms(name.strip().title() if name.isupper() else name), "city"))
    divisions = page.get("Government", {}).get("Administrative divisions", {})
    found += _divisions(clean(divisions.get("text", "")), clean(divisions.get("note", "")))
    ports = get_text(page, "Transportation", "Ports", "key ports")
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
