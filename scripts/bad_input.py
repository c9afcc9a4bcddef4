"""Tries wrong input of every kind, as the tests do with less of it.

    python scripts/bad_input.py [examples=300] [only=data] [seed=0]

Prints a Markdown table: kind, inputs tried, accepted, refused in one sentence, failed; and on
stderr each failure, once for each message.
"""

import logging
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
import tests.conftest  # noqa: F401  the tests' environment: no network, one thread
from tests import bad_input


def count(kind: str, examples: int, first: int) -> Counter[str]:
    """The answers to inputs of a kind."""
    function, strategies = bad_input.KINDS[kind]
    answers, seen = Counter[str](), set[str]()

    @seed(first)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def attempt(arguments: tuple[object, ...]) -> None:
        try:
            answers[function(*arguments)] += 1
        except bad_input.BrokenLawError as error:
            answers["failed"] += 1
            if str(error) not in seen:
                seen.add(str(error))
                print(f"{kind}: {arguments!r:.400}: {error}", file=sys.stderr, flush=True)

    attempt()
    return answers


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    examples, first = int(options.pop("examples", 300)), int(options.pop("seed", 0))
    only = options.pop("only", "")
    logging.disable(logging.CRITICAL)
    print("| kind | tried | accepted | refused in a sentence | failed |\n|---|---:|---:|---:|---:|")
    for kind in bad_input.KINDS:
        if only in kind:
            answers = count(kind, examples, first)
            row = [answers.total(), *(answers[name] for name in ("accepted", "refused", "failed"))]
            print(f"| {kind} | {' | '.join(f'{each:,}' for each in row)} |", flush=True)


if __name__ == "__main__":
    main()
