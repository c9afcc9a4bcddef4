#!/usr/bin/env bash
# The oldest versions that pyproject.toml allows, or another torch, under a chosen set of tests.
#
#   scripts/check_oldest.sh                        # the lower bound of every dependency
#   scripts/check_oldest.sh torch=2.14.*           # that torch, and the newest of everything else
#   scripts/check_oldest.sh venv=FOLDER tests/unit/test_internals.py   # keep the environment
#
# On Linux, PyPI's torch brings several GB of CUDA libraries. Where the index of CPU builds can be
# reached: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu scripts/check_oldest.sh
set -euo pipefail
cd "$(dirname "$0")/.."

torch="" venv="" tests=()
for argument in "$@"; do
    case $argument in
        torch=*) torch=${argument#torch=} ;;
        venv=*) venv=${argument#venv=} ;;
        *) tests+=("$argument") ;;
    esac
done
if ((${#tests[@]} == 0)); then
    tests=(
        tests/integration/test_attentions.py tests/integration/test_train.py
        tests/numerics/test_chunked.py tests/numerics/test_losses.py
        tests/unit/test_internals.py tests/unit/test_module.py tests/unit/test_checkpoints.py
        tests/unit/test_data.py tests/unit/test_models.py tests/unit/test_performance.py
    )
fi
if [[ -z $venv ]]; then
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
fi

# The requirements of pyproject.toml: each at its lower bound, or all but torch as they are.
requirements() {
    python3 - "$torch" <<'PYTHON'
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for requirement in project["dependencies"]:
    name, bounds = re.match(r"([\w-]+)(.*)", requirement).groups()
    oldest = re.search(r">=([\d.]+)", bounds).group(1)
    if sys.argv[1]:
        print(f"torch=={sys.argv[1]}" if name == "torch" else requirement)
    else:
        print(f"{name}=={oldest}.*" if name == "torch" else f"{name}=={oldest}")
print("pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6", *project["optional-dependencies"]["demo"], sep="\n")
PYTHON
}

if [[ ! -x $venv/bin/python ]]; then
    python3 -m venv "$venv"
fi
requirements >"$venv/requirements.txt"
"$venv/bin/pip" install --quiet --disable-pip-version-check -r "$venv/requirements.txt"
export PATH="$venv/bin:$PATH" PYTHONPATH=$PWD
pip list --format=freeze | grep -E "^(torch|transformers|lightning|datasets|torchmetrics|numpy|pyarrow)=="
# Warnings of versions that are not developed with are no failures.
pytest -o filterwarnings=default -m "not long and not gpu" --maxprocesses 2 "${tests[@]}"
