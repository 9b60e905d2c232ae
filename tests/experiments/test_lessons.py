"""The built-in corpus and its tokenizer: the same everywhere, true, and honestly held out."""

import hashlib
import itertools
import re
from collections import Counter

import pytest

from tpa_minimal.experiments import data, lessons


@pytest.fixture(scope="module")
def sample() -> list[tuple[str, bool]]:
    return list(itertools.islice(lessons.documents(seed=0), 6000))


def all_names(kind: str) -> dict[str, bool]:
    """Every name of a kind, and whether it is held out."""
    sizes = (lessons.ONSETS, lessons.NUCLEI, lessons.MEDIALS, lessons.ENDINGS[kind])
    every = itertools.product(*(range(len(size)) for size in sizes))
    return {lessons.name(kind, parts): lessons.is_held_out(*parts) for parts in every}


def names_in(text: str, known: dict[str, bool]) -> set[str]:
    words = re.findall(r"[A-Za-z]+(?: (?:Hill|Bay|Bridge))?", text)
    return {word for word in words if word in known}


@pytest.mark.parametrize(
    "seed, digest",
    [
        (0, "dde0368473293b53690c38307cdafaa1d8e5c69b9370467d64cf36dbeb33e173"),
        (1, "d798318b4e2ed33fb9c4e08fa90189bf9488d1ccb50a92bdd1ee515e3474863e"),
    ],
)
def test_a_seed_gives_these_very_texts(seed, digest):
    """If this fails on purpose, raise lessons.VERSION, make the tokenizer again, and take over the new sums."""
    found = hashlib.sha256()
    for text, held_out in itertools.islice(lessons.documents(seed), 2000):
        found.update(f"{held_out} {text}\n".encode())
    assert found.hexdigest() == digest


def test_each_name_has_one_set_of_parts_and_one_side():
    seen = Counter()
    for kind, endings in lessons.ENDINGS.items():
        names = all_names(kind)
        assert len(names) == len(lessons.ONSETS) * len(lessons.NUCLEI) * len(lessons.MEDIALS) * len(endings)
        assert 0.05 < sum(names.values()) / len(names) < 0.075  # 1 in 16
        seen.update(list(names))
    assert max(seen.values()) == 1  # no name is a person's and a place's


def test_no_name_of_a_held_out_lesson_occurs_in_training(sample):
    known = all_names("person") | all_names("place") | all_names("thing")
    known |= {name.capitalize(): held_out for name, held_out in all_names("thing").items()}  # rivers
    found = {True: set(), False: set()}
    for text, held_out in sample:
        found[held_out] |= names_in(text, known)
    assert len(found[True]) > 300 and len(found[False]) > 3000
    assert all(known[name] for name in found[True]) and not any(known[name] for name in found[False])


def number_facts(text: str):
    """Each statement of arithmetic in a text: (operation, the two numbers in order of size), and whether it is true."""
    for x, word, y, z in re.findall(r"(\d+) (plus|minus|times|divided by) (\d+) is (\d+)", text):
        x, y, z = int(x), int(y), int(z)
        if word == "plus":
            yield ("sum", *sorted((x, y))), x + y == z
        elif word == "minus":
            yield ("sum", *sorted((y, z))), x - y == z
        elif word == "times":
            yield ("product", *sorted((x, y))), x * y == z
        else:
            yield ("product", *sorted((y, z))), y * z == x


def test_arithmetic_is_true_and_held_out_facts_are_unseen(sample):
    facts = {True: set(), False: set()}
    for text, held_out in sample:
        for fact, is_true in number_facts(text):
            assert is_true, text
            facts[held_out].add(fact)
    assert len(facts[True]) > 50 and len(facts[False]) > 1000
    assert not facts[True] & facts[False]


def test_sequences_count_as_they_say(sample):
    checked = 0
    for text, _ in sample:
        if found := re.match(r"Count (by|down by) (\d+) from (\d+): ([\d, ]+)\.", text):
            step = int(found[2]) if found[1] == "by" else -int(found[2])
            numbers = [int(n) for n in found[4].split(", ")]
            assert numbers[0] == int(found[3]) and {y - x for x, y in zip(numbers, numbers[1:])} == {step}
            assert text.endswith(f"Answer: {numbers[-1]}.")
            checked += 1
    assert checked > 100


def test_what_a_keepsake_lesson_asks_was_said_before(sample):
    checked = 0
    for text, _ in sample:
        told, *asked = text.split("\nQuestion: ")
        for question in asked:
            if question.startswith("What does") and " have?" in question:
                assert question.split("Answer: ")[1] in told
                checked += 1
    assert checked > 500


def test_lessons_vary(sample):
    texts = [text for text, _ in sample]
    assert len(set(texts)) > 0.99 * len(texts)  # some sequences of numbers come twice
    openings = Counter(re.sub(r"\d+|[A-Z]\w+", "·", text)[:20] for text in texts)
    assert len(openings) > 100
    assert all(text.isascii() and text == text.strip() for text in texts)


def test_draws_cover_what_they_choose_from():
    draw = lessons.Draw(0)
    assert {draw.below(5) for _ in range(200)} == set(range(5))
    assert sorted(draw.some("abcde", 5)) == list("abcde")
    assert {tuple(draw.some("abc", 2)) for _ in range(200)} == set(itertools.permutations("abc", 2))
    assert len(set(draw.names("person", 12))) == 12


def test_articles():
    assert [lessons.a(noun) for noun in ("orange lamp", "lamp", "iron key")] == [
        "an orange lamp",
        "a lamp",
        "an iron key",
    ]


def plain_bpe(words: Counter, n_merges: int) -> list[bytes]:
    """Byte-pair encoding with nothing remembered between two merges."""
    parts = {word: [bytes([b]) for b in word.encode()] for word in words}
    tokens = [bytes([b]) for b in range(256)]
    for _ in range(n_merges):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(b"".join(best))
        for word, old in parts.items():
            new = []
            for token in old:
                if new and (new[-1], token) == best and new[-1] is not None:
                    new[-1:] = [best[0] + best[1]]
                else:
                    new.append(token)
            parts[word] = new
    return tokens


def test_the_trainer_is_plain_byte_pair_encoding():
    texts = [text for text, _ in itertools.islice(lessons.documents(0), 150)]
    words = Counter(word for text in texts for word in lessons._TOKEN_PATTERN_ASCII.findall(text))
    assert lessons.train_tokenizer(n_merges=60, n_documents=150, n_words=10**9) == plain_bpe(words, 60)


def test_the_shipped_tokenizer_is_what_the_trainer_makes(tmp_path):
    made = tmp_path / "made.tiktoken"
    lessons.write_tokenizer(made)
    assert made.read_bytes() == lessons.TOKENIZER_FILE.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["made.tiktoken"]


def test_the_tokenizer_takes_any_text(sample):
    tokenizer = data.load_tokenizer("lessons")
    assert tokenizer.n_vocab == lessons.N_VOCAB == 1024 and tokenizer.eot_token == 1023
    for text in ("", "naïve café, 東京 🙂\r\n\t x", "<|endoftext|>", "".join(map(chr, range(256))), sample[0][0]):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.encode_ordinary("1234") == [tokenizer.encode_single_token(digit) for digit in "1234"]
    words = sum(len(text.split()) for text, _ in sample)
    tokens = sum(len(tokenizer.encode_ordinary(text)) for text, _ in sample)
    assert tokens < 1.7 * words
