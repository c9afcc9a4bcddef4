"""How a task reads the text columns of a source; the defaults are for plain texts."""

from collections.abc import Iterable
from typing import Any


class TextReading:
    """The part of :class:`distill.tasks.Task` that turns cells into texts."""

    @property
    def reads_messages(self) -> bool:
        """Whether a text is a conversation."""
        return False

    def parse_text(self, cell: Any, tools: Any) -> str:
        """A conversation, with the cell of the column `tools`, as text; empty if it is dropped.

        Raises:
            ValueError: The message says what the cell should be.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no messages")

    def plain_texts(self, texts: Iterable[str]) -> Iterable[str]:
        """What is written in texts, from which a tokenizer is trained."""
        return texts

    def added_texts(self, tokenizer: Any) -> list[str]:
        """What encoding adds to the texts of a source: a chat template."""
        return []

    def prepare_tokenizer(self, tokenizer: Any) -> None:
        """Change a tokenizer in place, if needed, before it is used and saved."""
