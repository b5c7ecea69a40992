"""Write a small topic-classification task into a folder: train.jsonl, valid.jsonl, test.jsonl.

Every row is two sentences about one of five topics and asks for the topic in one word. All text is
put together here, from our own word lists and sentence patterns. The valid and test rows use other
words and other patterns than the training rows, so a model scores well on them only if it learned
the task, not the words. calibration.txt holds more such sentences, without answers, for `export`.
The same seed always gives the same files, on every machine and Python.

    python tools/make_task.py task --seed 0
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

# Per topic and split: people (who), things (what), and what people did, separated by commas.
# No word of four letters or more that carries meaning stands in both splits.
WORDS: dict[str, dict[str, tuple[str, str, str]]] = {
    "money": {
        "train": (
            "banker, investor, trader, broker, shareholder, economist, lender, stock dealer, "
            "bank clerk, finance minister, accountant, cashier, rich investor, bank manager, "
            "exporter, landlord, financial analyst",
            "bank loan, interest rate, share price, dividend, quarterly profit, foreign debt, "
            "budget, stock, dollar, trade deficit, currency, merger, credit, insurance, "
            "government bond, fiscal year, exports, surplus, net loss, price of oil, payment, "
            "bank account, takeover bid, profit margin, loan agreement, oil company, annual "
            "report, rent, mortgage, pension, bill, contract, balance sheet",
            "sold all the shares, paid a dividend, borrowed ten million dollars, bought the oil "
            "company, cut the interest rate, lost a billion, reported a higher profit, owed the "
            "bank three months of rent, signed the loan agreement, raised the price of oil, "
            "offered a merger, forecast a deficit, lent the company ten dollars, traded stocks "
            "and bonds, counted the bills",
        ),
        "test": (
            "treasurer, retailer, consumer, merchant, importer, customer, bookkeeper, "
            "speculator, millionaire, employer, securities holder, tax collector, buyer",
            "revenue, inflation, income tax, market, investment, assets, cash, wages, economy, "
            "gold reserve, commerce, cost of living, purchase, savings, stake, francs, retail "
            "sales, funds, subsidy, capital gains, salary, commission, fortune, expenses, "
            "deposit, wealth, discount, enterprise, monetary policy",
            "acquired a stake in the business, invested two hundred francs, earned a fortune, "
            "saved a few cents, deposited the cash, spent the income, asked for better wages, "
            "lowered the cost, collected the tax, financed the purchase, became bankrupt",
        ),
    },
    "movies": {
        "train": (
            "actor, film director, critic, comedian, film student, leading man, film fan, horror "
            "fan, writer of thrillers, stunt man, comic, young audience, dancer, Hollywood "
            "legend",
            "film, screenplay, opening scene, comedy, thriller, sequel, audience, cinema, hero "
            "of the plot, lead role, documentary, dialogue, horror film, happy ending, "
            "Hollywood, classic, character, plot twist, screen, tragedy, love scene, humor, "
            "jokes, acting, opening credits, review, cast, western, fairy tale, costume, motion "
            "picture",
            "played the lead role, directed a documentary, laughed at the jokes, rewrote the "
            "dialogue, watched a horror film, reviewed the sequel, acted in a comedy, forgot his "
            "lines on the set, cried at the happy ending, edited the opening scene, went to the "
            "cinema, rehearsed the love scene, appeared on the screen, praised the acting",
        ),
        "test": (
            "actress, filmmaker, producer, star, viewer, cameraman, screenwriter, moviegoer, "
            "narrator, Disney artist, television editor, child star, villain",
            "script, drama, performance, theater, camera, villain, special effects, trailer, "
            "animation, soundtrack, Oscar, genre, romantic adventure, television episode, "
            "remake, fantasy, suspense, cartoon, entertainment, storyline, visual style, "
            "cinematography, popcorn, premiere, box office, digital effects",
            "starred in a drama, filmed the villain, narrated the adventure, produced a cartoon, "
            "won an Oscar for the script, entertained the viewers, queued for the premiere, "
            "turned on the camera, made two episodes, voiced the villain",
        ),
    },
    "war": {
        "train": (
            "soldier, general, enemy, officer of the army, rebel, spy, army doctor, wounded "
            "soldier, archer, gunner, general of the troops, horseman, guard, colonel, armed "
            "rebel, hero of the battle",
            "battle, army, weapon, gun, bomb, attack, victory, sword, peace treaty, defeat, "
            "march, battlefield, regiment, gunfire, castle gate, raid, military hospital, "
            "fighting, retreat, surrender, enemy line, wounded horse, uniform, spear, front "
            "line, troops, armor, duel, flag, battle cry, civil strife",
            "attacked the castle, fired the guns, fought the enemy, died in the battle, "
            "surrendered at last, led the troops over the hill, dropped a bomb, drew a sword, "
            "carried the wounded, lost the battle, marched with the army, killed two soldiers, "
            "won a victory, guarded the gate, fled from the attack",
        ),
        "test": (
            "commander, warrior, prisoner of the invaders, fighter, sergeant, marine, sniper, "
            "veteran, conqueror, tank driver, ally, volunteer, lieutenant",
            "forces, missile, tank, fort, invasion, conflict, combat, camp, defense, revolution, "
            "nuclear arms, ambush, siege, trench, rifle, bullet, shield, cannon, barracks, air "
            "strike, occupation, rocket, ceasefire, explosion, ammunition, hostile tribe, "
            "headquarters, slaughter",
            "defended the fort, destroyed the bridge, conquered the city, was shot by a sniper, "
            "launched a missile, betrayed the allies, loaded the rifle, captured the camp, ended "
            "the siege, invaded the land, blew up the tank",
        ),
    },
    "ships": {
        "train": (
            "sailor, captain, whale hunter, fisherman, first mate, pilot, old seaman, cabin boy, "
            "harpooner, passenger on deck, pirate, owner of the schooner, cook of the schooner, "
            "helmsman",
            "whale, deck, mast, sail, harbor, wind, island, ocean, anchor, storm, boat, oar, "
            "voyage, coast, wave, cabin, harpoon, port, lighthouse, rope, compass, sinking boat, "
            "fishing net, leak, schooner, steamer, fog, shark, calm water, helm, cargo hold, "
            "whaling trip",
            "hauled up the anchor, steered for the island, harpooned the whale, hoisted the "
            "sail, climbed the mast, fell into the ocean, rowed to the port, slept in the cabin, "
            "lost the oars, crossed the ocean, threw a rope over the deck, caught a shark, "
            "sighted the coast, left the harbor, was wrecked in a storm",
        ),
        "test": (
            "crew, admiral, diver, navigator, boatswain, ferryman, docker, skipper, rower, "
            "swimmer, castaway, boatman, stoker",
            "vessel, tide, shore, stern, sea, bay, keel, canoe, rudder, beach, fleet, raft, "
            "canal, reef, channel, dock, gulf, rough seas, lifeboat, fishes, current, ferry, "
            "bow, flood tide, seabird, gale, bottom of the sea, icy gulf",
            "swam to the shore, drowned in the bay, sank near the reef, cruised around the cape, "
            "repaired the rudder, drifted with the tide, boarded the ferry, dived under the "
            "keel, navigated by the stars, launched the lifeboat, waited for the tide",
        ),
    },
    "crime": {
        "train": (
            "thief, killer, policeman, judge, lawyer, detective, victim, witness, prison guard, "
            "murderer, police officer, burglar, pickpocket, public defender, smuggler",
            "murder, prison, trial, evidence, court, police, stolen watch, knife, alibi, "
            "verdict, robbery, police station, blackmail, cell, fingerprint, law, crooked "
            "lawyer, murder case, gang, handcuffs, confession, stolen car, corpse, poison, lie, "
            "ransom, jail, dark alley, clue",
            "stole the jewels, murdered his wife, robbed a bank, was arrested by the police, "
            "confessed to the murder, broke into the house, went to prison, lied in court, "
            "escaped from jail, found a clue, poisoned the old man, called the police, hid the "
            "knife, threatened the witness",
        ),
        "test": (
            "robber, gangster, suspect, sheriff, criminal, attorney, inspector, kidnapper, jury, "
            "convict, drug lord, informer, prosecutor",
            "arrest, guilty plea, justice, theft, assault, investigation, innocence, sentence, "
            "gallows, fraud, pistol, suspicion, illegal drugs, execution, search warrant, "
            "punishment, bribe, parole, body in the cellar, bloody hammer, inquest, trap, "
            "motive, accusation, conviction, gunshot",
            "pleaded guilty, strangled the girl, kidnapped a child, committed fraud, accused the "
            "convict, shot the sheriff, bribed the jury, investigated the theft, was sentenced "
            "to death, distributed illegal drugs, denied the assault",
        ),
    },
}

# {who}, {what}, {did}: another word of the topic at every place.
PATTERNS: dict[str, tuple[str, ...]] = {
    "train": (
        "The {who} {did}.",
        "Yesterday the {who} talked about the {what} and the {what}.",
        "It was all because of the {what}, said the {who}.",
        "Before anyone noticed, the {who} {did}.",
        "There was a {what} and a {what} in every story the {who} told.",
        "The {who} {did}, and nobody mentioned the {what} again.",
        "We read about the {what} in the paper.",
        "My brother, a {who}, {did} last week.",
        "Do you remember the {what} and the day the {who} {did}?",
        "The book has a chapter on the {what} and one on the {what}.",
    ),
    "test": (
        "For years a {who} had dreamed of the {what}.",
        "Everyone knew that the {who} {did}.",
        "On Monday another {who} {did} near the {what}.",
        "Her letter described the {what}, the {what} and the {who}.",
        "Nothing surprised us more than the {what}.",
        "Once again, one {who} {did} while we discussed the {what}.",
        "This article explains the {what} to every {who}.",
        "After the {what}, the {who} {did}.",
    ),
}
PROMPT = "{text}\nThis text is about"
CHOICES = [f" {topic}" for topic in WORDS]
CALIBRATION = "calibration.txt"
N_DOCUMENTS, N_SENTENCES = 64, 20
SPLITS = {"train": "train", "valid": "test", "test": "test"}  # which words and patterns a file uses


class Draw:
    """Choices drawn from SHA-256, so that rows do not depend on a Python release's `random`."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.count = 0

    def index(self, n: int) -> int:
        self.count += 1
        digest = hashlib.sha256(f"{self.key}/{self.count}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % n


def words(topic: str, split: str) -> dict[str, list[str]]:
    """The word lists of one topic in one split, by the names that the patterns use."""
    lists = WORDS[topic][split]
    return {
        slot: [word.strip() for word in text.split(",")]
        for slot, text in zip(("who", "what", "did"), lists, strict=True)
    }


def sentence(pattern: str, lists: dict[str, list[str]], draw: Draw, used: set[str]) -> str:
    """Fill every slot of `pattern` with a word not used before in this row."""
    for slot in ("who", "what", "did"):
        while "{" + slot + "}" in pattern:
            free = [word for word in lists[slot] if word not in used]
            word = free[draw.index(len(free))]
            used.add(word)
            pattern = pattern.replace("{" + slot + "}", word, 1)
    return with_articles(pattern)


def with_articles(text: str) -> str:
    """Turn "a" into "an" before a vowel."""
    tokens = text.split(" ")
    for i in range(len(tokens) - 1):
        if tokens[i] == "a" and tokens[i + 1][0] in "aeiou":
            tokens[i] = "an"
    return " ".join(tokens)


def make_row(split: str, seed: int, number: int) -> dict[str, Any]:
    """Row `number` of a split; its "answer" is an index into its "choices"."""
    draw = Draw(f"{seed}/{split}/{number}")
    answer = draw.index(len(CHOICES))
    lists = words(list(WORDS)[answer], SPLITS[split])
    patterns = list(PATTERNS[SPLITS[split]])
    used: set[str] = set()
    first = patterns.pop(draw.index(len(patterns)))
    second = patterns.pop(draw.index(len(patterns)))
    text = " ".join(sentence(pattern, lists, draw, used) for pattern in (first, second))
    return {"prompt": PROMPT.format(text=text), "choices": CHOICES, "answer": answer}


def make_document(seed: int, number: int) -> str:
    """Plain text for `zo-gguf export --calibration`: training sentences, no answers."""
    draw = Draw(f"{seed}/calibration/{number}")
    topics = list(WORDS)
    patterns = PATTERNS["train"]
    sentences = []
    for _ in range(N_SENTENCES):
        lists = words(topics[draw.index(len(topics))], "train")
        sentences.append(sentence(patterns[draw.index(len(patterns))], lists, draw, set()))
    return " ".join(sentences)


def make_task(output: Path, n_train: int, n_valid: int, n_test: int, seed: int) -> None:
    """Write the task and a calibration text into `output`; no row stands twice in the task."""
    output.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, n_rows in (("train", n_train), ("valid", n_valid), ("test", n_test)):
        rows: list[str] = []
        number = 0
        while len(rows) < n_rows:
            row = make_row(split, seed, number)
            number += 1
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(json.dumps(row))
        (output / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    documents = [make_document(seed, number) for number in range(N_DOCUMENTS)]
    (output / CALIBRATION).write_text("\n\n".join(documents) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("output", type=Path, help="folder for train.jsonl, valid.jsonl, test.jsonl")
    parser.add_argument(
        "--train", type=int, default=3000, help="training rows (default %(default)s)"
    )
    parser.add_argument("--valid", type=int, default=240, help="valid rows (default %(default)s)")
    parser.add_argument("--test", type=int, default=480, help="test rows (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other rows")
    args = parser.parse_args()
    make_task(args.output, args.train, args.valid, args.test, args.seed)
    print(f"{args.train} train, {args.valid} valid and {args.test} test rows in {args.output}")


if __name__ == "__main__":
    main()
