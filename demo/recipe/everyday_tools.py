"""The hand-written tools: weather, calculator, mail, files, lights and some thirty others.

data/everyday_tools.json holds what each tool says: variants of its name and description, parameters,
requests, answers. The functions below draw the values that fill those wordings (their slots). A tool serves
one split: six of them are kept for `dev` and `test` and are never trained on. Results are invented, so
answers agree with the result shown and with nothing else.

    tool = EverydayTool(rng, rng.choice(EVERYDAY_TOOLS["train"]), "train"); tool.use(rng, "train")
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import values
from data_files import choose, read_json
from vocabulary import SPARE_PREFIXES, SPLITS, article, made_up_word, pick, spell_identifier

Slots = dict[str, Any]
_LISTS = read_json("values.json")


@dataclass(frozen=True)
class ToolUse:
    """One request to a tool, the call that meets it, what the tool answers, how the assistant reports it."""

    request: str
    arguments: dict[str, Any]
    thought: str
    result: str
    answer: str


@dataclass(frozen=True)
class EverydaySpec:
    """What one entry of data/everyday_tools.json says, with the function that draws its slots."""

    key: str
    names: list[str]
    descriptions: list[str]
    parameters: list[dict[str, Any]]
    requests: list[str]
    suffixes: dict[str, Any]
    answers: list[str]
    thought: str
    draw_slots: Callable[[Random], Slots]


class EverydayTool:
    """A hand-written tool under one of its names; now and then renamed, so that the schema has to be read."""

    def __init__(self, rng: Random, spec: EverydaySpec, split: str = "train"):
        self.spec = spec
        self.name = rng.choice(spec.names)
        self.parameter_names = [rng.choice(parameter["names"]) for parameter in spec.parameters]
        self.description = rng.choice(spec.descriptions)
        if rng.random() < 0.12:
            prefix = [] if rng.random() < 0.6 else [rng.choice(SPARE_PREFIXES)]
            self.name = spell_identifier(rng, prefix + self.name.split("_"))
        if split == "train" and rng.random() < 0.3:
            self._rename(rng, split)

    def _rename(self, rng: Random, split: str) -> None:
        """Give the parameters, and mostly the tool too, names that say little, so that the schema counts."""
        renamed = []
        for name in self.parameter_names:
            if rng.random() >= 0.5:
                words = [pick(rng, "word", split)]
                name = spell_identifier(rng, words + ([name] if rng.random() < 0.5 else []))
            renamed.append(name)
        if len(set(renamed)) < len(renamed):
            renamed = [f"{name}{i}" for i, name in enumerate(renamed)]
        self.parameter_names = renamed
        if rng.random() < 0.6:
            words = [pick(rng, "word", split)]
            self.name = spell_identifier(rng, words + (self.name.split("_") if rng.random() < 0.6 else []))

    def schema(self) -> dict[str, Any]:
        """Return the tool as a chat request lists it (OpenAI form)."""
        properties = {
            name: {"type": parameter.get("type", "string"), "description": parameter["description"]}
            for name, parameter in zip(self.parameter_names, self.spec.parameters, strict=True)
        }
        required = [
            name
            for name, parameter in zip(self.parameter_names, self.spec.parameters, strict=True)
            if not parameter.get("optional")
        ]
        parameters = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def use(self, rng: Random, split: str) -> ToolUse:
        """Draw a request to this tool with everything that follows from it."""
        spec, slots = self.spec, self.spec.draw_slots(rng)
        request = rng.choice(spec.requests).format(**slots)
        if spec.suffixes and slots[spec.suffixes["when"]] is not None:
            request = request.rstrip("?.") + rng.choice(spec.suffixes["texts"]).format(**slots)
        answer = choose(rng, spec.answers).format(**slots)
        texts = [request, result_text(slots["result"]), answer, spec.thought.format(**slots)]
        arguments = [slots[parameter["value"]] for parameter in spec.parameters]
        if split == "train":
            _replace_values(rng, arguments, texts)
        pairs = zip(self.parameter_names, arguments, strict=True)
        given = {name: value for name, value in pairs if value is not None}
        request, result, answer, thought = texts
        return ToolUse(request, given, thought, result, answer)


def result_text(result: Any) -> str:
    """Return a tool's result as the tool would send it: text as it is, anything else as JSON."""
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def _replace_values(rng: Random, arguments: list[Any], texts: list[str]) -> None:
    """Put made-up words in the place of some values, in place: values are to be copied, not remembered."""
    for i, value in enumerate(arguments):
        if not isinstance(value, str) or not value.replace(" ", "").isalpha() or len(value) <= 3:
            continue
        if value not in texts[0] or rng.random() >= 0.3:
            continue
        word = made_up_word(rng) if value[0].islower() else made_up_word(rng).title()
        if rng.random() >= 0.7:
            word += " " + pick(rng, "word", "train")
        texts[:] = [text.replace(value, word) for text in texts]
        arguments[i] = word


# --- slots: the values of one use, drawn by the key of the tool ---


def _weather(rng: Random) -> Slots:
    city, degrees, condition = rng.choice(values.CITIES), rng.randint(-10, 38), rng.choice(_LISTS["weather"])
    unit = rng.choice(["celsius", "fahrenheit", None, None])
    result = {"temperature": degrees, "condition": condition}
    return {"city": city, "degrees": degrees, "condition": condition, "unit": unit, "result": result}


def _calculator(rng: Random) -> Slots:
    a, b, operator = values.number(rng), values.number(rng), rng.choice("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    words = {"+": ["plus", "added to"], "-": ["minus"], "*": ["times", "multiplied by"]}[operator]
    return {
        "a": a,
        "b": b,
        "expression": f"{a} {operator} {b}",
        "word": rng.choice(words),
        "other_word": rng.choice(words),
        "value": value,
        "result": str(value),
    }


def _read_file(rng: Random) -> Slots:
    path, text = values.path(rng), values.some_words(rng, 3, 6)
    return {"path": path, "text": text, "result": text}


def _write_file(rng: Random) -> Slots:
    return {"path": values.path(rng), "text": values.some_words(rng, 2, 5), "result": "ok"}


def _list_files(rng: Random) -> Slots:
    folders = values.FOLDERS
    folder = rng.choice(
        [
            rng.choice(folders),
            "/" + rng.choice(folders) + "/" + rng.choice(folders),
            rng.choice(folders) + "/" + rng.choice(values.ADJECTIVES),
        ]
    )
    names, ends = values.FILE_SUBJECTS, values.FILE_EXTENSIONS
    files = [rng.choice(names) + "." + rng.choice(ends) for _ in range(rng.randint(1, 4))]
    return {"folder": folder, "listing": ", ".join(files), "result": files}


def _units(rng: Random) -> Slots:
    amount = values.number(rng)
    source, target = rng.choice(_LISTS["unit_pairs"])
    value = round(amount * rng.uniform(0.3, 4), 2)
    return {"amount": amount, "source": source, "target": target, "value": value, "result": str(value)}


def _currency(rng: Random) -> Slots:
    amount, names = values.number(rng), _LISTS["currencies"]
    source, target = rng.sample(list(names), 2)
    value = round(amount * rng.uniform(0.2, 9), 2)
    return {
        "amount": amount,
        "source": source,
        "target": target,
        "source_name": names[source],
        "target_name": names[target],
        "value": value,
        "result": {"amount": value, "currency": target},
    }


def _calendar(rng: Random) -> Slots:
    event, date, time = rng.choice(values.EVENTS), values.date(rng), values.clock_time(rng)
    title = event + (f" with {rng.choice(values.FIRST_NAMES)}" if rng.random() < 0.5 else "")
    result = {"status": "created", "id": rng.randint(100, 9999)}
    return {"title": title, "date": date, "time": time, "result": result}


def _reminder(rng: Random) -> Slots:
    return {"task": rng.choice(values.TASKS), "time": values.clock_time(rng), "result": "ok"}


def _email(rng: Random) -> Slots:
    name = rng.choice(values.FIRST_NAMES).lower()
    host = rng.choice(["example.com", "mail.test", "work.example"])
    digits = str(rng.randint(1, 99)) if rng.random() < 0.4 else ""
    subject, text = rng.choice(values.EVENTS), f"Please {rng.choice(values.TASKS)}."
    return {"address": f"{name}{digits}@{host}", "subject": subject, "text": text, "result": "sent"}


def _web_search(rng: Random) -> Slots:
    topic, count = rng.choice(values.TOPICS), rng.choice([None, None, 3, 5, 10])
    return {"topic": topic, "count": count, "result": [{"title": "All about " + topic}]}


def _translation(rng: Random) -> Slots:
    text, language = values.some_words(rng, 1, 4), rng.choice(values.LANGUAGES)
    translation = " ".join(word[::-1] for word in text.split())  # no real language: words turned round
    return {"text": text, "language": language, "translation": translation, "result": translation}


def _clock(rng: Random) -> Slots:
    city, time = rng.choice(values.CITIES), values.clock_time(rng)
    return {"city": city, "time": time, "result": time}


def _shopping_list(rng: Random) -> Slots:
    return {"item": rng.choice(_LISTS["shopping_items"]), "count": rng.randint(1, 24), "result": "ok"}


def _shell(rng: Random) -> Slots:
    command, output = values.shell_command(rng), " ".join(rng.sample(values.OBJECT_WORDS, 3))
    return {"command": command, "output": output, "result": output}


def _user_profile(rng: Random) -> Slots:
    user_id, name = rng.randint(1, 99999), rng.choice(values.FIRST_NAMES)
    return {"id": user_id, "name": name, "result": {"id": user_id, "name": name}}


def _light(rng: Random) -> Slots:
    return {"room": rng.choice(_LISTS["rooms"]), "state": rng.choice(["on", "off"]), "result": "ok"}


def _timer(rng: Random) -> Slots:
    return {"minutes": rng.randint(1, 120), "result": "ok"}


def _text_message(rng: Random) -> Slots:
    return {"phone": values.phone(rng), "text": f"Please {rng.choice(values.TASKS)}.", "result": "sent"}


def _news(rng: Random) -> Slots:
    topic = rng.choice(values.TOPICS)
    return {"topic": topic, "result": {"headline": f"New discovery about {topic}"}}


def _note(rng: Random) -> Slots:
    title = rng.choice(values.ADJECTIVES) + " " + rng.choice(values.FILE_SUBJECTS)
    return {"title": title, "text": rng.choice(values.TASKS), "result": {"id": rng.randint(1, 999)}}


def _delete_file(rng: Random) -> Slots:
    return {"path": values.path(rng), "result": "deleted"}


def _database(rng: Random) -> Slots:
    query, rows = values.sql(rng), rng.randint(0, 500)
    return {"query": query, "rows": rows, "result": {"rows": rows}}


def _web_page(rng: Random) -> Slots:
    url, status = values.url(rng), rng.choice([200, 200, 200, 404, 301])
    return {"url": url, "status": status, "result": {"status": status}}


def _edit_file(rng: Random) -> Slots:
    path, (old, new) = values.path(rng), rng.sample(values.OBJECT_WORDS, 2)
    return {"path": path, "old": old, "new": new, "result": {"replaced": rng.randint(1, 9)}}


def _heating(rng: Random) -> Slots:
    return {"room": rng.choice(_LISTS["heated_rooms"]), "degrees": rng.randint(15, 26), "result": "ok"}


def _python(rng: Random) -> Slots:
    code, output = values.source_code(rng), str(rng.randint(0, 99))
    return {"code": code, "output": output, "result": output}


def _forecast(rng: Random) -> Slots:
    city, days, high = rng.choice(values.CITIES), rng.randint(2, 10), rng.randint(0, 30)
    return {
        "city": city,
        "days": days,
        "high": high,
        "result": {"high": high, "low": high - rng.randint(3, 9)},
    }


def _random_number(rng: Random) -> Slots:
    low = rng.randint(0, 20)
    high = low + rng.randint(5, 500)
    value = rng.randint(low, high)
    return {"low": low, "high": high, "value": value, "result": str(value)}


def _restaurant(rng: Random) -> Slots:
    city, cuisine = rng.choice(values.CITIES), rng.choice(_LISTS["cuisines"])
    return {"city": city, "cuisine": cuisine, "a_cuisine": article(cuisine), "result": {"name": "Blue Door"}}


def _share_price(rng: Random) -> Slots:
    symbol = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(3, 4)))
    return {"symbol": symbol, "result": {"price": rng.randint(5, 900)}}


def _flight(rng: Random) -> Slots:
    origin, destination = rng.sample(values.CITIES, 2)
    date, booking = values.date(rng), values.code(rng)
    return {"origin": origin, "destination": destination, "date": date, "result": {"booking": booking}}


def _music(rng: Random) -> Slots:
    song = rng.choice(values.ADJECTIVES).title() + " " + rng.choice(values.OBJECT_WORDS).title()
    return {"song": song, "artist": rng.choice(values.FIRST_NAMES), "result": "playing"}


def _dictionary(rng: Random) -> Slots:
    return {"word": rng.choice(values.OBJECT_WORDS), "result": {"definition": "a thing"}}


def _parcel(rng: Random) -> Slots:
    return {"code": values.code(rng), "result": {"status": "in transit"}}


def _load_specs() -> dict[str, list[EverydaySpec]]:
    """Read data/everyday_tools.json; the function that draws the slots of tool `weather` is `_weather`."""
    tools: dict[str, list[EverydaySpec]] = {split: [] for split in SPLITS}
    for key, entry in read_json("everyday_tools.json").items():
        fields = {name: value for name, value in entry.items() if name != "split"}
        spec = EverydaySpec(key=key, draw_slots=globals()["_" + key], **{"suffixes": {}, **fields})
        tools[entry["split"]].append(spec)
    return tools


EVERYDAY_TOOLS: dict[str, list[EverydaySpec]] = _load_specs()
