"""Words for pictures: the one caption a picture is judged by, and the many that training shows.

`canonical_caption` is CLDR's short name and the hand: "red heart, noto style". `training_caption` varies it by a seed:
with an article, with the hand named otherwise or not at all, with keywords beside or instead of the name, with the
name worded as a person would ("flag of France", "man with red hair"), with the hand alone, so that a hand is learnt
apart from what it drew. The same record and seed give the same words.

usage: python scripts/emoji/captions.py data/emoji/index.jsonl [--seed 0]     prints some, to be read by a person
"""

import argparse
import pathlib
import random
import re
from collections.abc import Sequence
from typing import TypeVar

from records import Record, read_index

T = TypeVar("T")

# S is the hand. {a} takes a subject with its article, {n} one without; what stands twice is drawn twice as often.
NAME_FRAMES = (
    "{a}, S style",
    "{a}, S style",
    "{a}, S style",
    "{n}, S style",
    "{n}, S style",
    "{a} in S style",
    "S {n}",
    "S of {a}",
    "a S emoji of {a}",
    "{n} emoji, S style",
    "{a}",
    "{n}",
)
HAND_FRAMES = ("S style", "S style", "an emoji, S style", "an emoji in S style", "S emoji", "a S emoji", "S")
KEYWORD_FRAMES = ("{n}, S style", "{n}, S style", "{n}, S style", "S {n}", "{n}, S emoji", "{n}")

TRAIT = re.compile(r"(?:skin tone|hair|beard|bald)$")
GENDERS = ("man", "woman", "men", "women", "person", "people", "boy", "girl")
PROPER = re.compile(
    r"(?:Aquarius|Aries|Cancer|Capricorn|Gemini|Leo|Libra|Ophiuchus|Pisces|Sagittarius|Scorpio|Taurus|Virgo"
    r"|Santa Claus|Mrs\. Claus|Mx Claus|ZZZ|Statue of Liberty|Tokyo tower|mount fuji)\b"
)
HEAD_END = re.compile(r" (?:of|with|without|in|on|at|from|behind|over|and|\w+ing)\b|[:,]")
PLURAL = re.compile(r"\b(?:people|men|women|feet|teeth|dice)$|[^su]s$")
AN = re.compile(
    r"(?!uni|use|euro|ewe|one|O button)[aeiou]|hour|(?:ATM|NG|SOS|ID|OK|O|A|AB|UP!|END|ON!)\b", re.IGNORECASE
)


def canonical_caption(record: Record) -> str:
    """The caption that a picture is judged by: "red heart, noto style"."""
    return f"{record.name}, {record.style} style"


def training_caption(record: Record, seed: int | str) -> str:
    """A caption for one showing of a picture.

    Args:
        record: the picture.
        seed: an int or a string, such as f"{epoch}/{row}".

    Returns:
        The canonical caption four times of ten, the hand named nine times of ten, and alone one time of ten. Equal for
        equal arguments on every machine. Upper and lower case as in CLDR: the tokenizer lowers them.
    """
    rng = random.Random(f"{seed}/{record.style}/{record.codepoints}")
    draw = rng.random()
    if draw < 0.40:
        caption = canonical_caption(record)
    elif draw < 0.56 and record.keywords:
        caption = choose(rng, KEYWORD_FRAMES).replace("S", record.style).format(n=keyword_subject(rng, record))
    elif 0.56 <= draw < 0.66:
        caption = choose(rng, HAND_FRAMES).replace("S", record.style)
    else:
        name = name_subject(rng, record)
        subject = name if goes_by_country(record, name) else with_article(name)
        caption = choose(rng, NAME_FRAMES).replace("S", record.style).format(n=name, a=subject)
    return typed(rng, caption)


def name_subject(rng: random.Random, record: Record) -> str:
    """The emoji's name as CLDR has it, worded freely, by another name, or with a keyword after it."""
    draw = rng.random()
    if draw < 0.30:
        return choose(rng, reworded(record.name))
    if draw < 0.40 and record.aliases:
        return choose(rng, record.aliases)
    if draw < 0.55 and record.keywords:
        return f"{record.name}, {choose(rng, record.keywords)}"
    return record.name


def keyword_subject(rng: random.Random, record: Record) -> str:
    """One to four of CLDR's keywords, and always what tells a variant from the emoji that the keywords alone mean."""
    told = distinctions(record.name)
    free = [keyword for keyword in record.keywords if keyword not in told]
    count = choose(rng, (1, 1, 2, 2, 2, 3, 3, 4))
    picked = sorted(free, key=lambda _: rng.random())[:count]
    return choose(rng, (", ", " ")).join([*picked, *told])


def distinctions(name: str) -> tuple[str, ...]:
    """What of a name must stay when keywords stand for it: the qualifiers after its colon, and a leading gender.

    "woman running: dark skin tone" -> ("woman", "dark skin tone"); "flag: France" -> ("France",); "red heart" -> ().
    """
    head, _, rest = name.partition(": ")
    first = head.split(" ")[0]
    return (*([first] if first in GENDERS else []), *(rest.split(", ") if rest else []))


def reworded(name: str) -> tuple[str, ...]:
    """A CLDR short name as a person might type it.

    Args:
        name: such as "flag: France", "man: bald", "woman running: dark skin tone, facing right".

    Returns:
        At least one wording: ("flag of France", "France flag", "France"), ("man, bald", "man with bald head", ...).
        A name without a colon comes back as it is.
    """
    head, _, rest = name.partition(": ")
    if not rest:
        return (name,)
    if head == "flag":
        return (f"flag of {rest}", f"{rest} flag", rest)
    qualifiers = rest.split(", ")
    traits = ["bald head" if q == "bald" else q for q in qualifiers if TRAIT.search(q)]
    others = [q for q in qualifiers if not TRAIT.search(q)]
    plain = (f"{head}, {rest}", f"{head} {rest.replace(',', '')}")
    if not traits or len(traits) > 2 or others not in ([], ["facing right"]):
        return plain
    facing = "".join(f" {q}" for q in others)
    return (*plain, f"{head}{facing} with {' and '.join(traits)}", f"{' '.join([*traits, head])}{facing}")


def goes_by_country(record: Record, subject: str) -> bool:
    """Whether a flag is named by its country ("France", "flag: France, flag"), which takes no article."""
    head, _, country = record.name.partition(": ")
    return head == "flag" and subject not in (f"flag of {country}", f"{country} flag")


def with_article(name: str) -> str:
    """A name with "a" or "an" before it, "the" before "flag of", and nothing before plurals and proper names.

    Args:
        name: a subject, perhaps with qualifiers or a keyword after it.

    Returns:
        "a red heart", "an ear", "glasses", "the flag of France", "Santa Claus".
    """
    head = HEAD_END.split(name, maxsplit=1)[0]
    if name.startswith("flag of "):
        return f"the {name}"
    if PROPER.match(name) or PLURAL.search(head) or not head[:1].isalnum():
        return name
    return f"an {name}" if AN.match(name) else f"a {name}"


def choose(rng: random.Random, items: Sequence[T]) -> T:
    """One of several, by the one method of `random` whose numbers Python promises never to change."""
    return items[int(rng.random() * len(items))]


def typed(rng: random.Random, caption: str) -> str:
    """A caption as CLDR prints it or, half the time, with the quotation marks of a keyboard."""
    return caption if rng.random() < 0.5 else caption.translate(str.maketrans("’“”", '\'""'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    records = read_index(arguments.index)
    for record in random.Random(arguments.seed).sample(records, min(100, len(records))):
        print(f"{canonical_caption(record):60} {training_caption(record, arguments.seed)}")


if __name__ == "__main__":
    main()
