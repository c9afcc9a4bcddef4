"""Wrong input of every kind, and the law that it is refused in one sentence, or accepted.

`tests/unit/test_bad_input.py` tries a few inputs of each kind, `scripts/bad_input.py` many.
"""

import bz2
import contextlib
import gzip
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hydra import compose, initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill import data, models
from distill.cli import parse_options
from distill.errors import RunFailed, UserError
from distill.recipe import hydra_config, trust
from distill.recipe.compose import SHIPPED, validate
from distill.recipe.config import Data, Run
from distill.recipe.explain import explain_error
from distill.tasks import (
    CausalLanguageModelling,
    MultiLabelClassification,
    Regression,
    SingleLabelClassification,
)

# Of the libraries beneath, which mean nothing to a user.
INNER_WORDS = ("DictConfig", "ListConfig", "AnyNode", "object_type", "subclass", "Traceback")
REFUSALS = (UserError, RunFailed, HydraException, OmegaConfBaseException)


class BrokenLawError(AssertionError):
    """Input that is neither accepted nor refused in one sentence."""


def answer(use: Callable[[], Any]) -> str:
    """Use some input: `accepted`, or `refused` in one sentence; everything else is a failure."""
    try:
        use()
    except REFUSALS as error:
        sentence = explain_error(error)
        inner = [word for word in INNER_WORDS if word in sentence]
        if "\n" in sentence or ", but " not in sentence or inner:
            raise BrokenLawError(f"the answer is {sentence!r}") from error
        return "refused"
    except OSError as error:  # such as a file that cannot be written, which commands describe
        if error.errno is None:
            raise BrokenLawError(f"{type(error).__name__}: {error}") from error
        return "refused"
    except SystemExit as error:
        if error.code not in (0, 2):
            raise BrokenLawError(f"exit code {error.code}") from error
        return "refused"
    except BaseException as error:
        raise BrokenLawError(f"{type(error).__name__}: {str(error)[:300]}") from error
    return "accepted"


# ---- values of other kinds

SCALARS = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 1.5, -0.5, 1e300, 1e-300, 10**30]),
    st.sampled_from([float("nan"), float("inf"), "", " ", "x", "0", "-1", "1e-5", "null", "auto"]),
    st.sampled_from(["größe", "日本", "a b", "a,b", "it's", '"', "${x}", "???", "../x", "/", "~"]),
    st.text(max_size=8),
)
NESTED = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(
        st.sampled_from(["a", "model", "_target_", "0", "", "a.b"]), SCALARS, max_size=2
    ),
)
VALUES = st.one_of(NESTED, st.lists(NESTED, max_size=2))


def keys(section: Any = Run, prefix: str = "") -> list[str]:
    """All keys of the recipe's schema, those of sections included."""
    found = []
    for name, node in OmegaConf.structured(section)._content.items():
        found.append(f"{prefix}{name}")
        if hasattr(kind := node._metadata.ref_type, "__dataclass_fields__"):
            found += keys(kind, f"{prefix}{name}.")
    return found


KEYS = [
    *keys(),
    *("task._target_", "task.max_length", "task.nonsense", "callbacks.a", "callbacks.a._target_"),
    *(
        "loss.terms.a._target_",
        "loss.terms.a.weight",
        "teacher.config.model_type",
        "nonsense",
        "a.b",
    ),
]
LINES = {
    "tiny": (SHIPPED / "tiny.yaml").read_text(),
    "compressed": (SHIPPED / "bert_prune_quantize.yaml").read_text(),
    "language": (SHIPPED / "gpt2_half.yaml").read_text(),
}


def compose_words(*words: str) -> Run:
    """The recipe that a command line composes, validated, in the current folder."""
    overrides = hydra_config.register_recipes(trust.take_from_arguments(list(words)))
    GlobalHydra.instance().clear()
    flags = [word for word in overrides if word.startswith("-")]
    with initialize(version_base="1.3", config_path=None):
        composed = compose("run", [word for word in overrides if word not in flags])
    return validate(composed)


def in_folder(use: Callable[[Path], Any]) -> str:
    """The answer to a use of a temporary folder, which is the current one meanwhile."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        return answer(lambda: use(Path(name)))


def set_key(recipe: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(recipe.get(section), dict):
            recipe[section] = {}
        recipe = recipe[section]
    recipe[last] = value


CHANGES = st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=2)


def try_recipe(name: str, changes: list[tuple[str, Any]]) -> str:
    """A recipe file with other values."""

    def use(folder: Path) -> None:
        recipe = yaml.safe_load(LINES[name])
        for key, value in changes:
            set_key(recipe, key, value)
        text = yaml.safe_dump(recipe, allow_unicode=True)
        (folder / "mine.yaml").write_text(text, "utf-8", errors="surrogatepass")
        compose_words("recipe=mine.yaml")

    return in_folder(use)


# ---- damage


@st.composite
def damages(draw: Any) -> Callable[[bytes], bytes]:
    """A function that removes, inserts, replaces or repeats bytes, or writes them otherwise."""
    kind = draw(st.sampled_from(["cut", "insert", "replace", "repeat", "swap", "encoding", "end"]))
    at, length = draw(st.floats(0, 1)), draw(st.integers(1, 12))
    signs = [
        b'"',
        b"'",
        b",",
        b"\n",
        b"\r",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"{",
        b"]",
        b":",
        b"\t",
    ]
    new = b"".join(draw(st.lists(st.sampled_from(signs) | st.binary(max_size=3), max_size=4)))
    encoding = draw(st.sampled_from(["utf-16", "utf-8-sig", "latin-1", "utf-32-le", "cp1252"]))

    def damage(content: bytes) -> bytes:
        start = int(at * len(content))
        before, part, after = (
            content[:start],
            content[start : start + length],
            content[start + length :],
        )
        changed = {
            "cut": before + after,
            "insert": before + new + part + after,
            "replace": before + new + after,
            "repeat": before + part * 50 + after,
            "swap": after + part + before,
            "end": before,
        }
        if kind != "encoding":
            return changed[kind]
        return content.decode("utf-8", "replace").encode(encoding, "replace")

    return damage


def try_damaged_recipe(name: str, damage: Callable[[bytes], bytes]) -> str:
    """A recipe file whose bytes are damaged."""

    def use(folder: Path) -> None:
        (folder / "mine.yaml").write_bytes(damage(LINES[name].encode()))
        compose_words("recipe=mine.yaml")

    return in_folder(use)


WORDS = st.one_of(
    st.tuples(st.sampled_from(KEYS), SCALARS).map(lambda pair: f"{pair[0]}={pair[1]}"),
    st.tuples(st.sampled_from(KEYS), VALUES).map(lambda pair: f"{pair[0]}={json.dumps(pair[1])}"),
    st.tuples(st.sampled_from(["+", "++", "~", "-", "--", "@"]), st.sampled_from(KEYS)).map(
        "".join
    ),
    st.sampled_from(["--cfg", "--help=1", "-m", "--multirun", "--resolve", "-p", "hydra/x=y", "="]),
    st.sampled_from(["recipe=", "recipe=a,b", "recipe=tiny,tiny", "resume=", "trust=", "trust=os"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=15),
)


def try_command_line(words: list[str]) -> str:
    """`recipe=tiny` with further words."""
    return in_folder(lambda _: compose_words("recipe=tiny", *words))


def try_command(schema: type, words: list[str]) -> str:
    """The options of another command."""

    def use(_: Path) -> None:
        arguments, parse_options.__globals__["sys"].argv = parse_options.__globals__["sys"].argv, []
        try:
            parse_options.__globals__["sys"].argv = ["distill", *words]
            parse_options(schema, "usage")
        finally:
            parse_options.__globals__["sys"].argv = arguments

    return in_folder(use)


# ---- data

TEXTS = [
    f"{who} {does} the {thing}" for who in "abc" for does in ("sees", "eats") for thing in "xyz"
]
TASKS = {
    "one label": SingleLabelClassification,
    "several labels": MultiLabelClassification,
    "number": Regression,
    "language": CausalLanguageModelling,
}


@cache
def tokenizer() -> Any:
    return models.train_tokenizer(TEXTS, 300, SingleLabelClassification(8).special_tokens())


def use_data(source: str, task: str, **settings: Any) -> None:
    """Load and encode a source."""
    names = {"validation": None, "test": None, "holdout": 0.2} | settings
    if task == "language":
        names["label"] = None
    section = Data(source=source, **names)
    raw, bound = data.load(section, TASKS[task](8), 0)
    data.encode(raw, bound, tokenizer(), section)


def frame(task: str) -> pd.DataFrame:
    """A correct table for a task."""
    count = len(TEXTS)
    labels = {
        "one label": [("food", "sport")[number % 2] for number in range(count)],
        "several labels": [
            '["food", "sport"]' if number % 2 else '["food"]' for number in range(count)
        ],
        "number": [number / 2 for number in range(count)],
        "language": ["x"] * count,
    }
    return pd.DataFrame({"text": TEXTS, "label": labels[task]})


def parquet(table: pd.DataFrame) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(table), sink)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[pd.DataFrame], bytes]] = {
    "csv": lambda table: table.to_csv(index=False).encode(),
    "tsv": lambda table: table.to_csv(index=False, sep="\t").encode(),
    "jsonl": lambda table: table.to_json(orient="records", lines=True).encode(),
    "json": lambda table: table.to_json(orient="records").encode(),
    "txt": lambda table: "\n".join(table["text"]).encode(),
    "parquet": parquet,
    "csv.gz": lambda table: gzip.compress(table.to_csv(index=False).encode()),
    "jsonl.bz2": lambda table: bz2.compress(table.to_json(orient="records", lines=True).encode()),
}


def try_damaged_data(suffix: str, task: str, damage: Callable[[bytes], bytes]) -> str:
    """A data file whose bytes are damaged."""

    def use(folder: Path) -> None:
        (folder / f"file.{suffix}").write_bytes(damage(FORMATS[suffix](frame(task))))
        use_data(f"file.{suffix}", task)

    return in_folder(use)


CELLS = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text(max_size=3), SCALARS, max_size=2),
    st.sampled_from(
        ["food", "sport", 0, 1, 0.5, ["food"], [0, 1], "[1, 0]", "food ", "2020-01-01"]
    ),
)
TABLES = st.lists(
    st.fixed_dictionaries({}, optional={"text": CELLS | st.just("a text"), "label": CELLS}),
    max_size=12,
)


def try_rows(rows: list[dict[str, Any]], repeats: int, task: str) -> str:
    """JSON lines whose cells are of any kind."""

    def use(folder: Path) -> None:
        lines = [json.dumps(row) for row in rows * repeats]
        (folder / "file.jsonl").write_text("\n".join(lines), "utf-8")
        use_data("file.jsonl", task)

    return in_folder(use)


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "text": st.sampled_from(
            [["text"], ["label"], ["nope"], ["text", "text"], ["text", "label"], []]
        ),
        "label": st.sampled_from(["label", "text", "nope", None, ["label"], ["label", "text"]]),
        "labels": st.sampled_from([["food", "sport"], ["food"], [], ["food", "food"], ["0", "1"]]),
        "train": st.sampled_from(["train", "nope", ""]),
        "validation": st.sampled_from(["train", "nope", None]),
        "unlabelled": st.sampled_from(["nope.csv", "train", "file.csv", ""]),
        "labelled": st.sampled_from([1, 2, 5, 1000]),
        "holdout": st.sampled_from([0.01, 0.5, 0.49]),
        "config": st.sampled_from(["x", ""]),
    },
)


def try_settings(settings: dict[str, Any], task: str) -> str:
    """A correct file, read with other settings of `data`."""

    def use(folder: Path) -> None:
        (folder / "file.csv").write_bytes(FORMATS["csv"](frame(task)))
        use_data("file.csv", task, **settings)

    return in_folder(use)


# ---- configs of models

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
CONFIG_KEYS = [
    *(*SIZES, "model_type", "hidden_act", "layer_norm_eps", "hidden_dropout_prob", "vocab_size"),
    *("num_key_value_heads", "initializer_range", "type_vocab_size", "rope_parameters", "nope"),
]
CONFIG_CHANGES = st.dictionaries(
    st.sampled_from(CONFIG_KEYS), VALUES | st.integers(-3, 40), min_size=1, max_size=2
)


def try_config(family: str, changes: dict[str, Any]) -> str:
    """A model built from a config with other values."""
    config = {"model_type": family, **SIZES} | changes
    task = SingleLabelClassification(8)
    task.names = ("food", "sport")

    def use(_: Path) -> None:
        models.check_config_keys(config, "teacher.config")
        models.load(None, config, task, "teacher", tokenizer())

    return in_folder(use)


# kind -> function and the strategies of its arguments
KINDS: dict[str, tuple[Callable[..., str], tuple[Any, ...]]] = {
    "recipes, values of other kinds": (try_recipe, (st.sampled_from([*LINES]), CHANGES)),
    "recipes, damaged bytes": (try_damaged_recipe, (st.sampled_from([*LINES]), damages())),
    "command lines": (try_command_line, (st.lists(WORDS, min_size=1, max_size=3),)),
    "data files, damaged bytes": (
        try_damaged_data,
        (st.sampled_from([*FORMATS]), st.sampled_from([*TASKS]), damages()),
    ),
    "data cells": (try_rows, (TABLES, st.integers(1, 8), st.sampled_from([*TASKS]))),
    "data settings": (try_settings, (SETTINGS, st.sampled_from([*TASKS]))),
    "configs of models": (try_config, (st.sampled_from(["bert", "llama"]), CONFIG_CHANGES)),
}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
