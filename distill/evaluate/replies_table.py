"""Generation in the table of metrics.json, and replies of the models side by side."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from distill.evaluate.record_parts import Generation, Interval, Replies
from distill.evaluate.records import MODELS, Metrics
from distill.evaluate.table_cells import Row, metric_row

MAX_CHARACTERS = 400  # of a prompt or a reply that are shown; metrics.json has them complete

# field of Generation -> name of the row and factor of the shown value
FIELDS = {
    "stopped": ("share of replies that stop", 1.0),
    "tokens": ("tokens of a reply", 1.0),
    "distinct_1": ("distinct tokens", 1.0),
    "distinct_2": ("distinct pairs of tokens", 1.0),
    "agreement": ("agreement with the teacher", 1.0),
    "divergence": ("{divergence} from the teacher", 1.0),
    "first_token_ms": ("time to the first token, ms", 1.0),
    "token_ms": ("time of each later token, ms", 1.0),
    "tokens_per_s": ("tokens/s, one reply", 1.0),
    "batch_tokens_per_s": ("tokens/s, a batch of replies", 1.0),
    "cache_bytes_per_token": ("cache, bytes per token", 1.0),
    "memory_peak_bytes": ("peak memory of the process, MB", 1e-6),
    "device_peak_bytes": ("peak memory on the device, MB", 1e-6),
}
SCORES = {
    "exact_match": "replies equal to the reference",
    "word_f1": "F1 of the reference's words",
    "valid_json": "replies that are a JSON object",
    "field_f1": "F1 of the reference's fields",
    "exact_object": "replies with exactly these fields",
}


def rows(metrics: Metrics) -> Iterator[Row]:
    """The lines of generation; none if it was not measured."""
    records = [
        metrics.models[name].generation if name in metrics.models else None for name in MODELS
    ]
    for field, (name, factor) in FIELDS.items():
        values = [_scaled(record, field, factor) for record in records]
        if values[-1] is not None:  # the student's
            yield metric_row("generation", name.format(divergence=metrics.divergence), values)
    for score, name in SCORES.items():
        scores = [None if record is None else record.scores.get(score) for record in records]
        if scores[-1] is not None:
            yield metric_row("generation", name, scores)


def _scaled(record: Generation | None, field: str, factor: float) -> Interval | None:
    """A value as it is shown; an interval without ends where it has none."""
    value = getattr(record, field, None)
    if value is None or isinstance(value, Interval):
        return value
    return Interval(value * factor, float("nan"), float("nan"))


def conditions(replies: Replies | None) -> str:
    """A sentence of the caption: how the replies were generated."""
    if replies is None:
        return ""
    return (
        f" Generation: greedy replies to {replies.prompts:,} prompts, of at most "
        f"{replies.max_new_tokens} tokens; agreement and divergence on the tokens of a model's own "
        f"replies; times and cache with all of these tokens, in batches of {replies.batch}."
    )


def markdown(replies: Replies | None) -> list[str]:
    """Lines of Markdown with some replies of all models side by side."""
    if replies is None:
        return []
    titles = _titles(replies)
    lines = ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return lines + [
        f"| {' | '.join(_escape(text) for text in _texts(example, titles))} |"
        for example in replies.examples
    ]


def _titles(replies: Replies) -> list[str]:
    """`prompt`, `reference`, and the models that replied."""
    return [title for title in ("prompt", "reference", *MODELS) if title in replies.examples[0]]


def _texts(example: dict[str, str], titles: list[str]) -> list[str]:
    """The end of the prompt, and the beginnings of the replies."""
    prompt, *texts = (example[title].strip() for title in titles)
    end = prompt if len(prompt) <= MAX_CHARACTERS else f"...{prompt[-MAX_CHARACTERS:]}"
    return [end, *(_beginning(text) for text in texts)]


def _beginning(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


def _escape(text: str) -> str:
    """The text as a cell of a Markdown table, in one line."""
    for character in "\\|<>*_`[]":
        text = text.replace(character, f"\\{character}")
    return "<br>".join(line.strip() for line in text.strip().splitlines())


def table(replies: Replies) -> Table:
    """Some replies of all models side by side, for a terminal."""
    rendered = Table(pad_edge=False, show_lines=True, expand=True)
    titles = _titles(replies)
    for title in titles:
        rendered.add_column(title, ratio=1)
    for example in replies.examples:
        rendered.add_row(*map(Text, _texts(example, titles)))
    return rendered
