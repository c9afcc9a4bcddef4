#!/usr/bin/env bash
# Runs the tests behind the mark `long`: grids of which the default and the slow tests run a sample.
#
#   scripts/long_tests.sh [PYTEST-ARGUMENTS...]
#
# Takes hours. Prints the line for the table in tests/README.md; put it there with the commit's date.
set -euo pipefail
cd "$(dirname "$0")/.."

report=$(mktemp)
trap 'rm -f "$report"' EXIT
status=0
pytest -m long -n 2 --durations=20 "$@" | tee "$report" || status=$?
printf '\n| %s | %s | %s |\n' "$(date -u +%F)" "$(git rev-parse --short HEAD)" "$(tail -n 1 "$report" | tr -d '=' | xargs)"
exit "$status"
