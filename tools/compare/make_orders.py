"""Write a small chat task into a folder: orders in everyday words, answered as JSON.

Every row is a chat of one question and one answer. The question orders one or two things from a
shop, with a quantity and often a delivery day or a wish; the answer is the order as one line of
JSON, and nothing else. A model that was only instructed to chat explains instead, so the task shows
whether training took. All words are our own. Valid and test rows combine them in ways that no
training row has. The same seed always gives the same files, on every machine and Python.

    python -m tools.compare.make_orders orders --seed 0
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tools.make_task import Draw


def _split(text: str) -> list[str]:
    return text.split(", ")


THINGS = _split(
    "apples, candles, notebooks, pencils, lemons, towels, buckets, ropes, mugs, batteries, "
    "sponges, tulips, napkins, screws, cushions, blankets, jars of honey, bags of rice, tins of "
    "paint, loaves of bread, boxes of tea, bottles of milk, bars of soap, packs of nails"
)
NUMBERS = _split("two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, twenty")
VALUES = dict(zip(NUMBERS, (*range(2, 13), 20), strict=True))
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
NAMES = _split("Ada, Bruno, Carla, Deniz, Emil, Fatima, Goran, Hanna, Iris, Jonas, Karim, Lena")
OPENINGS = (
    "Hi, this is {name}. I would like {items}",
    "{name} here, please put down {items}",
    "Could you get {items} ready? My name is {name}",
    "An order for {name}: {items}",
    "Good morning, {items} please, for {name}",
    "I am {name} and need {items}",
)
ENDINGS = {
    "day": (" by {day}", ", delivered on {day}", ", and {day} would suit me", " for {day}"),
    "gift": (", wrapped as a gift", ", it is a present, so wrap it", ", with gift wrapping"),
}


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=1000, help="rows (default: 1000)")
    parser.add_argument("--held-out", type=int, default=100, help="of valid and test, each")
    options = parser.parse_args()
    draw, seen = Draw(f"orders/{options.seed}"), set[str]()
    options.folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": options.train, "valid": options.held_out, "test": options.held_out}
    for split, size in sizes.items():
        rows = []
        while len(rows) < size:
            question, answer = make_order(draw)
            if question not in seen:
                seen.add(question)
                rows.append(to_row(question, answer))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def make_order(draw: Draw) -> tuple[str, str]:
    """A question and its answer."""
    name = _pick(draw, NAMES)
    first = _pick(draw, THINGS)
    others = [thing for thing in THINGS if thing != first]
    things = [first, _pick(draw, others)][: 1 + draw.index(2)]
    counts = [_pick(draw, NUMBERS) for _ in things]
    items = " and ".join(f"{n} {thing}" for n, thing in zip(counts, things, strict=True))
    text = _pick(draw, OPENINGS).format(name=name, items=items)
    order: dict[str, object] = {
        "name": name,
        "items": [
            {"what": thing, "count": VALUES[n]} for n, thing in zip(counts, things, strict=True)
        ],
        "day": None,
        "gift": False,
    }
    if draw.index(3):
        order["day"] = day = _pick(draw, DAYS)
        text += _pick(draw, ENDINGS["day"]).format(day=day)
    if not draw.index(3):
        order["gift"] = True
        text += _pick(draw, ENDINGS["gift"])
    return text + ".", json.dumps(order)


def _pick(draw: Draw, words: Sequence[str]) -> str:
    return words[draw.index(len(words))]


def to_row(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """A row of a chat."""
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


if __name__ == "__main__":
    main()
