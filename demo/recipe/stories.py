"""Very short stories and poems from templates: an opening, one of seven plots, an ending.

The templates are in data/stories.json; a request names the hero, its name, the place or a thing, and the
story keeps to it. The stories repeat themselves after a while, and so does a model trained on them.

    python -c "import random, stories; print(stories.tell(random.Random(1)))"
"""

from random import Random

from data_files import choose, read_json
from values import FIRST_NAMES
from vocabulary import article

Exchange = tuple[str, str, str]  # request, thought, answer

_PARTS = read_json("stories.json")
RHYMES: dict[str, str] = read_json("facts.json")["rhymes"]


def tell(rng: Random, kind: str = "", name: str = "", place: str = "", thing: str = "") -> str:
    """Return a story of 60 to 130 words, in one paragraph or two; what is not given is drawn."""
    kind = kind or rng.choice(_PARTS["animals"] if rng.random() < 0.7 else _PARTS["people"])
    name = name or rng.choice(FIRST_NAMES)
    place = place or rng.choice(_PARTS["places"])
    thing = thing or rng.choice(_PARTS["things"])
    friend = rng.choice([other for other in FIRST_NAMES if other != name])
    friend_kind = rng.choice([animal for animal in _PARTS["animals"] if animal != kind])
    slots = {
        "kind": kind,
        "name": name,
        "place": place,
        "thing": thing,
        "a_thing": article(thing),
        "friend": friend,
        "friend_kind": friend_kind,
        "a_friend": article(friend_kind),
        "mood": rng.choice(_PARTS["moods"]),
        "weather": rng.choice(_PARTS["weathers"]),
        "time": rng.choice(_PARTS["times_of_day"]),
    }
    beats = [choose(rng, beat) for beat in _PARTS["openings"]]
    beats += [choose(rng, beat) for beat in rng.choice(_PARTS["plots"])]
    beats += [choose(rng, beat) for beat in _PARTS["endings"]]
    sentences = [beat.format(**slots) for beat in beats if beat]
    cut = rng.randint(3, 5)
    if rng.random() < 0.5:
        return " ".join(sentences[:cut]) + "\n\n" + " ".join(sentences[cut:])
    return " ".join(sentences)


def ask_for_story(rng: Random) -> Exchange:
    """Return a request for a story, a thought, and the story."""
    style = rng.random()
    kind = rng.choice(_PARTS["animals"] if rng.random() < 0.65 else _PARTS["people"])
    name, place, thing = rng.choice(FIRST_NAMES), rng.choice(_PARTS["places"]), rng.choice(_PARTS["things"])
    start = rng.choice(_PARTS["requests"])
    end = "?" if start.startswith("Can") else rng.choice([".", "", "."])
    hero = article(kind)
    if style < 0.45:
        return f"{start} about {hero}{end}", f"A short story about {hero}.", tell(rng, kind)
    if style < 0.6:
        return (
            f"{start} about {hero} named {name}{end}",
            f"A short story about {name}, {hero}.",
            tell(rng, kind, name),
        )
    if style < 0.72:
        subject = f"{hero} and {article(thing)}"
        return (
            f"{start} about {subject}{end}",
            f"A short story about {subject}.",
            tell(rng, kind, thing=thing),
        )
    if style < 0.82:
        subject = f"{hero} in the {place}"
        return (
            f"{start} about {subject}{end}",
            f"A short story about {subject}.",
            tell(rng, kind, place=place),
        )
    if style < 0.9:
        return start + end, f"A short story about {hero}.", tell(rng, kind)
    return f"{start} about {name}{end}", f"A short story about {name}.", tell(rng, name=name)


def ask_for_poem(rng: Random) -> Exchange:
    """Return a request for a poem, a thought, and four lines that rhyme."""
    (first, rhyme), (second, second_rhyme) = (rng.choice(list(RHYMES.items())) for _ in range(2))
    place = rng.choice(_PARTS["places"])
    request = rng.choice(
        [
            "Write a poem.",
            "Write a short poem.",
            f"Write a poem about a {place}.",
            "Tell me a poem.",
            "Can you write a short poem?",
        ]
    )
    if rng.random() < 0.5:
        poem = (
            f"I walked beside the {place} and saw a {first},\nand after that I saw a {rhyme}.\n"
            f"The evening came, I thought of {second},\nand all was well with {second_rhyme}."
        )
    else:
        poem = (
            f"The {place} is quiet, the wind is low,\nthe lamps are lit, the evening is slow.\n"
            f"I think of the {first}, I think of the {rhyme},\nand go to sleep as the stars go by."
        )
    return request, "Four short lines with rhymes.", poem
