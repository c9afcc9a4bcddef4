"""Models behind servers: a teacher's log-probabilities, checked and stored, and the student's
completions.

| file | contents |
|---|---|
| `client.py` | requests over HTTP, repeated while the server is busy or cannot be reached |
| `server_kinds.py` | how vLLM, SGLang and llama.cpp give log-probabilities of a prompt |
| `token_log_probs.py` | what a server returned for one example, and whether it is valid |
| `server_checks.py` | is it the right model, the right tokenizer, and the same result again |
| `served_outputs.py` | examples -> columns of the teacher's outputs, requested chunk by chunk |
| `completion_servers.py` | vLLM and SGLang as writers of the student's completions |
| `stored_chunks.py` | the results of a chunk in the store, and all of them as one entry |
"""

from distill.served.client import Client
from distill.served.completion_servers import SETTING, CompletionServer, connect_writer
from distill.served.served_outputs import ServedTeacher, columns_of_run, served_columns
from distill.served.server_kinds import connect

__all__ = [
    "SETTING",
    "Client",
    "CompletionServer",
    "ServedTeacher",
    "columns_of_run",
    "connect",
    "connect_writer",
    "served_columns",
]
