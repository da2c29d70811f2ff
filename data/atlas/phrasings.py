"""Every sentence the embedded world can say or ask: plain tables.

CLAUSES: type -> relation -> what a passage says. {v} is the value; {of} is " of <name>" in the first clause
of a passage and "" after it, so that a clause stands at any position.
ASKED: relation -> questions. {x} is a name or, in more hops, a LOCATOR around one. The last phrasing of
each entry is for the test split only.
"""

from __future__ import annotations

CLAUSES: dict[str, dict[str, tuple[str, ...]]] = {
    "country": {
        "capital": ("the capital{of} is {v}", "the capital city{of} is {v}", "as capital{of} serves {v}"),
        "currency": ("the currency{of} is {v}", "money{of} comes in {v}", "prices{of} are in {v}"),
        "currency_code": (
            "the currency code{of} is {v}",
            "the code for the money{of} is {v}",
            "banks write for the money{of} {v}",
        ),
        "internet_code": (
            "the internet code{of} is {v}",
            "web addresses{of} end in {v}",
            "the internet ending{of} is {v}",
        ),
        "aircraft_prefix": (
            "the aircraft prefix{of} is {v}",
            "aircraft{of} carry the prefix {v}",
            "painted on the aircraft{of} is {v}",
        ),
        "highest_point": (
            "the highest point{of} is {v}",
            "the highest place{of} is {v}",
            "nothing{of} is higher than {v}",
        ),
        "lowest_point": (
            "the lowest point{of} is {v}",
            "the lowest place{of} is {v}",
            "the land{of} is lowest at {v}",
        ),
        "area": (
            "the area{of} is {v} square kilometres",
            "the land area{of} is {v} square kilometres",
            "the land{of} covers {v} square kilometres",
        ),
        "coastline": (
            "the coast{of} is {v} kilometres long",
            "the length of the coast{of} is {v} kilometres",
            "the coastline{of} runs for {v} kilometres",
        ),
        "independence": (
            "the independence{of} dates from {v}",
            "the year of independence{of} is {v}",
            "the people{of} became independent in {v}",
        ),
        "demonym": ("the people{of} are called {v}", "the word for the people{of} is {v}"),
        "symbol": (
            "the national symbol{of} is the {v}",
            "the nation{of} chose as its symbol the {v}",
        ),
        "region": ("the region{of} is {v}", "the region of the world{of} is {v}", "maps{of} belong to {v}"),
        "places": ("{v} are places in it", "places in it are {v}", "{v} also lie in it"),
        "nearby": ("near it on the map is {v}", "{v} is near it on the map"),
    },
    "place": {
        "is_in": (
            "{n} is a {kind} in {c}",
            "{n} is in {c}, a {kind}",
            "the {kind} {n} lies in {c}",
            "the {kind} {n} belongs to {c}",
        ),
        "siblings": (
            "{s} lie in the same country as {n}",
            "in the same country as {n} are {s}",
            "{n} shares its country with {s}",
        ),
        "nearby": (
            "the country of {n} is near {v}",
            "near the country of {n} are {v}",
            "{n} is in a country near {v}",
        ),
    },
    "mountain": {
        "is_in": (
            "{n} is the highest point of {c}",
            "the highest point of {c} is {n}",
            "in {c} nothing is higher than {n}",
        ),
        "elevation": (
            "{n} rises {v} metres above the sea",
            "{n} is {v} metres high",
            "the height of {n} is {v} metres",
        ),
        "other": (
            "{o} in {c} is {v} metres high",
            "in {c} the height of {o} is {v} metres",
            "{o} in {c} rises {v} metres above the sea",
        ),
        "siblings": (
            "{s} lie in the country of {n}",
            "the country of {n} is also that of {s}",
        ),
    },
    "element": {
        "symbol": ("the symbol{of} is {v}", "chemists write for the atoms{of} {v}"),
        "atomic_number": ("the atomic number{of} is {v}", "the number of the atoms{of} is {v}"),
        "period": ("the period{of} is {v}", "the row{of} is period {v}"),
        "group": ("the group{of} is {v}", "the column{of} is group {v}"),
        "series": ("the series{of} is the {v}", "the series to which the atoms{of} belong is the {v}"),
        "discovery_year": ("the discovery{of} was in {v}", "the year of the discovery{of} is {v}"),
        "block": ("the block{of} is {v}", "the part of the table{of} is block {v}"),
        "nearby": ("next to it in the table is {v}", "{v} is next to it in the table"),
    },
}  # fmt: skip

ASKED: dict[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {x}?",
        "Which city is the capital of {x}?",
        "Name the capital of {x}.",
        "The capital of {x} is which city?",
        "Which city serves as the capital of {x}?",
    ),
    "currency": (
        "What is the currency of {x}?",
        "Which currency is used in {x}?",
        "What money is used in {x}?",
        "Name the currency of {x}.",
        "In what currency are prices in {x}?",
    ),
    "currency_code": (
        "What is the currency code of {x}?",
        "Which code stands for the money of {x}?",
        "Name the currency code of {x}.",
        "Which currency code is used in {x}?",
        "What do banks write for the money of {x}?",
    ),
    "internet_code": (
        "What is the internet code of {x}?",
        "Which internet code is used in {x}?",
        "Name the internet code of {x}.",
        "In what do web addresses of {x} end?",
        "What is the internet ending of {x}?",
    ),
    "aircraft_prefix": (
        "What is the aircraft prefix of {x}?",
        "Which prefix do aircraft of {x} carry?",
        "Name the aircraft prefix of {x}.",
        "Which aircraft prefix is used in {x}?",
        "What is painted on the aircraft of {x}?",
    ),
    "highest_point": (
        "What is the highest point of {x}?",
        "Which is the highest point of {x}?",
        "Name the highest point of {x}.",
        "What is the highest place in {x}?",
        "Which point is the highest in {x}?",
    ),
    "lowest_point": (
        "What is the lowest point of {x}?",
        "Which is the lowest point of {x}?",
        "Name the lowest point of {x}.",
        "What is the lowest place in {x}?",
        "Which point is the lowest in {x}?",
    ),
    "area": (
        "What is the area of {x}?",
        "How many square kilometres does {x} cover?",
        "How large is {x} in square kilometres?",
        "Give the area of {x}.",
        "How many square kilometres is the area of {x}?",
    ),
    "coastline": (
        "How long is the coast of {x}?",
        "What is the length of the coast of {x}?",
        "How many kilometres long is the coast of {x}?",
        "Give the length of the coast of {x}.",
        "How many kilometres does the coastline of {x} run?",
    ),
    "independence": (
        "In what year did {x} become independent?",
        "What is the year of independence of {x}?",
        "When did {x} become independent?",
        "Give the year of independence of {x}.",
        "From what year does the independence of {x} date?",
    ),
    "demonym": (
        "What are the people of {x} called?",
        "Which word is used for the people of {x}?",
        "Give the word for the people of {x}.",
        "How are the people of {x} called?",
        "What is the word for the people of {x}?",
    ),
    "symbol": (
        "What is the national symbol of {x}?",
        "Which national symbol was chosen for {x}?",
        "Name the national symbol of {x}.",
        "What serves as the national symbol of {x}?",
        "Which symbol stands for the nation of {x}?",
    ),
    "region": (
        "What is the region of {x}?",
        "In which region is {x}?",
        "Name the region of {x}.",
        "To which region does {x} belong?",
        "To what region do maps of {x} belong?",
    ),
    "country": (
        "In which country is {x}?",
        "Which country is {x} in?",
        "Name the country of {x}.",
        "In what country does {x} lie?",
        "What country does {x} belong to?",
    ),
    "elevation": (
        "How high is {x}?",
        "What is the height of {x}?",
        "How many metres high is {x}?",
        "Give the height of {x}.",
        "How far does {x} rise above the sea?",
    ),
    "element_symbol": (
        "What is the symbol of {x}?",
        "Which symbol is used for {x}?",
        "Name the symbol of {x}.",
        "What do chemists write for {x}?",
        "Which symbol stands for the element {x}?",
    ),
    "atomic_number": (
        "What is the atomic number of {x}?",
        "Which atomic number does {x} have?",
        "Give the atomic number of {x}.",
        "Name the atomic number of {x}.",
        "What number does the element {x} have?",
    ),
    "period": (
        "What is the period of {x}?",
        "In which period is {x}?",
        "Name the period of {x}.",
        "Give the period of {x}.",
        "Which period does the element {x} belong to?",
    ),
    "group": (
        "What is the group of {x}?",
        "In which group is {x}?",
        "Name the group of {x}.",
        "Give the group of {x}.",
        "Which group does the element {x} belong to?",
    ),
    "series": (
        "What is the series of {x}?",
        "In which series is {x}?",
        "Name the series of {x}.",
        "Give the series of {x}.",
        "Which series does the element {x} belong to?",
    ),
    "discovery_year": (
        "In what year was {x} discovered?",
        "When was {x} discovered?",
        "What is the year of the discovery of {x}?",
        "Give the year of the discovery of {x}.",
        "In what year was the element {x} found?",
    ),
    "block": (
        "What is the block of {x}?",
        "In which block is {x}?",
        "Name the block of {x}.",
        "Give the block of {x}.",
        "Which block does the element {x} belong to?",
    ),
}

COMPARED: dict[str, tuple[str, ...]] = {
    "area": (
        "Which has the larger area, {a} or {b}?",
        "Which covers more land, {a} or {b}?",
        "Which is larger, {a} or {b}?",
        "Of {a} and {b}, which has the larger area?",
        "Which takes up more land, {a} or {b}?",
    ),
    "elevation": (
        "Which is higher, {a} or {b}?",
        "Which rises higher, {a} or {b}?",
        "Which has the greater height, {a} or {b}?",
        "Of {a} and {b}, which is higher?",
        "Which of the two rises further above the sea, {a} or {b}?",
    ),
    "atomic_number": (
        "Which has the higher atomic number, {a} or {b}?",
        "Which atomic number is higher, that of {a} or {b}?",
        "Of {a} and {b}, which has the higher atomic number?",
        "Which is further on in the table, {a} or {b}?",
        "Of the elements {a} and {b}, which has the higher number?",
    ),
}

LOCATORS: dict[str, tuple[str, ...]] = {
    "place": (
        "the country where {p} lies",
        "the country that {p} is in",
        "the country of {p}",
        "the country in which {p} lies",
        "the country that {p} belongs to",
    ),
    "mountain": (
        "the country whose highest point is {p}",
        "the country where {p} is the highest point",
        "the country that has {p} as its highest point",
        "the country topped by {p}",
        "the country in which nothing is higher than {p}",
    ),
}
SUMMIT_OF = "the highest point of {x}"


def phrasing(options: tuple[str, ...], number: int, seen: bool) -> str:
    """One of the phrasings: by number among those of every split, or the test-only one."""
    return options[number % (len(options) - 1)] if seen else options[-1]
