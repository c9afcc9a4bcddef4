"""Programs that are copied into the README.md of a runtime's export. Nothing imports them.

A program runs in the exported folder. `<program>_<format>.py` is named by `Task.program`:

- `run_*` define `predict(texts)`: the logits of a batch of texts or pairs of texts, (B, ...).
- `generate_*` define `predict(texts)`: the logits of the token that follows each text, (B, V);
  and, except on ExecuTorch, `generate(text, max_new_tokens)`: the ids of the tokens that follow.
"""
