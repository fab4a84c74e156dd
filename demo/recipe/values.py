"""Makers of plain values: numbers, dates, paths, addresses, code.

Each takes a random generator and returns one value. The values look like what people type into everyday tools
and carry no personal data: host names end in .example, .test or the reserved example domains, and the names
and cities are common ones.

    python -c "import random, values; print(values.path(random.Random(1)))"
"""

from random import Random

from data_files import read_json

_LISTS = read_json("values.json")
FIRST_NAMES: list[str] = _LISTS["first_names"]
LAST_NAMES: list[str] = _LISTS["last_names"]
CITIES: list[str] = _LISTS["cities"]
LANGUAGES: list[str] = _LISTS["languages"]
COLOURS: list[str] = _LISTS["colours"]
WEEKDAYS: list[str] = _LISTS["weekdays"]
FILE_SUBJECTS: list[str] = _LISTS["file_subjects"]
ADJECTIVES: list[str] = _LISTS["adjectives"]
FILE_EXTENSIONS: list[str] = _LISTS["file_extensions"]
FOLDERS: list[str] = _LISTS["folders"]
OBJECT_WORDS: list[str] = _LISTS["object_words"]
TASKS: list[str] = _LISTS["tasks"]
EVENTS: list[str] = _LISTS["events"]
TOPICS: list[str] = _LISTS["topics"]


def number(rng: Random) -> int:
    """Return a positive integer: half of them have two digits, a fifth has four."""
    size = rng.random()
    if size < 0.5:
        return rng.randint(2, 99)
    return rng.randint(100, 999) if size < 0.8 else rng.randint(1000, 9999)


def any_size_number(rng: Random) -> int:
    """Return an integer from 0 to 999999, mostly small."""
    size = rng.random()
    if size < 0.4:
        return rng.randint(0, 20)
    return rng.randint(21, 999) if size < 0.75 else rng.randint(1000, 999999)


def date(rng: Random) -> str:
    """Return a date as YYYY-MM-DD."""
    return f"{rng.randint(2024, 2031)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def clock_time(rng: Random) -> str:
    """Return a time of day as HH:MM, on a quarter of an hour."""
    return f"{rng.randint(6, 22):02d}:{rng.choice(['00', '15', '30', '45'])}"


def path(rng: Random) -> str:
    """Return a file path: a bare name, below one folder, or absolute."""
    prefix = "" if rng.random() < 0.5 else rng.choice(ADJECTIVES) + "_"
    stem = prefix + rng.choice(FILE_SUBJECTS)
    if rng.random() < 0.3:
        stem += str(rng.randint(1, 99))
    name = stem + "." + rng.choice(FILE_EXTENSIONS)
    depth = rng.random()
    if depth < 0.4:
        return name
    if depth < 0.75:
        return rng.choice(FOLDERS) + "/" + name
    return "/" + rng.choice(FOLDERS) + "/" + rng.choice(FOLDERS) + "/" + name


def some_words(rng: Random, fewest: int, most: int) -> str:
    """Return a few different names of things, separated by spaces."""
    return " ".join(rng.sample(OBJECT_WORDS, rng.randint(fewest, most)))


def url(rng: Random) -> str:
    """Return an https address on a reserved domain."""
    host = rng.choice(OBJECT_WORDS) + rng.choice([".example.com", ".example.org", ".test"])
    page = rng.choice(
        [
            "",
            "/" + rng.choice(FILE_SUBJECTS),
            "/" + rng.choice(FOLDERS) + "/" + str(rng.randint(1, 999)),
            "/" + rng.choice(FILE_SUBJECTS) + "?id=" + str(rng.randint(1, 99)),
        ]
    )
    return "https://" + host + page


def phone(rng: Random) -> str:
    """Return a phone number with a country code."""
    return f"+{rng.randint(1, 99)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}"


def code(rng: Random) -> str:
    """Return a reference such as `KT-4711`, `9f03ab1c`, `48151623` or `B42`."""
    shape = rng.randrange(4)
    if shape == 0:
        letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2))
        return f"{letters}-{rng.randint(100, 99999)}"
    if shape == 1:
        return "".join(rng.choice("0123456789abcdef") for _ in range(8))
    if shape == 2:
        return str(rng.randint(10**7, 10**9))
    return rng.choice("ABCDEFG") + str(rng.randint(10, 999))


def source_code(rng: Random) -> str:
    """Return one to four lines of a program, in one of several languages."""
    first, second = rng.sample(OBJECT_WORDS, 2)
    n = rng.randint(1, 99)
    return rng.choice(
        [
            f"def {first}(x):\n    return x + {n}",
            f"for i in range({n}):\n    print(i)",
            f"{first} = {n}\n{second} = {first} * 2\nprint({second})",
            f"import math\nprint(math.sqrt({n}))",
            f'if {first} > {n}:\n    {second} = "{first}"\nelse:\n    {second} = None',
            f'console.log("{first}");',
            f"const {first} = {n};\nlet {second} = {first} + 1;",
            f'echo "{first} {second}"',
            f"fn {first}() -> u32 {{\n    {n}\n}}",
            f"print(\"{first}\", '{second}')",
            f"{first} = [{n}, {n + 1}]\nprint(len({first}))",
            f"class {first.title()}:\n    {second} = {n}",
            f'<p class="{first}">{second}</p>',
            f"#include <stdio.h>\nint main() {{ return {n}; }}",
        ]
    )


def sql(rng: Random) -> str:
    """Return one SQL statement."""
    table = rng.choice(FILE_SUBJECTS) + "s"
    column = rng.choice(["id", "name", "price", "date", "city", "status"])
    return rng.choice(
        [
            f"SELECT * FROM {table}",
            f"SELECT {column} FROM {table} WHERE id = {rng.randint(1, 999)}",
            f"SELECT COUNT(*) FROM {table}",
            f"SELECT {column} FROM {table} ORDER BY {column} LIMIT {rng.randint(1, 50)}",
            f"DELETE FROM {table} WHERE {column} = '{rng.choice(OBJECT_WORDS)}'",
            f"UPDATE {table} SET {column} = '{rng.choice(OBJECT_WORDS)}' WHERE id = {rng.randint(1, 99)}",
        ]
    )


def shell_command(rng: Random) -> str:
    """Return one command line of a Unix shell."""
    return rng.choice(
        [
            "ls -la",
            "pwd",
            "git status",
            f"git log -n {rng.randint(1, 20)}",
            "df -h",
            f"python {rng.choice(FILE_SUBJECTS)}.py",
            f"wc -l {path(rng)}",
            f"rm {path(rng)}",
            f"mkdir {rng.choice(FOLDERS)}{rng.randint(1, 50)}",
            f"head -n {rng.randint(1, 50)} {path(rng)}",
            f"grep {rng.choice(OBJECT_WORDS)} {path(rng)}",
        ]
    )
