"""Data sets that need no network, as functions that `data.source` names.

| file | contents |
|---|---|
| `installed.py` | news, the Python reference and small talk, from installed packages |
| `addresses.py` | addresses and their parts as conversations, from a file beside it |
| `generated_texts.py` | generated texts on four topics |
"""

from distill.corpora.addresses import addresses
from distill.corpora.generated_texts import generated
from distill.corpora.installed import bbc_news, chitchat, python_reference

__all__ = ["addresses", "bbc_news", "chitchat", "generated", "python_reference"]
