"""A teacher behind an OpenAI-compatible server: its log-probabilities, checked and stored.

| file | contents |
|---|---|
| `client.py` | requests over HTTP, repeated while the server is busy or cannot be reached |
| `server_kinds.py` | how vLLM, SGLang and llama.cpp give log-probabilities of a prompt |
| `token_log_probs.py` | what a server returned for one example, and whether it is valid |
| `server_checks.py` | is it the right model, the right tokenizer, and the same result again |
| `served_outputs.py` | examples -> columns of the teacher's outputs, requested chunk by chunk |
| `stored_chunks.py` | the results of a chunk in the store, and all of them as one entry |
"""

from distill.served.client import Client
from distill.served.served_outputs import ServedTeacher, columns_of_run, served_columns
from distill.served.server_kinds import connect

__all__ = ["Client", "ServedTeacher", "columns_of_run", "connect", "served_columns"]
