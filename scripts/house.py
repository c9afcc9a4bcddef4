"""Prints the measures of the source that tests/unit/test_layout.py limits, as a Markdown table.

    python scripts/house.py [PACKAGE ...]      (default: distill)

To compare with an earlier state, `git worktree add /tmp/before COMMIT`; then
`python scripts/house.py /tmp/before/distill distill` prints one column for each package.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import measures


def main() -> None:
    packages = [Path(name).resolve() for name in sys.argv[1:]] or [ROOT / "distill"]
    tables = [measures.table(package) for package in packages]
    print(f"| measure | {' | '.join(str(package) for package in packages)} | limit |")
    print(f"|---|{'---:|' * len(packages)}---:|")
    for rows in zip(*tables, strict=True):
        name, _, limit = rows[0]
        print(f"| {name} | {' | '.join(value for _, value, _ in rows)} | {limit} |")


if __name__ == "__main__":
    main()
