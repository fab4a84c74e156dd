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

import contextlib
import json
import os
import signal
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
        command, pipe = self.commands[name], subprocess.PIPE
        try:  # a session of its own: Ctrl-C is for the conversation, and what the command has started ends with it
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        except OSError as error:
            return f"error: {command[0]} cannot be run: {error.strerror}"
        with process:
            try:
                out, err = process.communicate(json.dumps(arguments, ensure_ascii=False).encode(), TIMEOUT_S)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                return f"error: no result after {TIMEOUT_S} seconds"
        text = out.decode("utf-8", "replace").strip()
        if process.returncode:
            text = f"error: exit code {process.returncode}\n{text}\n{err.decode('utf-8', 'replace').strip()}"
        return text[:MAX_RESULT_CHARACTERS]
