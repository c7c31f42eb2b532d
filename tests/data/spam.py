"""A table of made-up mails for tests: ordinary words, and a few of the words that give a mail's kind away."""

import csv
import random
from pathlib import Path

__all__ = ["write_spam"]

_ORDINARY = [f"word{number}" for number in range(200)]
_TELLING = {
    "ham": "meeting agenda minutes colleague lecture seminar tomorrow thanks".split(),
    "spam": "winner prize viagra casino urgent inherited lottery discount".split(),
    "news": "parliament minister election weather report score match market".split(),
}


def write_spam(path: Path, mails: int, classes: int = 2) -> None:
    """Write `mails` rows with the columns label and text; two mails in three are ham where there are two classes."""
    chance = random.Random(0)
    kinds = ["ham", "spam", "ham"] if classes == 2 else list(_TELLING)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        for number in range(mails):
            kind = kinds[number % len(kinds)]
            words = chance.choices(_ORDINARY, k=chance.randint(5, 30)) + chance.choices(_TELLING[kind], k=4)
            chance.shuffle(words)
            writer.writerow([kind, " ".join(words).capitalize() + "!"])
