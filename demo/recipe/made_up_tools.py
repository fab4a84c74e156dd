"""Tools made up on the spot from a verb, a noun and a few kinds of parameters, with requests to use them.

`archive_parcel(parcel_id, urgent)` is such a tool. They are endless, so a model trained on them must read the
schema; an eighth of them have a name that says nothing at all. A request names the values under a label close
to, but not always equal to, the parameter's name, in one of a dozen forms.

    tool = MadeUpTool(rng, "train"); tool.use(rng, "train").request
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import values
from everyday_tools import ToolUse
from sentences import free_text
from vocabulary import article, made_up_word, person, pick, pick_words, spell_identifier

LEVELS = ["low", "medium", "high"]


@dataclass(frozen=True)
class ParameterKind:
    """A family of parameters. `{n}` in names and descriptions is the tool's noun; no names: made up."""

    names: list[str]
    labels: list[str]  # what a request may call it, beside its name
    type: str  # of JSON schema
    descriptions: list[str]
    make: Callable[[Random, str], Any]
    weight: int
    choices: str = ""  # "levels": low, medium or high; "words": three words of the pool
    item_type: str = ""  # of an array


@dataclass(frozen=True)
class Parameter:
    """One parameter of a made-up tool."""

    name: str
    label: str
    kind: ParameterKind
    description: str
    required: bool
    choices: list[str]

    def draw(self, rng: Random, split: str) -> Any:
        """Return a value for it."""
        return rng.choice(self.choices) if self.choices else self.kind.make(rng, split)


def _price(rng: Random, split: str) -> float:
    if rng.random() < 0.7:
        return _rounded(rng, 0.5, 999, [0, 1, 2])
    return rng.randint(1, 5000)


def _signed_number(rng: Random, split: str) -> float:
    sign = rng.choice([-1, 1, 1])
    return sign * _rounded(rng, 0, 90, [1, 2, 4])


def _rounded(rng: Random, low: float, high: float, places: list[int]) -> float:
    return round(rng.uniform(low, high), rng.choice(places))


def _email(rng: Random, split: str) -> str:
    name = pick(rng, "name", split).lower() + rng.choice(["", ".", "_"]) + pick(rng, "word", split)
    return name + "@" + rng.choice(["example.com", "mail.test", "work.example"])


def _word_list(rng: Random, split: str) -> list[str]:
    return [pick(rng, "word", split) for _ in range(rng.randint(1, 5))]


def _number_list(rng: Random, split: str) -> list[int]:
    return [rng.randint(0, 999) for _ in range(rng.randint(1, 5))]


def _json_object(rng: Random, split: str, nested: bool = True) -> dict[str, Any]:
    """Return a small object: numbers, words, booleans, a list of numbers or one object inside."""
    content: dict[str, Any] = {}
    for _ in range(rng.randint(1, 3)):
        key, kind = pick(rng, "word", split), rng.random()
        if kind < 0.3:
            content[key] = rng.randint(0, 999)
        elif kind < 0.6:
            content[key] = pick(rng, "word", split)
        elif kind < 0.75:
            content[key] = rng.random() < 0.5
        elif kind < 0.85 or not nested:
            content[key] = [rng.randint(0, 99) for _ in range(rng.randint(1, 3))]
        else:
            content[key] = _json_object(rng, split, nested=False)
    return content


def _command(rng: Random, split: str) -> str:
    return rng.choice(
        [
            "ls -la " + values.path(rng),
            'git commit -m "' + pick_words(rng, split, 2, 4) + '"',
            "cargo build --release",
            "grep -n '" + pick(rng, "word", split) + "' " + values.path(rng),
            "cat " + values.path(rng) + " | wc -l",
            "make " + pick(rng, "word", split),
            "tar -xzf " + pick(rng, "word", split) + ".tar.gz",
        ]
    )


def _any_words(rng: Random, split: str) -> str:
    return pick_words(rng, split, 1, 3) if rng.random() < 0.8 else made_up_word(rng) + str(rng.randint(1, 99))


def _kind(
    names: str,
    labels: str,
    type_: str,
    descriptions: str,
    make: Callable[[Random, str], Any],
    weight: int,
    choices: str = "",
    item_type: str = "",
) -> ParameterKind:
    """Build a kind from texts with `|` between the variants."""
    variants = (_variants(names), _variants(labels), type_, _variants(descriptions))
    return ParameterKind(*variants, make, weight, choices, item_type)


def _variants(text: str) -> list[str]:
    return text.split("|") if text else []


KINDS = [
    _kind("id|{n}_id|record_id|number", "id|number", "integer", "Id of the {n}|Number",
          lambda rng, _: values.any_size_number(rng), 3),
    _kind("code|{n}_code|reference|ref|key", "code|reference", "string", "Code of the {n}|Reference",
          lambda rng, _: values.code(rng), 3),
    _kind("quantity|count|amount|num|limit|max_results", "quantity|amount|limit", "integer",
          "How many|Number of items", lambda rng, _: rng.randint(1, 500), 3),
    _kind("price|budget|rate|weight|length|max_price", "price|budget|weight|length", "number",
          "Price in euros|Value", _price, 2),
    _kind("temperature|offset|latitude|delta|balance", "temperature|offset|value", "number",
          "A number, may be negative", _signed_number, 1),
    _kind("date|day|start_date|due_date|deadline", "date|day", "string", "Date as YYYY-MM-DD|The day",
          lambda rng, _: values.date(rng), 3),
    _kind("time|start_time|at", "time", "string", "Time as HH:MM", lambda rng, _: values.clock_time(rng), 2),
    _kind("name|full_name|owner|customer|contact|assignee", "name|owner|contact", "string",
          "Name of the person|Who it is for", person, 4),
    _kind("city|location|destination|place", "city|place|destination", "string", "The city|Place",
          lambda rng, split: pick(rng, "city", split), 3),
    _kind("email|address|recipient", "email|address", "string", "Email address", _email, 2),
    _kind("title|subject|label|topic|name", "title|subject|label|topic", "string",
          "Title of the {n}|Short title", lambda rng, split: pick_words(rng, split, 1, 4), 4),
    _kind("message|text|note|description|comment|content|body", "message|text|note|comment", "string",
          "The text|Text to store|Free text", lambda rng, _: free_text(rng), 5),
    _kind("tags|items|names|values|labels|keywords", "tags|items|names|keywords", "array",
          "List of words|The items", _word_list, 3, item_type="string"),
    _kind("ids|numbers|pages|sizes", "ids|numbers|pages", "array", "List of numbers", _number_list, 1,
          item_type="integer"),
    _kind("enabled|notify|active|urgent|dry_run|recursive|public|verbose", "", "boolean", "true or false",
          lambda rng, _: rng.random() < 0.5, 4),
    _kind("options|settings|metadata|config|data|payload|filters", "options|settings|data|payload", "object",
          "A JSON object|Settings", _json_object, 3),
    _kind("path|file|filename|file_path|target", "file|path", "string", "Path of the file|File name",
          lambda rng, _: values.path(rng), 3),
    _kind("url|link|endpoint", "url|link", "string", "The address", lambda rng, _: values.url(rng), 2),
    _kind("priority|level", "priority|level", "string", "low, medium or high",
          lambda rng, _: rng.choice(LEVELS), 2, choices="levels"),
    _kind("color|colour", "colour", "string", "The colour", lambda rng, _: rng.choice(values.COLOURS), 1),
    _kind("language|lang", "language", "string", "Name of the language",
          lambda rng, _: rng.choice(values.LANGUAGES), 1),
    _kind("size|format|mode|unit", "size|format|mode", "string", "One of the values",
          lambda rng, split: pick(rng, "word", split), 2, choices="words"),
    _kind("code|script|source|snippet", "code|script", "string", "Source code",
          lambda rng, _: values.source_code(rng), 3),
    _kind("query|sql|statement", "query|statement", "string", "The query", lambda rng, _: values.sql(rng), 1),
    _kind("command|cmd", "command", "string", "Shell command", _command, 2),
    _kind("phone|phone_number", "phone number|phone", "string", "Phone number",
          lambda rng, _: values.phone(rng), 1),
    _kind("", "", "string", "", _any_words, 6),
]  # fmt: skip
_WEIGHTS = [kind.weight for kind in KINDS]


class MadeUpTool:
    """A tool that does `verb` to `noun`; `small` makes it short, for prompts with many tools."""

    def __init__(self, rng: Random, split: str, verb: str = "", noun: str = "", small: bool = False):
        self.verb = verb or pick(rng, "verb", split)
        self.noun = (noun or pick(rng, "noun", split)).replace("_", " ")
        self.is_opaque = rng.random() < 0.12
        self.name = spell_identifier(rng, self._name_words(rng, split))
        self.parameters = self._draw_parameters(rng, split, small)
        verb_title = self.verb.title()
        self.description = rng.choice(
            [
                f"{verb_title} {article(self.noun)}",
                f"{verb_title} the {self.noun}",
                f"{verb_title}s {article(self.noun)} in the system",
                f"Use this to {self.verb} {article(self.noun)}",
                f"{verb_title} {article(self.noun)} and return the result",
            ]
        ) + rng.choice(["", "."])

    @property
    def plain_name(self) -> str:
        """The name that says what the tool does."""
        return self.verb + "_" + self.noun.replace(" ", "_")

    def _name_words(self, rng: Random, split: str) -> list[str]:
        words = [self.verb, self.noun]
        if rng.random() >= 0.75:
            words = [pick(rng, "word", split), *words] if rng.random() < 0.5 else [self.noun, self.verb]
        if self.is_opaque:
            if rng.random() < 0.5:
                return [made_up_word(rng)]
            return [pick(rng, "word", split), pick(rng, "word", split)]
        return words

    def _draw_parameters(self, rng: Random, split: str, small: bool) -> list[Parameter]:
        """Draw up to four parameters with different names and labels, required ones first."""
        count = rng.choice([0, 1, 1, 2] if small else [1, 1, 2, 2, 3, 4])
        parameters: list[Parameter] = []
        for kind in rng.choices(KINDS, _WEIGHTS, k=count * 2):
            if len(parameters) == count:
                break
            name, label, description = self._name_parameter(rng, split, kind)
            if rng.random() < 0.15:
                name = spell_identifier(rng, name.split("_"))
            if any(name == other.name or label == other.label for other in parameters):
                continue
            required = rng.random() < 0.75
            choices = LEVELS if kind.choices == "levels" else []
            if kind.choices == "words":
                choices = sorted({pick(rng, "word", split) for _ in range(3)})
            parameters.append(Parameter(name, label, kind, description, required, choices))
        return sorted(parameters, key=lambda parameter: not parameter.required)

    def _name_parameter(self, rng: Random, split: str, kind: ParameterKind) -> tuple[str, str, str]:
        """Return name, label and description of a parameter of this kind."""
        if not kind.names:
            name = pick(rng, "word", split) if rng.random() < 0.8 else made_up_word(rng)
            return name, name, rng.choice([f"The {name}", f"Value of {name}", f"{name.title()} to use", ""])
        name = rng.choice(kind.names).format(n=self.noun.replace(" ", "_"))
        label = rng.choice(kind.labels) if kind.labels else name.replace("_", " ")
        description = rng.choice(kind.descriptions).format(n=self.noun)
        if rng.random() < 0.15 and kind.labels:
            name = pick(rng, "word", split) + "_" + name
            label = name.replace("_", " ")
        elif rng.random() < 0.5:
            label = name.replace("_", " ")
        return name, label, description

    def schema(self) -> dict[str, Any]:
        """Return the tool as a chat request lists it (OpenAI form)."""
        properties: dict[str, Any] = {}
        for parameter in self.parameters:
            entry: dict[str, Any] = {"type": parameter.kind.type}
            if parameter.description:
                entry["description"] = parameter.description
            if parameter.choices:
                entry["enum"] = parameter.choices
            if parameter.kind.item_type:
                entry["items"] = {"type": parameter.kind.item_type}
            properties[parameter.name] = entry
        required = [parameter.name for parameter in self.parameters if parameter.required]
        parameters = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def use(self, rng: Random, split: str) -> ToolUse:
        """Draw a request to this tool with everything that follows from it."""
        arguments: dict[str, Any] = {}
        given: list[Parameter] = []
        for parameter in self.parameters:
            if parameter.required or rng.random() < 0.5:
                arguments[parameter.name] = parameter.draw(rng, split)
                given.append(parameter)
        request = write_request(rng, self, given, arguments)
        result, answer = self.draw_result(rng, split)
        return ToolUse(request, arguments, f"The user wants to {self.verb} a {self.noun}.", result, answer)

    def draw_result(self, rng: Random, split: str) -> tuple[str, str]:
        """Return what the tool answers, one word or a JSON object, and the assistant's report of it."""
        if rng.random() < 0.3:
            word = rng.choice(["ok", "done", "success", "true", "accepted"])
            reports = [
                f"Done. I asked to {self.verb} the {self.noun} and the result is: {word}.",
                "Done.",
                f"That worked. The request to {self.verb} the {self.noun} went through.",
                f"The {self.noun} request is complete.",
            ]
            return word, rng.choice(reports)
        keys = [
            "status",
            "id",
            "total",
            "price",
            "name",
            "state",
            "count",
            "date",
            "city",
            "owner",
            "message",
            "result",
            "progress",
            "value",
        ]
        keys = rng.sample(keys + [pick(rng, "word", split) for _ in range(3)], rng.randint(1, 3))
        result = {key: _draw_result_value(rng, split, key) for key in keys}
        facts = [f"the {key} is {value}" for key, value in result.items()]
        said = facts[0] if len(facts) == 1 else ", ".join(facts[:-1]) + " and " + facts[-1]
        capital = said[0].upper() + said[1:]
        reports = [f"Done. {capital}.", f"{capital}.", f"The tool says that {said}.", f"I did it: {said}."]
        return json.dumps(result, ensure_ascii=False), rng.choice(reports)


def _draw_result_value(rng: Random, split: str, key: str) -> Any:
    if key in ("status", "state"):
        return rng.choice(["ok", "ready", "done", "pending", "active"])
    if key in ("id", "total", "count", "value", "progress"):
        return values.any_size_number(rng)
    if key == "price":
        return round(rng.uniform(1, 500), 2)
    if key in ("name", "owner"):
        return person(rng, split)
    if key == "date":
        return values.date(rng)
    return pick(rng, "city", split) if key == "city" else pick_words(rng, split, 1, 3)


# --- how people ask ---


def show_value(rng: Random, value: Any) -> str:
    """Write a value as it stands in a request: plain, quoted, as JSON, or as a block of lines."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        items = [str(item) for item in value]
        if rng.random() < 0.4 or len(items) == 1:
            return json.dumps(value, ensure_ascii=False)
        return ", ".join(items[:-1]) + rng.choice([" and ", ", "]) + items[-1]
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return str(value)
    if "\n" in value:
        return f"\n```\n{value}\n```" if rng.random() < 0.6 else "\n" + value
    if value.count(" ") > 2 or not value[0].isalnum():  # long or odd: its ends must be visible
        if '"' not in value and rng.random() < 0.85:
            return f'"{value}"'
        return f"`{value}`" if "`" not in value else "\n" + value
    return f'"{value}"' if rng.random() < 0.25 and '"' not in value else value


def write_request(rng: Random, tool: MadeUpTool, given: list[Parameter], arguments: dict[str, Any]) -> str:
    """Write what a user says to have `tool` called with `arguments`; `given` are their parameters."""
    what = f"{tool.verb} {rng.choice(['the', article(tool.noun).split()[0], 'this'])} {tool.noun}"
    if not given:
        bare = [
            f"{what.capitalize()}.",
            f"Please {what}.",
            f"Can you {what}?",
            f"Call {tool.name}.",
            f"I want to {what}.",
        ]
        return rng.choice(bare)
    if rng.random() >= 0.7:
        given = rng.sample(given, len(given))
    given = sorted(given, key=lambda parameter: "\n" in str(arguments[parameter.name]))  # blocks come last
    shown = {parameter.name: show_value(rng, arguments[parameter.name]) for parameter in given}
    style = rng.random()
    if style < 0.14 or (tool.is_opaque and style < 0.5):
        return _request_by_name(rng, tool.name, shown)
    return _request_in_words(rng, what, given, shown, arguments)


def _request_by_name(rng: Random, name: str, shown: dict[str, str]) -> str:
    """`Use print_card with pages = 3 and name = Anna`: the tool and its parameters by their own names."""
    pairs = rng.choice(
        [
            " and ".join(f"{key} = {value}" for key, value in shown.items()),
            ", ".join(f"{key}: {value}" for key, value in shown.items()),
            ", ".join(f"{key} {value}" for key, value in shown.items()),
            " and ".join(f"{key} set to {value}" for key, value in shown.items()),
        ]
    )
    request = rng.choice(
        [
            f"Use {name} with {pairs}",
            f"Call {name} with {pairs}",
            f"Please run {name} with {pairs}",
            f"Call the tool {name}: {pairs}",
            f"{name} {pairs}",
        ]
    )
    return request + (rng.choice([".", ""]) if "\n" not in pairs else "")


def _phrase(rng: Random, label: str, value: str, is_boolean: bool) -> str:
    """One value with its label."""
    if is_boolean:
        return rng.choice([f"{label} {value}", f"{label} set to {value}", f"{label} = {value}"])
    if "\n" in value:
        return f"{label}:{value}"
    plain = f"{label} {value}"
    others = [f"the {plain}", f"{label}: {value}", f"{label} is {value}"]
    return rng.choice([plain, plain, plain, *others])


def _request_in_words(
    rng: Random, what: str, given: list[Parameter], shown: dict[str, str], arguments: dict[str, Any]
) -> str:
    """`Please print the card with pages 3 and the name Anna`: a sentence, a list or several sentences."""
    style = rng.random()
    phrases = [
        _phrase(rng, parameter.label, shown[parameter.name], isinstance(arguments[parameter.name], bool))
        for parameter in given
    ]
    *before, joined = phrases
    if before:
        joined = ", ".join(before) + rng.choice([" and ", ", "]) + joined
    start = rng.choice(
        [
            what.capitalize(),
            f"Please {what}",
            f"I need to {what}",
            f"Can you {what}",
            f"I would like to {what}",
            f"Could you {what}",
            f"Go ahead and {what}",
            f"Help me {what}",
            what,
        ]
    )
    if 0.62 <= style < 0.74:
        return f"{start}.\n" + "\n".join(f"{each.label.capitalize()}: {shown[each.name]}" for each in given)
    has_block = any("\n" in str(arguments[parameter.name]) for parameter in given)
    if style < 0.5 or (0.74 <= style < 0.86 and has_block):
        request = f"{start} with {joined}"
    elif style < 0.62:
        request = f"{start}, {joined}"
    elif style < 0.86:
        request = f"{start}. " + " ".join(f"The {each.label} is {shown[each.name]}." for each in given)
    elif style < 0.93:
        request = f"{joined[0].upper() + joined[1:]}: please {what}"
    else:
        request = f"{start} using {joined}"
    if "\n" in request or request.endswith((".", "?", "!")):
        return request
    return request + ("?" if start.startswith(("Can", "Could")) else rng.choice([".", ".", ""]))
