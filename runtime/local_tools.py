"""Tools that run on this machine: programs that the user names, each run only after the user has agreed to the call.

A tools file is a JSON list in OpenAI's form; an entry may have a "command" beside its "function":

    [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
      "command": ["date"]}]

The command gets the arguments as one JSON object on its standard input, never on its command line, and what it prints
is the result. An entry without a command is answered by the user.

    tools = LocalTools.load(Path("tools.json"))
    tools.run("now", {})
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from moepack.layout.errors import UsageError
from moepack.runtime.prompt import read_text
from moepack.runtime.tool_schema import Tool

TIMEOUT_S = 60
MAX_RESULT_CHARACTERS = 2**16


class LocalTools:
    """schemas: what the model is told. commands: what runs, by name; not every tool has one."""

    def __init__(self, schemas: list[Tool], commands: dict[str, list[str]]):
        self.schemas, self.commands = schemas, commands

    @classmethod
    def load(cls, path: Path) -> LocalTools:
        """Read a tools file. Raises UsageError naming the entry that is wrong."""
        try:
            entries = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: is no valid JSON: {error}") from None
        if not isinstance(entries, list):
            raise UsageError(f"{path}: expected a list of tools, found {type(entries).__name__}")
        schemas: list[Tool] = []
        commands: dict[str, list[str]] = {}
        for number, entry in enumerate(entries):
            function = entry.get("function") if isinstance(entry, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str) or not name:
                raise UsageError(f"{path}: entry {number}: expected a function with a name")
            command = entry.get("command")
            if command is not None:
                if not (isinstance(command, list) and command and all(isinstance(part, str) for part in command)):
                    raise UsageError(f"{path}: entry {number}: expected command as a list of strings")
                commands[name] = command
            schemas.append({"type": "function", "function": function})
        return cls(schemas, commands)

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        """What the tool's command prints; a failure is a result, too, which the model is told in words."""
        try:
            done = subprocess.run(
                self.commands[name],
                input=json.dumps(arguments, ensure_ascii=False).encode(),
                capture_output=True,
                timeout=TIMEOUT_S,
                start_new_session=True,  # Ctrl-C is for the conversation
            )
        except subprocess.TimeoutExpired:
            return f"error: no result after {TIMEOUT_S} seconds"
        except OSError as error:
            return f"error: {self.commands[name][0]} cannot be run: {error.strerror}"
        text = done.stdout.decode("utf-8", "replace").strip()
        if done.returncode:
            text = f"error: exit code {done.returncode}\n{text}\n{done.stderr.decode('utf-8', 'replace').strip()}"
        return text[:MAX_RESULT_CHARACTERS]
