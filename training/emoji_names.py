"""What to call an emoji: code points → a caption, or None where there is nothing to say.

A single code point has its Unicode name, in lower case, with these changes, so that the words are about what
is drawn:

- "black" and "white" go where Unicode means filled and outlined, not colours (a yellow "white smiling face");
- "negative", "latin capital", "ornament", and "sign" or "symbol" after a hand, a moon or a mark go;
- apostrophes come back ("woman's hat", "three o'clock");
- the red "heavy black heart" is a red heart.

Unicode's data in the standard library names no sequences. Those here are named by rules over the names of
their parts, and by small tables where the parts do not say it.
"""

from __future__ import annotations

import re
import unicodedata

from okavango.training.emoji_flags import COUNTRIES, SUBDIVISIONS

PICTURE = 0xFE0F  # "show as a picture": the same emoji with and without
JOINER = 0x200D
_KEYCAP = 0x20E3
_REGIONAL = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0000, 0xE0080)
_RIGHTWARDS = 0x27A1
_HEART, _KISS = 0x2764, 0x1F48B

_NOT_CAPTIONS = re.compile(r"^(regional indicator|emoji (component|modifier)|combining|tag) |ideograph-")
_CHANGES = (
    (r"^heavy black heart$", "red heart"),
    (
        r"\b(black|white) (?=.*\b(arrow|for record|for stop|frowning|index|medium star|nib|recycling|scissors"
        r"|smiling|suit|sun|telephone|triangle)\b)",
        "",
    ),
    (r"^black (?=question mark)", ""),
    (r"^negative ", ""),
    (r"\blatin capital (?=letter \w$)", ""),
    (r" ornament$", ""),
    (r"(?<=hand|ands|s up|down) sign$", ""),
    (r"(?<=moon|mark) symbol$", ""),
    (r"\b(wo)?(man|men)s\b", r"\1\2's"),
    (r"\boclock$", "o'clock"),
    (r"\bcars(?= revolving)", "car's"),
)

_SEXES = {0x2640: "woman", 0x2642: "man"}
_PEOPLE = {0x1F468: "man", 0x1F469: "woman", 0x1F9D1: "person"}
_PERSON = re.compile(r"\b(person|man|woman|bride)\b")
# Who does it, where the name speaks of the deed alone.
_DOING = {
    0x1F46F: "{} with bunny ears",
    0x1F482: "{} guard",
    0x1F486: "{} getting face massage",
    0x1F487: "{} getting haircut",
    0x1F645: "{} with no good gesture",
    0x1F646: "{} with ok gesture",
    0x1F6A3: "{} in rowboat",
    0x1F926: "{} with face palm",
    0x1F937: "{} shrugging",
    0x1F939: "{} juggling",
    0x1F93C: "{} wrestling",
    0x1F93D: "{} playing water polo",
    0x1F93E: "{} playing handball",
    0x1F9DC: "mer{}",
}
# A person joined to a thing: what that makes of them.
_JOBS = {
    0x1F33E: "farmer",
    0x1F373: "cook",
    0x1F393: "student",
    0x1F3A4: "singer",
    0x1F3A8: "artist",
    0x1F3EB: "teacher",
    0x1F3ED: "factory worker",
    0x1F4BB: "technologist",
    0x1F4BC: "office worker",
    0x1F527: "mechanic",
    0x1F52C: "scientist",
    0x1F680: "astronaut",
    0x1F692: "firefighter",
    0x1FA70: "ballet dancer",
    0x2695: "health worker",
    0x2696: "judge",
    0x2708: "pilot",
}
_LOOKS = {
    0x1F37C: "{} feeding baby",
    0x1F384: "{} in christmas costume",
    0x1F9AF: "{} with probing cane",
    0x1F9B0: "{} with red hair",
    0x1F9B1: "{} with curly hair",
    0x1F9B2: "bald {}",
    0x1F9B3: "{} with white hair",
    0x1F9BC: "{} in motorized wheelchair",
    0x1F9BD: "{} in manual wheelchair",
}
_OTHERS = {
    (0x1F344, 0x1F7EB): "brown mushroom",
    (0x1F34B, 0x1F7E9): "lime",
    (0x1F3F3, 0x1F308): "rainbow flag",
    (0x1F3F3, 0x26A7): "transgender flag",
    (0x1F3F4, 0x2620): "pirate flag",
    (0x1F408, 0x2B1B): "black cat",
    (0x1F415, 0x1F9BA): "service dog",
    (0x1F426, 0x1F525): "phoenix",
    (0x1F426, 0x2B1B): "black bird",
    (0x1F43B, 0x2744): "polar bear",
    (0x1F441, 0x1F5E8): "eye in speech bubble",
    (0x1F62E, 0x1F4A8): "face exhaling",
    (0x1F635, 0x1F4AB): "face with spiral eyes",
    (0x1F636, 0x1F32B): "face in clouds",
    (0x1F642, 0x2194): "head shaking horizontally",
    (0x1F642, 0x2195): "head shaking vertically",
    (0x1F9D1, 0x1F91D, 0x1F9D1): "people holding hands",
    # Families of men, women, boys and girls are drawn just like these, as white shapes.
    (0x1F9D1, 0x1F9D1, 0x1F9D2): "family of two adults and a child",
    (0x1F9D1, 0x1F9D1, 0x1F9D2, 0x1F9D2): "family of two adults and two children",
    (0x1F9D1, 0x1F9D2): "family of an adult and a child",
    (0x1F9D1, 0x1F9D2, 0x1F9D2): "family of an adult and two children",
    (0x26D3, 0x1F4A5): "broken chain",
    (0x2764, 0x1F525): "heart on fire",
    (0x2764, 0x1FA79): "mending heart",
}


def caption_of(codes: tuple[int, ...]) -> str | None:
    """The caption of an emoji, given without variation selectors."""
    if len(codes) == 1:
        return _name(codes[0])
    if all(code in _REGIONAL for code in codes):
        return _flag(COUNTRIES, "".join(chr(code - _REGIONAL.start + ord("a")) for code in codes))
    if codes[-1] in _TAGS:
        tags = (chr(code - _TAGS.start) for code in codes if code in _TAGS)
        return _flag(SUBDIVISIONS, "".join(filter(str.isalnum, tags)))
    if codes[-1] == _KEYCAP:
        return f"keycap {unicodedata.name(chr(codes[0])).lower().removeprefix('digit ')}"
    return _joined(tuple(code for code in codes if code != JOINER))


def group_of(codes: tuple[int, ...]) -> tuple[int, ...]:
    """What a sequence shares with its variants by sex or direction, which hardly differ as drawings."""
    ignored = {JOINER, _RIGHTWARDS, *_SEXES, 0x1F468, 0x1F469, 0x1F9D1}
    return tuple(code for code in codes if code not in ignored) or codes


def _name(code: int) -> str | None:
    name = unicodedata.name(chr(code), "").lower()
    if not name or _NOT_CAPTIONS.search(name):
        return None
    for pattern, replacement in _CHANGES:
        name = re.sub(pattern, replacement, name)
    return name


def _flag(names: dict[str, str], code: str) -> str | None:
    return f"flag of {names[code]}" if code in names else None


def _joined(parts: tuple[int, ...]) -> str | None:
    if parts in _OTHERS:
        return _OTHERS[parts]
    if _HEART in parts and parts[0] in _PEOPLE and parts[-1] in _PEOPLE:
        pair = f"{_PEOPLE[parts[0]]} and {_PEOPLE[parts[-1]]}"
        return f"{pair} kissing" if _KISS in parts else f"{pair} with heart"
    if len(parts) != 2:
        return None
    first, second = parts
    if second in _SEXES:
        return _doing(first, _SEXES[second])
    return _being(_PEOPLE[first], second) if first in _PEOPLE else None


def _doing(code: int, who: str) -> str | None:
    name = _name(code)
    if code in _DOING:
        return _DOING[code].format(who)
    if name is None:
        return None
    return _PERSON.sub(who, name, count=1) if _PERSON.search(name) else f"{who} {name}"


def _being(who: str, thing: int) -> str | None:
    if thing in _JOBS:
        return _JOBS[thing] if who == "person" else f"{who} {_JOBS[thing]}"
    return _LOOKS[thing].format(who) if thing in _LOOKS else None
