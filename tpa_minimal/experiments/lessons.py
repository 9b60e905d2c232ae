"""The built-in corpus: short lessons that can always be made, and the small tokenizer that was trained on them.

Each lesson states facts about invented people, places and things, and asks for some of them later in the text. Names
are put together from parts, and every name and every pair of numbers belongs either to training or to the held-out
lessons, never to both: predicting a held-out answer takes reading the lesson, not remembering another one.

    python -m tpa_minimal.experiments.lessons sample 5       prints five lessons
    python -m tpa_minimal.experiments.lessons tokenizer      trains the tokenizer again and writes lessons.tiktoken
"""

import base64
import itertools
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tpa_minimal import files

VERSION = 1  # part of the key of every cached shard: raise it whenever a seed gives other texts
HELD_OUT_ONE_IN = 16  # lessons, names and pairs of numbers
TOKENIZER_FILE = Path(__file__).with_name("lessons.tiktoken")
END_OF_TEXT = "<|endoftext|>"
N_VOCAB = 1024  # 256 bytes, 767 merges, <|endoftext|>

# A word with the space before it, one digit, punctuation, or white space. One digit at a time, since a model that
# sees "42" as a unit cannot carry.
TOKEN_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TOKEN_PATTERN_ASCII = re.compile(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")  # the same, for `re`

# ------------------------------------------------------------------------------------------------------- words

ONSETS = "B Br D Dr F G Gr H J K L M N P Qu R S St T V".split()
NUCLEI = "a e i o u ai".split()
MEDIALS = "b d g l ll m n nd r rd rn s st th v z".split()
ENDINGS = {
    "person": "a an ea el en ia is or".split(),
    "place": "ary oak aven eby erton Hill Bay Bridge".split(),
    "thing": "ack ade ell et ick in ole um".split(),
}
COLOURS = "red blue green yellow white black brown grey silver golden pink orange".split()
OBJECTS = (
    "lamp key drum cup book coat hat bell rope box map boat clock chair basket ladder mirror kite spoon blanket "
    "hammer candle flute bucket brush needle wheel bottle pencil bowl"
).split()
ANIMALS = "dog cat horse goat hen duck rabbit sheep pony parrot turtle mouse".split()
FOODS = "bread soup rice cheese honey plums beans fish cake pears noodles nuts".split()
JOBS = (
    "baker teacher farmer doctor painter sailor tailor miner potter singer gardener carpenter fisher nurse clerk smith"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = "spring summer autumn winter".split()
GOODS = "apples eggs stones shells coins nails beads cards seeds buttons".split()
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
USES = (
    "cutting bread|mixing paint|catching fish|carrying water|digging holes|cleaning boots|lighting fires|"
    "sewing cloth|grinding corn|tying knots|measuring time|opening jars"
).split("|")
MATERIALS = {  # what follows from the material, stated as a rule
    "iron": ("sinks in water", "is attracted by a magnet", "conducts electricity"),
    "wood": ("floats on water", "is not attracted by a magnet", "does not conduct electricity"),
    "copper": ("sinks in water", "is not attracted by a magnet", "conducts electricity"),
    "glass": ("sinks in water", "is not attracted by a magnet", "does not conduct electricity"),
    "cork": ("floats on water", "is not attracted by a magnet", "does not conduct electricity"),
    "steel": ("sinks in water", "is attracted by a magnet", "conducts electricity"),
}
PROPERTIES = ("Does it float or sink?", "Does a magnet attract it?", "Does it conduct electricity?")
COMPARISONS = (
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
)
REMARKS = (
    "The morning was cold and clear.|Rain fell on the roof all day.|A soft wind came from the hills.|"
    "The road was long and dusty.|Nobody was in a hurry.|The sun stood high over the fields.|"
    "Two birds sat on the fence.|The water in the well was low.|Somebody closed a door far away.|"
    "The evening was warm and still.|Clouds moved slowly over the trees.|The street was quiet again.|"
    "It was time for a short rest.|The leaves had begun to fall.|A cart rolled past the gate.|"
    "Smoke rose from a few chimneys.|The children played near the river.|The market closed at noon."
).split("|")


def a(noun: str) -> str:
    """The noun with its article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def name(kind: str, parts: tuple[int, int, int, int]) -> str:
    """The name of a kind ("person", "place", "thing") that has these parts; different parts, different name."""
    onset, nucleus, medial, ending = parts
    root = ONSETS[onset] + NUCLEI[nucleus] + MEDIALS[medial]
    end = ENDINGS[kind][ending]
    if kind == "thing":
        root = root.lower()
    return f"{root}a {end}" if end[0].isupper() else root + end


def is_held_out(*parts: int) -> bool:
    """Whether the name with these parts, or this pair of numbers, belongs to the held-out lessons."""
    return sum((2 * i + 1) * part for i, part in enumerate(parts)) % HELD_OUT_ONE_IN == 5


class Draw:
    """Random choices for one side of the split. Uses nothing of `random` but `random()`, which never changes."""

    def __init__(self, seed: int, held_out: bool = False):
        self.random = random.Random(seed).random
        self.held_out = held_out

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def one(self, items):
        return items[self.below(len(items))]

    def some(self, items, n: int) -> list:
        """n different items, in random order."""
        items = list(items)
        for i in range(n):
            j = i + self.below(len(items) - i)
            items[i], items[j] = items[j], items[i]
        return items[:n]

    def names(self, kind: str, n: int = 1) -> list[str]:
        """n different names of this side of the split, which also differ in their first letters where they can."""
        found = {}
        while len(found) < n:
            parts = tuple(self.below(len(p)) for p in (ONSETS, NUCLEI, MEDIALS, ENDINGS[kind]))
            if is_held_out(*parts) == self.held_out:
                found.setdefault(parts[0], name(kind, parts))
        return list(found.values())

    def numbers(self, most_a: int, most_b: int) -> tuple[int, int]:
        """A pair of numbers of this side of the split, in either order, from 1 to most_a and from 1 to most_b."""
        while True:
            pair = 1 + self.below(most_a), 1 + self.below(most_b)
            if is_held_out(*sorted(pair)) == self.held_out:
                return pair

    def remarks(self, most: int) -> list[str]:
        return self.some(REMARKS, self.below(most + 1))


# ----------------------------------------------------------------------------------------------------- lessons
# Each takes a Draw and returns the text. Facts come first, what is asked or follows from them comes last.


def _join(*parts: str) -> str:
    return " ".join(p for p in parts if p)


def _ask(draw: Draw, pairs: list[tuple[str, str]], most: int) -> str:
    chosen = draw.some(pairs, min(len(pairs), 1 + draw.below(most)))
    return "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in chosen)


def keepsakes(draw: Draw) -> str:
    n = 2 + draw.below(4)
    people = draw.names("person", n)
    colours, objects = draw.some(COLOURS, n), draw.some(OBJECTS, n)
    facts = [keepsake(*fact) for fact in zip(people, colours, objects)]
    asked = [keepsake_question(p, c, o) for p, c, o in zip(people, colours, objects)]
    return _join(*facts, *draw.remarks(3)) + "\n" + _ask(draw, asked, 3)


def keepsake(person: str, colour: str, thing: str) -> str:
    return f"{person} has {a(f'{colour} {thing}')}."


def keepsake_question(person: str, colour: str, thing: str) -> tuple[str, str]:
    return f"What does {person} have?", keepsake(person, colour, thing)


def profile(draw: Draw) -> str:
    [person], [place] = draw.names("person"), draw.names("place")
    job, animal, food, day = draw.one(JOBS), draw.one(ANIMALS), draw.one(FOODS), draw.one(DAYS)
    facts = [
        (f"{person} lives in {place}.", f"Where does {person} live?"),
        (f"{person} works as {a(job)}.", f"What is the work of {person}?"),
        (f"{person} owns {a(animal)}.", f"Which animal does {person} own?"),
        (f"{person} likes to eat {food}.", f"What does {person} like to eat?"),
        (f"{person} rests on {day}.", f"When does {person} rest?"),
    ]
    facts = draw.some(facts, 3 + draw.below(3))
    text = _join(*(fact for fact, _ in facts), *draw.remarks(2))
    return text + "\n" + _ask(draw, [(q, fact) for fact, q in facts], 3)


def journey(draw: Draw) -> str:
    giver, taker = draw.names("person", 2)
    first, second = draw.names("place", 2)
    colour, thing, day = draw.one(COLOURS), draw.one(OBJECTS), draw.one(DAYS)
    item = f"{colour} {thing}"
    told = [
        draw.one((f"On {day} {giver} left {first} early.", f"{giver} set out from {first} on {day}.")),
        draw.one((f"On the way {giver} found {a(item)}.", f"Near the road {giver} picked up {a(item)}.")),
        draw.one((f"In {second} {giver} met {taker}.", f"{taker} was waiting in {second}.")),
        draw.one((f"{giver} gave the {thing} to {taker}.", f"{taker} got the {thing} from {giver}.")),
    ]
    asked = [
        (f"From where did {giver} set out?", f"{giver} set out from {first}."),
        (f"Who has the {thing} now?", f"{taker} has the {thing} now."),
        (f"What colour is the {thing}?", f"The {thing} is {colour}."),
        (f"Where are {giver} and {taker} now?", f"{giver} and {taker} are in {second}."),
        (f"On which day did {giver} leave?", f"{giver} left on {day}."),
    ]
    remarks = draw.remarks(2)
    return _join(told[0], *remarks[:1], *told[1:], *remarks[1:]) + "\n" + _ask(draw, asked, 3)


def sums(draw: Draw) -> str:
    lines = []
    for _ in range(3 + draw.below(4)):
        x, y = draw.numbers(60, 39)
        lines.append(draw.one((f"{x} plus {y} is {x + y}.", f"{x + y} minus {y} is {x}.", f"{y} plus {x} is {x + y}.")))
    return _join(draw.one(("Sums to practise:", "Sums for today:", "Add and take away:")), *lines)


def times(draw: Draw) -> str:
    lines = []
    for _ in range(3 + draw.below(3)):
        x, y = draw.numbers(12, 12)
        lines.append(draw.one((f"{x} times {y} is {x * y}.", f"{x * y} divided by {y} is {x}.")))
    return _join(draw.one(("Times table:", "Multiply and divide:")), *lines)


def story_sum(draw: Draw) -> str:
    [person] = draw.names("person")
    x, y = draw.numbers(60, 39)
    goods = draw.one(GOODS)
    more = draw.random() < 0.5
    before, after = (x, x + y) if more else (x + y, x)
    change = draw.one(("finds", "buys", "gets")) if more else draw.one(("loses", "sells", "gives away"))
    told = f"{person} has {before} {goods} and {change} {y}{' more' if more else ''}."
    sign = "plus" if more else "minus"
    asked = f"Question: How many {goods} does {person} have now?"
    answer = f"Answer: {before} {sign} {y} is {after}, so {person} has {after} {goods}."
    return _join(told, *draw.remarks(1)) + f"\n{asked}\n{answer}"


def counting(draw: Draw) -> str:
    start, step = draw.numbers(60, 12)
    numbers = [start + i * step for i in range(5 + draw.below(4))]
    if draw.random() < 0.4:
        numbers.reverse()
        how = f"Count down by {step} from {numbers[0]}"
    else:
        how = f"Count by {step} from {start}"
    listed = ", ".join(map(str, numbers))
    return f"{how}: {listed}.\nQuestion: Which number comes after {numbers[-2]}?\nAnswer: {numbers[-1]}."


def definition(draw: Draw) -> str:
    things = draw.names("thing", 1 + draw.below(3))
    materials, uses = draw.some(MATERIALS, len(things)), draw.some(USES, len(things))
    size = draw.one(("small", "large", "heavy", "light", "round", "long"))
    told, asked = [], []
    for thing, material, use in zip(things, materials, uses):
        told.append(f"{a(thing).capitalize()} is a {size} tool of {material}. It is used for {use}.")
        asked.append((f"What is {a(thing)} used for?", f"{a(thing).capitalize()} is used for {use}."))
        asked.append((f"What is {a(thing)} made of?", f"{a(thing).capitalize()} is made of {material}."))
    return _join(*told, *draw.remarks(2)) + "\n" + _ask(draw, asked, 3)


def material(draw: Draw) -> str:
    [person], thing, of = draw.names("person"), draw.one(OBJECTS), draw.one(list(MATERIALS))
    rule = draw.below(3)
    what = MATERIALS[of][rule]
    told = f"{person} made {a(thing)} of {of}."
    law = f"{of.capitalize()} {what}."
    answer = f"The {thing} is made of {of}. {law} So the {thing} of {person} {what}."
    return _join(told, *draw.remarks(2)) + f"\nQuestion: {PROPERTIES[rule]}\nAnswer: {answer}"


def neighbours(draw: Draw) -> str:
    first, second, third = draw.names("place", 3)
    [river], way = draw.names("thing"), draw.one(list(OPPOSITE))
    river, back = river.capitalize(), OPPOSITE[way]
    told = [
        f"{first} lies {way} of {second}.",
        f"{second} lies {way} of {third}.",
        f"The river {river} flows past {third}.",
    ]
    asked = [
        (f"Which town lies {back} of {first}?", f"{second} lies {back} of {first}."),
        (
            f"Does {first} lie {way} of {third}?",
            f"Yes, {first} lies {way} of {third}, since {second} lies between them.",
        ),
        (f"Which river flows past {third}?", f"The river {river} flows past {third}."),
        ("Which town is in the middle?", f"{second} is in the middle."),
    ]
    return _join(*told, *draw.remarks(2)) + "\n" + _ask(draw, asked, 3)


def order(draw: Draw) -> str:
    more, less, most, least = draw.one(COMPARISONS)
    people = draw.names("person", 3 + draw.below(2))
    told = [f"{x} is {more} than {y}." for x, y in zip(people, people[1:])]
    x, y = people[0], people[-1]
    asked = [
        (f"Who is the {most}?", f"{x} is the {most}."),
        (f"Who is the {least}?", f"{y} is the {least}."),
        (f"Who is {less}, {people[0]} or {people[1]}?", f"{people[1]} is {less} than {people[0]}."),
    ]
    return _join(*told, *draw.remarks(1)) + "\n" + _ask(draw, asked, 3)


def packing(draw: Draw) -> str:
    [person], [place] = draw.names("person"), draw.names("place")
    things = draw.some(OBJECTS, 3 + draw.below(3))
    listed = ", ".join(f"{draw.one(COLOURS)} {thing}" for thing in things)
    last = f"The list of {person} again: {listed}."
    return _join(f"{person} packs for {place}. The list: {listed}.", *draw.remarks(2), last)


def calendar(draw: Draw) -> str:
    [place], day, season = draw.names("place"), draw.below(7), draw.one(SEASONS)
    today, tomorrow, before = DAYS[day], DAYS[(day + 1) % 7], DAYS[(day + 6) % 7]
    told = f"The market in {place} is on {today}. The fair in {place} is in {season}."
    asked = [
        (f"When is the market in {place}?", f"The market in {place} is on {today}."),
        (f"When is the fair in {place}?", f"The fair in {place} is in {season}."),
        (f"Which day comes after the market in {place}?", f"The day after {today} is {tomorrow}."),
        (f"Which day comes before the market in {place}?", f"The day before {today} is {before}."),
    ]
    return _join(told, *draw.remarks(2)) + "\n" + _ask(draw, asked, 3)


LESSONS = (
    keepsakes, keepsakes, profile, profile, journey, journey, sums, times, story_sum, counting, definition, material,
    neighbours, order, packing, calendar,
)  # fmt: skip


def documents(seed: int = 0) -> Iterator[tuple[str, bool]]:
    """Lessons without end, the same for a seed on every machine: (text, whether it is held out for validation)."""
    draw = Draw(seed)
    for number in itertools.count():
        draw.held_out = number % HELD_OUT_ONE_IN == 3
        yield draw.one(LESSONS)(draw), draw.held_out


def recall(draw: Draw, n_facts: int, distance: int, n_tokens: Callable[[str], int]) -> tuple[str, list[str], int]:
    """Text that states n_facts keepsakes and asks for one, at least `distance` tokens after it; see data.recall_probe.

    Returns the text up to the answer, what would complete it for each fact, and the number of the fact asked for.
    """
    people, asked = draw.names("person", n_facts), draw.below(n_facts)
    items = list(zip(people, draw.some(COLOURS, n_facts), draw.some(OBJECTS, n_facts)))
    facts = [keepsake(*item) for item in items]
    between, unused = facts[asked + 1 :], []
    while n_tokens(" " + " ".join(between)) < distance:
        unused = unused or draw.some(REMARKS, len(REMARKS))
        between.append(unused.pop())
    question, _ = keepsake_question(*items[asked])
    prompt = _join(*facts[: asked + 1], *between) + f"\nQuestion: {question}\nAnswer: {people[asked]} has"
    return prompt, [fact.removeprefix(f"{person} has") for person, fact in zip(people, facts)], asked


# --------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(n_merges: int = N_VOCAB - 257, n_documents: int = 4000, n_words: int = 3000) -> list[bytes]:
    """Byte-pair encoding of the lessons' most frequent words: all tokens in order of rank, the 256 bytes first.

    Again and again the most frequent pair of neighbouring tokens becomes a token of its own (Sennrich et al. 2016).
    """
    stream = documents(seed=0)
    counts = Counter(word for _ in range(n_documents) for word in _TOKEN_PATTERN_ASCII.findall(next(stream)[0]))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n_words]
    words = [(word.encode(), [bytes([b]) for b in word.encode()], count) for word, count in ordered]
    tokens = [bytes([b]) for b in range(256)]
    pairs = Counter()
    for _, parts, count in words:
        for pair in zip(parts, parts[1:]):
            pairs[pair] += count
    for _ in range(n_merges):
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(left + right)
        for word, parts, count in words:
            if left + right not in word:  # most words: no need to look at their parts
                continue
            for pair in zip(parts, parts[1:]):
                pairs[pair] -= count
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i : i + 2] = [left + right]
                i += 1
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
    return tokens


def write_tokenizer(path: Path = TOKENIZER_FILE) -> None:
    """Train the tokenizer and write it in tiktoken's own format: each line a token in base64 and its rank."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(train_tokenizer()))
    content = "".join(lines).encode("ascii")
    files.write_whole(path, lambda temporary: temporary.write_bytes(content))


if __name__ == "__main__":
    if sys.argv[1:] == ["tokenizer"]:
        write_tokenizer()
        print(f"wrote {TOKENIZER_FILE.name}")
    elif sys.argv[1:2] == ["sample"] and len(sys.argv) == 3 and sys.argv[2].isdigit():
        for (text, held_out), _ in zip(documents(), range(int(sys.argv[2]))):
            print(text, "(held out)" if held_out else "", end="\n\n")
    else:
        sys.exit(__doc__.strip())
