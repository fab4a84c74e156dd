"""Read books of Standard Ebooks from their git repositories and write one JSON line per chapter, or plain text.

    python corpus.py MIRROR text.jsonl
    python corpus.py MIRROR novels.txt     # chapters one after the other, for moe-run calibrate --text

MIRROR holds one clone (bare or not) per book, in folders named like the repositories
(`mark-twain_the-prince-and-the-pauper`; the list is in ../BOOKS.md). Only src/epub/text is read; front and
back matter, notes, tables, mark-up and long verse are dropped, and typographic quotes and dashes made plain.
Plain text leaves out the books that packs are scored on. Nothing is downloaded here.
"""

import argparse
import html
import io
import json
import os
import re
import subprocess
import tarfile
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

HELD_OUT = ("arthur-conan-doyle_the-lost-world", "e-nesbit_the-enchanted-castle")  # scored, never trained on
SKIPPED = ("ambrose-bierce_the-devils-dictionary", "samuel-pepys_the-diary", "walt-whitman_leaves-of-grass")
_NOT_PROSE = re.compile(
    r"^(colophon|imprint|titlepage|uncopyright|halftitlepage|halftitle|endnotes|loi|toc|dedication|epigraph|"
    r"dramatis-personae|list-of|bibliography|glossary|index|appendix|footnotes|preface-to|acknowledg|errata|"
    r"introduction)"
)
_PLAIN = str.maketrans(
    {
        "“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "⸺": "----", "⸻": "----", "…": "...",
        "\u2011": "-", "\u00a0": " ", "\u200a": "", "\u2009": "", "\u202f": " ", "\u2060": "",
        "\ufeff": "", "\u00ad": "",
    }
)  # fmt: skip
MIN_CHARACTERS = 400
LETTERS_SAMPLE = 20_000  # characters


@dataclass(frozen=True)
class Book:
    """One book: the name of its repository, what the title page says, and its chapters."""

    name: str
    title: str
    author: str
    chapters: list[str]


def plain_text(xhtml: str) -> str:
    """Return the text of a chapter: paragraphs separated by an empty line, section breaks as `* * *`."""
    text = re.sub(r"<(head|table|figure|nav|math)\b.*?</\1>", "", xhtml, flags=re.S)
    text = re.sub(r'<a [^>]*epub:type="noteref".*?</a>', "", text, flags=re.S)
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(r"<hr[^>]*>", "\n\n* * *\n\n", text)
    text = re.sub(r"</(p|h\d|li|tr|blockquote|header|div|hgroup|section|article)>", "\n\n", text)
    text = re.sub(r"<br ?/?>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text)).translate(_PLAIN)
    text = "\n".join(re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_english_prose(text: str) -> bool:
    """Say whether a chapter is long enough, in plain letters, and not long verse."""
    if len(text) < MIN_CHARACTERS:
        return False
    sample = text[:LETTERS_SAMPLE]
    plain = sum(c.isascii() and (c.isalpha() or c in " ,.;'\"\n-!?") for c in sample) / len(sample)
    lines = [line for line in text.split("\n") if line]
    short = sum(len(line) < 55 for line in lines) / max(1, len(lines))
    is_verse = short > 0.85 and len(text) > 3000 and text.count('"') < 20  # with speech: dialogue
    return plain > 0.96 and not is_verse


def _natural_order(name: str) -> list[object]:
    """Sort key by which chapter-2 comes before chapter-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _metadata(package: str, tag: str) -> str:
    match = re.search(rf"<dc:{tag}[^>]*>(.*?)</dc:{tag}>", package)
    return html.unescape(match[1]) if match else ""


def read_book(folder: Path) -> Book:
    """Read one repository; a folder that is none, or holds no text, gives a book without chapters."""
    command = ["git", "-C", str(folder), "archive", "HEAD", "src/epub/text", "src/epub/content.opf"]
    # the search for a repository ends at the folder: an empty one is not the project around it
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    archive = subprocess.run(command, capture_output=True, check=False, env=environment).stdout
    title = author = ""
    chapters: list[str] = []
    if archive:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in sorted(tar.getmembers(), key=lambda member: _natural_order(member.name)):
                file = tar.extractfile(member)
                if file is None:
                    continue
                content, name = file.read().decode("utf-8", "replace"), Path(member.name).name
                if name == "content.opf":
                    title, author = _metadata(content, "title"), _metadata(content, "creator")
                elif name.endswith(".xhtml") and not _NOT_PROSE.match(name):
                    text = plain_text(content)
                    if is_english_prose(text):
                        chapters.append(text)
    return Book(folder.name, title, author, chapters)


def chapter_line(book: Book, text: str) -> dict[str, object]:
    """A chapter as the training text has it."""
    about = {"book": book.name, "title": book.title, "author": book.author}
    return {**about, "held_out": book.name in HELD_OUT, "text": text}


def main() -> None:
    """Read all books on all cores and write their chapters in the order of the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mirror", type=Path, help="folder of clones")
    parser.add_argument("out", type=Path, help="text.jsonl, or a name in .txt for plain text")
    args = parser.parse_args()
    folders = [folder for folder in sorted(args.mirror.iterdir()) if folder.is_dir() and "_" in folder.name]
    is_plain = args.out.suffix == ".txt"
    left_out = SKIPPED + HELD_OUT if is_plain else SKIPPED  # a JSON line says whether it is held out, plain text cannot
    folders = [folder for folder in folders if folder.name not in left_out]
    books = characters = 0
    with Pool() as pool, open(args.out, "w", encoding="utf-8") as out:
        for book in pool.imap(read_book, folders):
            if not book.chapters:
                print(f"{book.name}: no text found")
                continue
            books += 1
            for text in book.chapters:
                characters += len(text)
                out.write(f"{text}\n\n" if is_plain else json.dumps(chapter_line(book, text)) + "\n")
    print(f"{books} books, {characters / 1e6:.1f} million characters")


if __name__ == "__main__":
    main()
