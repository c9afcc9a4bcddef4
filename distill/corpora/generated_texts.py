"""A corpus that is generated: short texts on four topics."""

import random

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

SEED = 20240607  # fixed: all runs have the same texts
GENERATED = {"train": 480, "validation": 120, "test": 120}  # texts

TOPICS = {
    "cooking": "oven butter flour simmer garlic recipe spoon pepper bake dough onion broth",
    "gardening": "soil seed prune compost bloom shovel weed hedge sprout mulch orchard tulip",
    "music": "chord melody violin rhythm concert drum chorus tempo piano singer verse tune",
    "sailing": "anchor harbour mast tide rudder deck keel breeze sail buoy knot crew",
}
FILLER = (
    "the a of and in to we they it was then with for some every after before new old small great "
    "often again today"
)
OWN_TOPIC, ANY_TOPIC = 0.22, 0.09  # probability that a word is of the text's topic, or of any


def generated() -> DatasetDict:
    """Short generated texts on four topics; about 24 % of the words are of the text's topic."""
    generator = random.Random(SEED)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(TOPICS))})
    splits = {}
    for name, size in GENERATED.items():
        labels = [row % len(TOPICS) for row in range(size)]
        texts = [_text(list(TOPICS)[label], generator) for label in labels]
        splits[name] = Dataset.from_dict({"text": texts, "label": labels}, features=features)
    return DatasetDict(splits)


def _text(topic: str, generator: random.Random) -> str:
    return " ".join(_word(topic, generator) for _ in range(generator.randint(8, 20)))


def _word(topic: str, generator: random.Random) -> str:
    chance = generator.random()
    if chance < OWN_TOPIC:
        return generator.choice(TOPICS[topic].split())
    if chance < OWN_TOPIC + ANY_TOPIC:
        return generator.choice(TOPICS[generator.choice(list(TOPICS))].split())
    return generator.choice(FILLER.split())
