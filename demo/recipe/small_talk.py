"""Talk without tools: greetings, simple questions, sums, facts, stories.

`plain` draws one exchange of any sort. The wordings are in data/small_talk.json and data/questions.txt,
written for the demo model; nothing is taken from another model or data set. Every answer is short, and what
the model cannot know it is taught to decline.

    python small_talk.py --count 20            print some
"""

import argparse
from random import Random

from data_files import read_json, read_lines
from exercises import arithmetic, unit_conversion, word_problem, word_task
from general_knowledge import fact, passage
from stories import Exchange, ask_for_poem, ask_for_story
from values import FIRST_NAMES

_TEXTS = read_json("small_talk.json")
_QUESTIONS = [line.split("|") for line in read_lines("questions.txt")]


def greet(rng: Random) -> Exchange:
    """Return a courtesy: hello, thanks, goodbye, who are you, a favourite thing, a name, a joke."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(_TEXTS["greetings"]), "The user greets me.", rng.choice(_TEXTS["greeting_answers"])
    if kind < 0.42:
        return (
            rng.choice(_TEXTS["how_are_you"]),
            "The user asks how I am.",
            rng.choice(_TEXTS["well_being_answers"]),
        )
    if kind < 0.65:
        return (
            rng.choice(_TEXTS["who_are_you"]),
            "The user asks who I am.",
            rng.choice(_TEXTS["self_descriptions"]),
        )
    if kind < 0.72:
        return rng.choice(_TEXTS["thanks"]), "The user thanks me.", rng.choice(_TEXTS["thanks_answers"])
    if kind < 0.78:
        return rng.choice(_TEXTS["goodbyes"]), "The user says goodbye.", rng.choice(_TEXTS["goodbye_answers"])
    if kind < 0.88:
        thing = rng.choice(list(_TEXTS["favourites"]))
        request = rng.choice(_TEXTS["favourite_questions"]).format(thing=thing)
        return request, f"The user asks for my favourite {thing}.", rng.choice(_TEXTS["favourites"][thing])
    if kind < 0.93:
        name = rng.choice(FIRST_NAMES)
        request = rng.choice(_TEXTS["introductions"]).format(name=name)
        return (
            request,
            f"The user is called {name}.",
            rng.choice(_TEXTS["introduction_answers"]).format(name=name),
        )
    return rng.choice(_TEXTS["joke_requests"]), "A short joke.", rng.choice(_TEXTS["jokes"])


def decline_topic(rng: Random) -> Exchange:
    """Return a question that is too hard for the model, and an answer that says so."""
    topic = rng.choice(_TEXTS["unknown_topics"])
    request = rng.choice(_TEXTS["unknown_questions"]).format(topic=topic)
    return (
        request,
        f"I do not know enough about {topic}.",
        rng.choice(_TEXTS["unknown_answers"]).format(topic=topic),
    )


def simple_question(rng: Random) -> Exchange:
    """Return one of the written questions, some in lower case, without their mark or with an opening."""
    question, answer = rng.choice(_QUESTIONS)
    kind = rng.random()
    if kind < 0.12:
        question = question.lower()
    elif kind < 0.2:
        question = question.rstrip("?.!")
    elif kind < 0.27 and question.endswith("?"):
        question = rng.choice(_TEXTS["question_openings"]) + question
    return (
        question,
        rng.choice(["I know this.", "A simple question.", "I answer in one or two sentences."]),
        answer,
    )


_SHARES = {
    greet: 0.2,
    simple_question: 0.2,
    arithmetic: 0.12,
    word_problem: 0.04,
    unit_conversion: 0.04,
    word_task: 0.13,
    fact: 0.12,
    passage: 0.05,
    ask_for_story: 0.12,
    ask_for_poem: 0.01,
    decline_topic: 0.03,
}


def plain(rng: Random) -> Exchange:
    """Return one exchange: the request, what the assistant thinks, its answer."""
    make = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    request, thought, answer = make(rng)
    return request, thought or "I know this.", answer


def main() -> None:
    """Print exchanges."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()
    rng = Random(args.seed)
    for _ in range(args.count):
        request, thought, answer = plain(rng)
        print(f"user: {request}\nthought: {thought}\nassistant: {answer}\n")


if __name__ == "__main__":
    main()
