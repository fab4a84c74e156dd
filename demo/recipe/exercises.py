"""Small tasks with one right answer: sums, units, and work on words and numbers that stand in the request.

Each function draws one task and returns request, thought and answer. They teach a small model to copy, count
and sort; it learns sums to about a hundred and little more.

    python -c "import random, exercises; print(exercises.arithmetic(random.Random(1)))"
"""

from collections.abc import Callable
from random import Random

from data_files import read_json
from stories import Exchange
from values import FIRST_NAMES, OBJECT_WORDS

_FACTS = read_json("facts.json")
NUMBER_WORDS: list[str] = _FACTS["number_words"]
_WORDS = OBJECT_WORDS + _FACTS["spelling_words"]
_COUNTED = ["apple", "book", "coin", "pencil", "egg", "cookie", "stamp", "marble", "shell", "card"]
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]


def arithmetic(rng: Random) -> Exchange:
    """Return one sum, difference, product or quotient of small numbers."""
    operator, highest = rng.choice("++--*/"), rng.choice([12, 20, 20, 50, 100])
    if operator == "+":
        a, b, word = rng.randint(0, highest), rng.randint(0, highest), "plus"
        value = a + b
    elif operator == "-":
        pair = (rng.randint(0, highest), rng.randint(0, highest))
        (a, b), word = sorted(pair, reverse=rng.random() < 0.9), "minus"
        value = a - b
    elif operator == "*":
        a, b, word = rng.randint(0, 12), rng.randint(0, 12), "times"
        value = a * b
    else:
        b, value, word = rng.randint(1, 10), rng.randint(0, 10), "divided by"
        a = b * value
    sum_text = f"{a} {operator} {b}"
    request = rng.choice(
        [
            f"What is {a} {word} {b}?",
            f"What is {sum_text}?",
            sum_text,
            f"{a}{operator}{b}",
            f"{sum_text} = ?",
            f"How much is {a} {word} {b}?",
            f"Calculate {sum_text}.",
            f"what's {sum_text}",
            f"Please compute {a} {word} {b}.",
        ]
    )
    answer = rng.choice([f"{sum_text} = {value}.", f"The answer is {value}.", f"{a} {word} {b} is {value}."])
    return request, f"{sum_text} = {value}.", answer


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def word_problem(rng: Random) -> Exchange:
    """Return a sum or a difference told as a little story."""
    name, other = rng.sample(FIRST_NAMES, 2)
    thing, a, b = rng.choice(_COUNTED), rng.randint(2, 30), rng.randint(1, 20)
    if rng.random() < 0.5:
        total = a + b
        start = f"{name} has {_count(a, thing)}"
        questions = [
            f"{start}. {other} gives {name} {b} more. How many {thing}s does {name} have now?",
            f"{start} and buys {b} more. How many {thing}s is that?",
        ]
        request, thought = rng.choice(questions), f"{a} + {b} = {total}."
        has = f"{name} has {_count(total, thing)}."
        return request, thought, rng.choice([has, f"{a} + {b} = {total}, so {has}"])
    b = rng.randint(1, a)
    left = a - b
    questions = [
        f"{name} has {_count(a, thing)} and gives {b} to {other}. How many are left?",
        f"{name} had {_count(a, thing)}. {name} lost {b}. How many {thing}s are left?",
    ]
    request, thought = rng.choice(questions), f"{a} - {b} = {left}."
    are_left = f"{left} are left." if left != 1 else "1 is left."
    return (
        request,
        thought,
        rng.choice([are_left, f"{a} - {b} = {left}, so {name} has {_count(left, thing)} left."]),
    )


def unit_conversion(rng: Random) -> Exchange:
    """Return a conversion between two units that differ by a whole factor."""
    large, small, factor = rng.choice(_FACTS["units"])
    n = rng.randint(1, 12)
    total = n * factor
    if rng.random() < 0.7:
        questions = [
            f"How many {small} are {n} {large}?",
            f"Convert {n} {large} to {small}.",
            f"{n} {large} in {small}?",
            f"What is {n} {large} in {small}?",
        ]
        return rng.choice(questions), f"{n} * {factor} = {total}.", f"{n} {large} are {total} {small}."
    request = rng.choice([f"How many {large} are {total} {small}?", f"Convert {total} {small} to {large}."])
    return request, f"{total} / {factor} = {n}.", f"{total} {small} are {n} {large}."


def word_task(rng: Random) -> Exchange:
    """Return one of thirteen tasks on words or numbers: spell, reverse, sort, repeat, count, compare."""
    task = rng.choice(_WORD_TASKS)
    word, words = rng.choice(_WORDS), rng.sample(_WORDS, rng.randint(2, 6))
    return task(rng, word, words)


def _spell(rng: Random, word: str, words: list[str]) -> Exchange:
    request = rng.choice([f"Spell the word {word}.", f"How do you spell {word}?", f'Spell "{word}".'])
    return request, f"I spell {word} letter by letter.", ("-" if rng.random() < 0.5 else " ").join(word)


def _reverse_words(rng: Random, word: str, words: list[str]) -> Exchange:
    listed = ", ".join(words)
    questions = [f"Reverse the order of these words: {listed}", f"Say these words backwards: {listed}"]
    return rng.choice(questions), "I start with the last word.", ", ".join(words[::-1])


def _reverse_letters(rng: Random, word: str, words: list[str]) -> Exchange:
    questions = [f"Reverse the word {word}.", f'Spell "{word}" backwards.', f"What is {word} backwards?"]
    return rng.choice(questions), f"The letters are {' '.join(word)}.", word[::-1]


def _sort_words(rng: Random, word: str, words: list[str]) -> Exchange:
    listed = ", ".join(words)
    questions = [
        f"Sort these words: {listed}.",
        f"Put these words in alphabetical order: {listed}.",
        f"Sort alphabetically: {listed}",
    ]
    return rng.choice(questions), "I sort the words by their first letters.", ", ".join(sorted(words))


def _sort_numbers(rng: Random, word: str, words: list[str]) -> Exchange:
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(3, 5))]
    falling, listed = rng.random() < 0.25, ", ".join(map(str, numbers))
    questions = [f"Sort these numbers: {listed}.", f"Put these numbers in order: {listed}."]
    if falling:
        questions = [f"Sort these numbers from large to small: {listed}."]
    return (
        rng.choice(questions),
        "I compare the numbers.",
        ", ".join(map(str, sorted(numbers, reverse=falling))),
    )


def _repeat(rng: Random, word: str, words: list[str]) -> Exchange:
    text = rng.choice([" ", ", "]).join(words)
    questions = [
        f"Repeat after me: {text}",
        f"Say the following words: {text}",
        f"Repeat: {text}",
        f"Copy this text: {text}",
        f'Say "{text}".',
    ]
    return rng.choice(questions), "I repeat the words.", text


def _capitals(rng: Random, word: str, words: list[str]) -> Exchange:
    request = rng.choice([f"Write {word} in capital letters.", f'Write "{word}" in upper case.'])
    return request, "I use capital letters.", word.upper()


def _count_letters(rng: Random, word: str, words: list[str]) -> Exchange:
    questions = [f"How many letters are in the word {word}?", f'How many letters does "{word}" have?']
    answer = f"The word {word} has {len(word)} letters."
    return rng.choice(questions), f"The letters are {' '.join(word)}.", answer


def _first_letter(rng: Random, word: str, words: list[str]) -> Exchange:
    request = rng.choice([f"What is the first letter of {word}?", f"Which letter does {word} begin with?"])
    return request, f"The word is {word}.", f"The first letter of {word} is {word[0]}."


def _last_letter(rng: Random, word: str, words: list[str]) -> Exchange:
    request = rng.choice([f"What is the last letter of {word}?", f"Which letter does {word} end with?"])
    return request, f"The letters are {' '.join(word)}.", f"The last letter of {word} is {word[-1]}."


def _count_words(rng: Random, word: str, words: list[str]) -> Exchange:
    text = " ".join(words)
    request = rng.choice([f"How many words are here: {text}?", f'Count the words: "{text}"'])
    return request, "I count the words.", f"There are {NUMBER_WORDS[len(words)]} words."


def _nth_word(rng: Random, word: str, words: list[str]) -> Exchange:
    i = rng.randrange(len(words))
    request = f"What is the {_ORDINALS[i]} word of: {' '.join(words)}?"
    return request, "I count the words.", f"The {_ORDINALS[i]} word is {words[i]}."


def _compare_numbers(rng: Random, word: str, words: list[str]) -> Exchange:
    (a, b), larger = rng.sample(range(1, 200), 2), rng.random() < 0.5
    wanted, wanted_number = ("larger", "bigger") if larger else ("smaller", "smaller")
    request = rng.choice([f"Which is {wanted}, {a} or {b}?", f"Which number is {wanted_number}: {a} or {b}?"])
    return request, f"I compare {a} and {b}.", f"{max(a, b) if larger else min(a, b)} is {wanted}."


_WORD_TASKS: list[Callable[[Random, str, list[str]], Exchange]] = [
    _spell,
    _reverse_words,
    _reverse_letters,
    _sort_words,
    _sort_numbers,
    _repeat,
    _capitals,
    _count_letters,
    _first_letter,
    _last_letter,
    _count_words,
    _nth_word,
    _compare_numbers,
]
