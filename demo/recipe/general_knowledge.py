"""Questions about facts: capitals, days, opposites, rhymes, members of a class, and what a short text says.

The facts are in data/facts.json. A model of this size learns these few hundred and knows no others.

    python -c "import random, general_knowledge as g; print(g.fact(random.Random(1)))"
"""

from collections.abc import Callable
from random import Random

from data_files import read_json
from exercises import NUMBER_WORDS
from stories import Exchange
from values import CITIES, FIRST_NAMES, WEEKDAYS
from vocabulary import article

_FACTS = read_json("facts.json")
_STORY_PARTS = read_json("stories.json")
_CAPITALS: dict[str, str] = _FACTS["capitals"]
_MONTHS: list[str] = _FACTS["months"]
_MEMBERS: dict[str, list[str]] = _FACTS["members"]
_SINGULAR: dict[str, str] = _FACTS["singular"]
_PROPER_NAMES = ("planets", "countries", "languages")
_JOBS = ["baker", "doctor", "teacher", "sailor", "farmer", "painter", "writer", "nurse"]
_WITHOUT_ARTICLE = ("colours", "metals", "drinks", "sports")


def fact(rng: Random) -> Exchange:
    """Return one question about a fact."""
    return rng.choice(_QUESTIONS)(rng)


def _capital(rng: Random) -> Exchange:
    country = rng.choice(list(_CAPITALS))
    city = _CAPITALS[country]
    questions = [
        f"What is the capital of {country}?",
        f"Which city is the capital of {country}?",
        f"Name the capital of {country}.",
        f"capital of {country}?",
    ]
    statement = f"The capital of {country} is {city}."
    return rng.choice(questions), statement, rng.choice([statement, f"{city} is the capital of {country}."])


def _country(rng: Random) -> Exchange:
    country = rng.choice(list(_CAPITALS))
    city = _CAPITALS[country]
    questions = [
        f"{city} is the capital of which country?",
        f"In which country is {city}?",
        f"Where is {city}?",
    ]
    place = f"{city} is in {country}."
    return rng.choice(questions), place, rng.choice([f"{city} is the capital of {country}.", place])


def _weekday(rng: Random) -> Exchange:
    i = rng.randrange(7)
    day, after, before = WEEKDAYS[i], WEEKDAYS[(i + 1) % 7], WEEKDAYS[i - 1]
    return rng.choice(
        [
            (f"What day comes after {day}?", "", f"{after} comes after {day}."),
            (f"What day comes before {day}?", "", f"{before} comes before {day}."),
            (f"Today is {day}. What day is tomorrow?", "", f"Tomorrow is {after}."),
        ]
    )


def _month(rng: Random) -> Exchange:
    i = rng.randrange(12)
    month, after, before = _MONTHS[i], _MONTHS[(i + 1) % 12], _MONTHS[i - 1]
    return rng.choice(
        [
            (f"What month comes after {month}?", "", f"{after} comes after {month}."),
            (f"What month comes before {month}?", "", f"{before} comes before {month}."),
        ]
    )


def _opposite(rng: Random) -> Exchange:
    first, second = rng.choice(list(_FACTS["opposites"].items()))
    if rng.random() >= 0.5:
        first, second = second, first
    request = rng.choice([f"What is the opposite of {first}?", f"Give me the opposite of {first}."])
    answer = f"The opposite of {first} is {second}."
    return request, answer, answer


def _plural(rng: Random) -> Exchange:
    one, many = rng.choice(list(_FACTS["plurals"].items()))
    request = rng.choice([f"What is the plural of {one}?", f"Give me the plural of {one}."])
    return request, "", f"The plural of {one} is {many}."


def _past_tense(rng: Random) -> Exchange:
    verb, past = rng.choice(list(_FACTS["past_tenses"].items()))
    request = rng.choice([f"What is the past tense of {verb}?", f"Past tense of {verb}?"])
    return request, "", f"The past tense of {verb} is {past}."


def _rhyme(rng: Random) -> Exchange:
    word, rhyme = rng.choice(list(_FACTS["rhymes"].items()))
    request = rng.choice([f"What rhymes with {word}?", f"Give me a rhyme for {word}."])
    return request, "", f"{rhyme.title()} rhymes with {word}."


def _name_members(rng: Random) -> Exchange:
    group, n = rng.choice(list(_MEMBERS)), rng.randint(2, 5)
    members, word = rng.sample(_MEMBERS[group], n), NUMBER_WORDS[n]
    request = rng.choice(
        [
            f"Name {word} {group}.",
            f"Give me {n} {group}.",
            f"List {word} {group}.",
            f"Tell me {word} {group}.",
        ]
    )
    answer = f"{', '.join(members[:-1])} and {members[-1]}."
    if group not in _PROPER_NAMES:
        answer = rng.choice([answer, ", ".join(members) + "."]).capitalize()
    return request, f"I pick {word} {group}.", answer


def _is_a_member(rng: Random) -> Exchange:
    group, other = rng.sample(list(_MEMBERS), 2)
    member = rng.choice(_MEMBERS[group])
    if member[0].islower() and group not in _WITHOUT_ARTICLE:
        member = article(member)
    is_one = rng.random() < 0.5
    asked, true = article(_SINGULAR[group if is_one else other]), article(_SINGULAR[group])
    answer = f"Yes, {member} is {asked}." if is_one else f"No, {member} is {true}."
    return f"Is {member} {asked}?", f"{member[0].upper() + member[1:]} is {true}.", answer


_QUESTIONS: list[Callable[[Random], Exchange]] = [
    _capital,
    _capital,  # twice as often as the others
    _country,
    _weekday,
    _month,
    _opposite,
    _plural,
    _past_tense,
    _rhyme,
    _name_members,
    _is_a_member,
]


def passage(rng: Random) -> Exchange:
    """Return a text of four sentences with a question about it, or with the wish for a summary."""
    name, other = rng.sample(FIRST_NAMES, 2)
    city, thing, day = rng.choice(CITIES), rng.choice(_STORY_PARTS["things"]), rng.choice(WEEKDAYS)
    animal, weather = (
        rng.choice(_STORY_PARTS["animals"]),
        rng.choice(["sunny", "rainy", "cold", "warm", "windy"]),
    )
    job = article(rng.choice(_JOBS))
    age, a_thing = rng.randint(2, 12), article(thing)
    facts = [
        f"{name} is {job} from {city}.",
        f"On {day} {name} bought {a_thing} for {other}.",
        f"The weather was {weather}.",
        f"{name} has {article(animal)} that is {age} years old.",
    ]
    kind = rng.randrange(8)
    if kind == 0:
        facts = rng.sample(facts, rng.randint(3, 4))
    text = " ".join(facts)
    if kind < 2:
        wishes = [
            f"Summarize this text: {text}",
            f"Summarise in one sentence: {text}",
            f"Give me a short summary: {text}",
        ]
        summary = f"The text is about {name}."
        if f"On {day}" in text and "from" in text:
            summary = f"{name}, {job} from {city}, bought {a_thing} for {other}."
        return rng.choice(wishes), "I keep the main points.", summary
    question, answer = rng.choice(
        [
            (f"Where is {name} from?", f"{name} is from {city}."),
            (f"What did {name} buy?", f"{name} bought {a_thing}."),
            (f"Who got the {thing}?", f"{other} got the {thing}."),
            (f"On which day did {name} buy the {thing}?", f"It was on {day}."),
            ("How was the weather?", f"The weather was {weather}."),
            (f"How old is the {animal}?", f"The {animal} is {age} years old."),
            (f"What is {name}'s job?", f"{name} is {job}."),
        ]
    )
    request = rng.choice([f"{text}\n\n{question}", f"Read this: {text} {question}", f"{text} {question}"])
    return request, "I look in the text.", answer
