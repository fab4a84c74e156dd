"""Hold an answer to a form: calls of declared functions with arguments that fit their schemas, or JSON.

Grammars are llguidance's; what is ours is when they hold. Reasoning and text are free. Once a call begins, it goes in
steps, each with a small grammar: the function's name, then one parameter after the other in whatever order the model
likes, each at most once, and the end only when all required ones are there. A grammar of the whole call would need a
rule for every subset of the parameters. Values are what tool_schema.read_value reads: text where the schema says
string, JSON where it does not. Held to: type, enum, const, required, length and pattern of strings, and inside JSON
what llguidance knows of JSON Schema. Keywords it does not know are left out, and logged.

    grammars = Grammars(tokenizer, vocab_size)
    constraint = AnswerConstraint(grammars, starts_inside=True, tools=tools, choice="auto")
    engine.generate(prompt_ids, sampling, constraint=constraint)
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from moepack.layout.errors import UsageError
from moepack.runtime.answer import CALL, THINK, THINK_END
from moepack.runtime.tokenizer import Tokenizer
from moepack.runtime.tool_schema import PYTHON_CONSTANTS, Tool, allowed_types, find_schema, resolve

CALL_END = "</tool_call>"
VALUE_END = "\n</parameter>"
# As templates write JSON into a call; elsewhere the model may break lines, but not go on with blanks for ever.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ROOMY = {"whitespace_pattern": r"(\n[ \t]{0,16}| )?"}
MAX_LENGTH = 4096  # of a string whose length is held to: longer limits cost more than they help
MOST_GRAMMARS = 512  # kept compiled
MOST_LENIENT = 2
logger = logging.getLogger("moepack.serve")


class Grammars:
    """Compiled grammars over one tokenizer. Loading takes a second for a vocabulary of 250,000."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.stop_ids = np.array(sorted(id_ for id_ in tokenizer.stop_token_ids if id_ < vocab_size), np.intp)
        self._backend = llguidance.LLTokenizer(tokenizer.to_json(), vocab_size, self.stop_ids.tolist())
        self.call_id = tokenizer.find(CALL)
        self.compile = functools.lru_cache(MOST_GRAMMARS)(self._compile)

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        """The matcher of a grammar at its start, to be copied. Raises ValueError with the reason."""
        matcher = llguidance.LLMatcher(self._backend, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(" ".join(matcher.get_error().split()))
        return matcher

    def tag(self, text: str) -> str:
        """A tag in a grammar: the token itself where it is one that the library keeps apart from text."""
        token_id = self.tokenizer.find(text)
        is_apart = token_id is not None and self._backend.is_special_token(token_id)
        return f"<[{token_id}]>" if is_apart else _quote(text)

    @functools.cached_property
    def _ids_by_first(self) -> dict[int, NDArray[np.intp]]:
        firsts = [self.tokenizer.describe(id_)[1][:1] for id_ in range(self.tokenizer.vocab_size)]
        return {
            byte: np.array([i for i, first in enumerate(firsts) if first == bytes([byte])], np.intp) for byte in b">="
        }

    def starting_with(self, character: str) -> NDArray[np.intp]:
        """Ids of the tokens that begin with > or =."""
        return self._ids_by_first[ord(character)]


class AnswerConstraint:
    """What may come next in one answer.

    starts_inside   the prompt has opened the think block
    tools, choice   OpenAI's form; "auto", "none", "required", or the name of the function to call
    parallel        several calls may follow each other
    schema          of the answer as JSON, {} for any object; None leaves it free

    num_constrained   tokens so far that were chosen under a grammar
    holds_call        whether a call is being written that is held to its form to its end

    Raises UsageError if the schema is one that llguidance cannot hold an answer to.
    """

    def __init__(
        self,
        grammars: Grammars,
        starts_inside: bool,
        tools: Sequence[Tool] = (),
        choice: str = "auto",
        parallel: bool = True,
        schema: Mapping[str, Any] | None = None,
    ):
        self.num_constrained = 0
        self._grammars, self._tools, self._choice, self._schema = grammars, tools, choice, schema
        self._parallel = parallel and choice in ("auto", "required")
        self._must_call = bool(tools) and choice not in ("auto", "none")
        self._decoder = grammars.tokenizer.decoder()
        self._text = ""  # of the phase, or of the step of a call
        self._matcher: llguidance.LLMatcher | None = None
        self._may_stop = self._may_call = self._is_value = False
        self._function, self._given = "", set[str]()
        if schema is not None:
            try:
                grammars.compile(_json_grammar(schema))
            except ValueError as error:
                raise UsageError(f"response_format: this schema cannot be held to: {error}") from None
        self._phase = "reasoning"
        if not starts_inside:
            self._begin_answer("")

    def describe(self) -> str:
        """What the answer is held to, for people."""
        form = "json" if self._schema is not None else ""
        calls = f"tools:{self._choice}" if self._tools else ""
        return "+".join(filter(None, (calls, form)))

    @property
    def holds_call(self) -> bool:
        return self._phase == "call"

    def list_allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next, bool [V]; None if all may."""
        grammars = self._grammars
        if self._matcher is not None:
            allowed = self._list_matching(self._matcher)
            if self._may_stop and not self._text:
                allowed[grammars.stop_ids] = True
            if self._may_call and not self._text.strip("\n") and grammars.call_id is not None:
                allowed[grammars.call_id] = True
        elif self._phase == "done":
            allowed = np.zeros(grammars.vocab_size, np.bool_)
            allowed[grammars.stop_ids] = True
        elif self._phase == "reasoning" and (self._must_call or self._schema is not None):
            allowed = np.ones(grammars.vocab_size, np.bool_)
            allowed[grammars.stop_ids] = False  # an end in there would be an answer without what was asked for
        elif self._phase == "text" and self._choice == "none" and grammars.call_id is not None:
            allowed = np.ones(grammars.vocab_size, np.bool_)
            allowed[grammars.call_id] = False
        else:
            return None
        self.num_constrained += self._matcher is not None
        return allowed

    def push(self, token_id: int) -> None:
        """Take note of the token that was chosen."""
        text = self._decoder.push(token_id)
        if token_id in self._grammars.tokenizer.stop_token_ids:
            self._finish()
        elif self._matcher is not None:
            self._step(token_id, text)
        elif self._phase == "reasoning":
            self._text += text
            if THINK_END in self._text:
                self._begin_answer(self._text.partition(THINK_END)[2])
        elif self._phase == "text":
            self._text += text
            if self._text.lstrip() == THINK:
                self._phase, self._text = "reasoning", ""
            elif CALL in self._text and self._tools and self._choice != "none":
                self._begin_call(self._text.partition(CALL)[2])
            elif len(self._text) > 4 * len(CALL) and self._text.strip():
                self._text = self._text[-2 * len(CALL) :]

    # Phases

    def _begin_answer(self, rest: str) -> None:
        self._phase, self._text = "text", rest
        blank = "" if rest else r"/\n{0,2}/ "
        if self._must_call:
            self._start(blank + self._name_rule(self._grammars.tag(CALL)))
        elif self._schema is not None:
            self._start_matcher(self._grammars.compile(_json_grammar(self._schema)))
            self._may_call = bool(self._tools) and self._choice == "auto"

    def _begin_call(self, rest: str) -> None:
        """A call begins; rest is what came with the last character of its tag, usually nothing."""
        self._phase = "call"
        if rest.strip("\n"):  # never with a tokenizer that has the tag as a token: nothing to hold on to
            self._finish_free(f"{rest!r} follows {CALL}")
            return
        self._start(self._name_rule("", has_line="\n" in rest))

    def _step(self, token_id: int, text: str) -> None:
        matcher = self._matcher
        assert matcher is not None
        if self._may_call and token_id == self._grammars.call_id and not self._text.strip("\n"):
            self._matcher, self._may_call = None, False
            self._begin_call("")
            return
        self._text += text
        if not matcher.consume_token(token_id):
            self._finish_free(matcher.get_error())
        elif matcher.is_stopped():
            self._advance()

    def _advance(self) -> None:
        """The next step of a call, after one is complete."""
        text = self._text
        if self._phase != "call" and not self._must_call:  # JSON
            self._finish()
        elif name := _FUNCTION.search(text):
            self._phase, self._function, self._given = "call", name[1], set()
            self._begin_parameter()
        elif parameter := _PARAMETER.match(text):
            self._given.add(parameter[1])
            self._begin_parameter()
        elif self._parallel:
            self._start(self._name_rule(f'"\\n" {self._grammars.tag(CALL)}'))
            self._may_stop = True
        else:
            self._finish()

    def _begin_parameter(self, leniency: int = 0) -> None:
        schema = find_schema(self._function, self._tools)
        try:
            self._start(parameter_grammar(schema, self._given, self._grammars.tag(CALL_END), leniency))
            self._is_value = True
        except ValueError as error:
            if leniency == MOST_LENIENT:
                self._finish_free(str(error))
                return
            logger.warning("%s: its schema is not held to in full: %s", self._function, error)
            self._begin_parameter(leniency + 1)

    def _name_rule(self, call: str, has_line: bool = False) -> str:
        names = [tool.get("function", tool)["name"] for tool in self._tools]
        if self._choice in names:
            names = [self._choice]
        line = "" if has_line else "\\n"
        return f'{call} "{line}<function=" ({" | ".join(map(_quote, dict.fromkeys(names)))}) ">\\n"'

    def _start(self, grammar: str) -> None:
        self._start_matcher(self._grammars.compile(grammar if "start:" in grammar else f"start: {grammar}"))

    def _start_matcher(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher, self._text = matcher.deep_copy(), ""
        self._may_stop = self._is_value = False

    def _finish(self) -> None:
        self._phase, self._matcher, self._text = "done", None, ""

    def _finish_free(self, reason: str) -> None:
        logger.warning("the rest of an answer is not constrained: %s", reason)
        self._phase, self._matcher, self._text = "free", None, ""

    def _list_matching(self, matcher: llguidance.LLMatcher) -> NDArray[np.bool_]:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._grammars.vocab_size, bitorder="little").view(np.bool_)
        if self._is_value and ">\n" in self._text:
            # A value must not hold what the reader of answers takes for the end of it, or for the next call.
            for tag in ("</parameter>", "<parameter=", CALL):
                if self._text.endswith(tag[:-1]) and not self._text.endswith("\n</parameter"):
                    allowed[self._grammars.starting_with(tag[-1])] = False
        return allowed


_FUNCTION = re.compile(r"<function=([^>\n]+)>\n\Z")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n")


def parameter_grammar(schema: Mapping[str, Any], given: set[str], call_end: str, leniency: int = 0) -> str:
    """What may follow in a call: one of the parameters that are not given yet, or its end if none is lacking.

    schema     of the function's parameters
    call_end   </tool_call> as the grammar writes it
    leniency   1: JSON keywords that the library does not know are left out; 2: only types are held to
    """
    root = resolve(schema, schema)
    properties = {key: value for key, value in _as_dict(root.get("properties")).items() if is_writable(key)}
    required = [key for key in root.get("required") or () if isinstance(key, str) and is_writable(key)]
    properties |= {key: {} for key in required if key not in properties}
    steps, rules = [], []
    for number, (key, value) in enumerate(properties.items()):
        if key not in given:
            steps.append(f'"<parameter=" {_quote(key)} ">\\n" value{number} "\\n"')
            rules.append(_value_rule(f"value{number}", value, schema, leniency))
    if not properties and root.get("additionalProperties") is not False:
        steps.append(r'"<parameter=" /[A-Za-z_][A-Za-z0-9_.\-]{0,63}/ ">\n" value "\n"')
        rules.append(_value_rule("value", {}, schema, leniency))
    if given.issuperset(required):
        steps.append(f'"</function>\\n" {call_end}')
    return "\n".join([f"start: {' | '.join(steps)}", *rules])


def is_writable(name: object) -> bool:
    """Whether a name can stand in a tag."""
    return isinstance(name, str) and bool(name.strip()) and name == name.strip() and not re.search(r"[<>\n]", name)


def _value_rule(name: str, schema: Any, root: Mapping[str, Any], leniency: int) -> str:
    """The rule of a parameter's value with the tag that ends it."""
    schema = resolve(schema, root) if isinstance(schema, Mapping) else {}
    types = allowed_types(schema, dict(root))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and "string" in types:
        choices = [_quote(text) for value in values for text in _write(value) if "</parameter>" not in text]
        return f"{name}: ({' | '.join(choices)}) {_quote(VALUE_END)}"
    if "string" in types:
        text = _text_pattern(schema) if types == {"string"} and leniency < MOST_LENIENT else r"/(?s:.*)/"
        return f"{name}[suffix={_quote(VALUE_END)}]: TEXT_{name.upper()}\nTEXT_{name.upper()}: {text}"
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    settings = {**COMPACT, **({"lenient": True} if leniency == 1 else {})}
    body = {"type": sorted(types)} if leniency == MOST_LENIENT else {**definitions, **schema}
    constants = [_quote(text) for text, value in PYTHON_CONSTANTS.items() if _fits(value, types)]
    choices = [f"%json {json.dumps({**body, 'x-guidance': settings})}", *constants]
    return f"{name}: ({' | '.join(choices)}) {_quote(VALUE_END)}"


def _text_pattern(schema: Mapping[str, Any]) -> str:
    """Text of the length and pattern that a schema asks for, as a regular expression of the grammar."""
    least, most = schema.get("minLength"), schema.get("maxLength")
    least = least if isinstance(least, int) and 0 < least <= MAX_LENGTH else 0
    most = most if isinstance(most, int) and least <= most <= MAX_LENGTH else ""
    length = "*" if not least and most == "" else f"{{{least},{most}}}"
    text = f"/(?s:.{length})/"
    pattern = schema.get("pattern")
    if not isinstance(pattern, str):
        return text
    before = "" if pattern.startswith("^") else "(?s:.*)"
    after = "" if re.search(r"(?<!\\)(\\\\)*\$\Z", pattern) else "(?s:.*)"
    core = pattern.removeprefix("^")
    core = (core if after else core[:-1]).replace("/", r"\/").replace("\n", r"\n")
    return f"/{before}({core}){after}/" + (f" & {text}" if length != "*" else "")


def _json_grammar(schema: Mapping[str, Any]) -> str:
    body = dict(schema) or {"type": "object"}
    return f"start: /\\n{{0,2}}/ answer\nanswer: %json {json.dumps({**body, 'x-guidance': ROOMY})}"


def _write(value: Any) -> list[str]:
    """How a value may be written in a call."""
    if isinstance(value, str):
        return [value]
    constants = [text for text, constant in PYTHON_CONSTANTS.items() if constant is value]
    return [json.dumps(value, ensure_ascii=False), *constants]


def _fits(constant: object, types: frozenset[str]) -> bool:
    return ("null" if constant is None else "boolean") in types


def _as_dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _quote(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text, ensure_ascii=False)
