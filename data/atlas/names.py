"""Invented names as varied as real ones, and never a real one of the embedded world.

A tiny policy must copy names it has never seen. So names come from languages drawn at random (few sounds
each, most of them plain), from random letters, in one to three words, with hyphens, apostrophes, particles
and the common words that real names are built with.
"""

from __future__ import annotations

import random
from functools import cache
from string import ascii_lowercase

from data.atlas.world import load_world

PLAIN_ONSETS = (
    *"bcdfghjklmnpqrstvwxyz", *"bdgklmnprstv", "ch", "sh", "kh", "th", "tr", "br", "st", "", "", "",
)  # fmt: skip
ONSETS = (
    *PLAIN_ONSETS, "bh", "bl", "cr", "cl", "dh", "dj", "dr", "dz", "fl", "fr", "gh", "gl", "gr", "gw",
    "hl", "hv", "kl", "kn", "kr", "kw", "ll", "mb", "nd", "ng", "nj", "ny", "ph", "pl", "pr", "ps", "qu",
    "rh", "sc", "sch", "sk", "sl", "sm", "sn", "sp", "str", "sv", "sw", "sz", "tl", "ts", "tsh", "vl",
    "vr", "wh", "zh", "zw",
)  # fmt: skip
PLAIN_NUCLEI = (*"aaaaeeeiiioooouuy", "ai", "ia", "ou", "ei", "au")
NUCLEI = (
    *PLAIN_NUCLEI, "aa", "ae", "ao", "ay", "ea", "ee", "eo", "eu", "ie", "io", "iu", "oa", "oe", "oi",
    "oo", "ua", "ue", "ui", "uo", "ya", "yo",
)  # fmt: skip
PLAIN_CODAS = (*"nnnrrllsstmkdgbhz", "ng", "sh", "nd")
CODAS = (
    *PLAIN_CODAS, *"cfjpvwx", "ch", "ck", "ff", "gh", "ks", "kh", "ld", "lk", "ll", "lm", "ls", "lt",
    "mb", "mp", "nk", "ns", "nt", "nz", "ph", "rd", "rg", "rk", "rm", "rn", "rs", "rt", "sk", "ss",
    "st", "th", "tt", "tz",
)  # fmt: skip
BEFORE = (
    "North", "South", "East", "West", "New", "Upper", "Lower", "Central", "Great", "Grand", "San",
    "Santa", "Saint", "St.", "Port", "Puerto", "Mount", "Mont", "Monte", "Cerro", "Pico", "Jabal",
    "Lake", "Cape", "Fort", "Al", "El", "La", "Le", "Las", "Los", "Ban", "Beit", "Ciudad", "Rio",
    "Bukit", "Gunung", "Ras", "Khao", "Tel", "Umm", "Nova", "Alto", "Old", "Ain", "Bir", "Kuh-e",
    "Nevado", "Volcan", "Ile", "Ad", "As",
)  # fmt: skip
AFTER = (
    "Islands", "Island", "City", "Harbor", "Bay", "Province", "Republic", "Hill", "Peak", "Point",
    "Terminal", "Valley", "Coast", "River", "District", "Norte", "Sur", "Sud", "Nord", "Est", "Oblast",
    "Dagi", "Town", "Mountain", "State", "Region", "Federation", "Kingdom", "Alta", "Bajo",
)  # fmt: skip
JOINTS = ("-", "-", "-", "-", " de ", " del ", " al ", "-al-", " of ", " and ", " og ", "-e ", "-sur-")
LENGTHS = range(3, 25)


@cache
def real_names() -> frozenset[str]:
    """Return the names of the embedded world, lower case."""
    return frozenset(name.lower() for entity in load_world().entities for name in entity.names)


class Language:
    """A few sounds drawn at random, and the words they make."""

    def __init__(self, rng: random.Random) -> None:
        plain = rng.random() < 0.6
        self.onsets = rng.sample(PLAIN_ONSETS if plain else ONSETS, rng.randint(6, 18))
        self.nuclei = rng.sample(PLAIN_NUCLEI if plain else NUCLEI, rng.randint(3, 9))
        self.codas = rng.sample(PLAIN_CODAS if plain else CODAS, rng.randint(2, 8))
        self.p_coda = rng.uniform(0.1, 0.6)
        self.ends = [self._syllable(rng) for _ in range(3)]  # as -istan, -ville, -burg are

    def _syllable(self, rng: random.Random) -> str:
        coda = rng.choice(self.codas) if rng.random() < self.p_coda else ""
        return rng.choice(self.onsets) + rng.choice(self.nuclei) + coda

    def word(self, rng: random.Random) -> str:
        """A lower-case word of 1-5 syllables; one in six is random letters."""
        draw = rng.random()
        if draw < 0.1:
            return "".join(rng.choices(ascii_lowercase, k=rng.randint(3, 9)))
        if draw < 0.16:
            return "".join(rng.choices("aeioubcdfghklmnprst", k=rng.randint(3, 10)))
        count = rng.choices((1, 2, 3, 4), (12, 45, 33, 10))[0]
        text = "".join(self._syllable(rng) for _ in range(count))
        return text + rng.choice(self.ends) if draw > 0.85 else text

    def title(self, rng: random.Random) -> str:
        """A capitalised word, sometimes with an apostrophe in it."""
        text = self.word(rng)
        if rng.random() < 0.06 and len(text) > 3:
            at = rng.randint(1, len(text) - 1)
            text = f"{text[:at]}'{text[at:]}"
            return text.title() if rng.random() < 0.3 else text.capitalize()
        return text.capitalize()

    def name(self, rng: random.Random) -> str:
        """One to three words, 3-24 letters, none of them the name of anything real here."""
        while True:
            draw = rng.random()
            text = self.title(rng)
            if draw > 0.9:
                text = f"{text}{rng.choice(JOINTS)}{self.title(rng)}"
            elif draw > 0.82:
                text = f"{text} {self.title(rng)}"
            elif draw > 0.73:
                text = f"{rng.choice(BEFORE)} {text}"
            elif draw > 0.68:
                text = f"{text} {rng.choice(AFTER)}"
            elif draw > 0.65:
                text = f"{rng.choice(BEFORE)} {text} {self.title(rng)}"
            if len(text) in LENGTHS and text[-1] != "'" and not holds_real_name(text):
                return text


def holds_real_name(text: str) -> bool:
    """Return whether some words of the text, one after the other, are a name of the embedded world."""
    words = text.lower().split()
    runs = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
    return any(run in real_names() for run in runs)
