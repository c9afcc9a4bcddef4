"""The programs that travel in the README.md of a runtime's export, and that its proof runs: nothing imports them.

Each is run in the exported folder and defines `answer(texts)`: a row of logits for each text, or pair of texts; of a language model
those of the token that follows. Of these, `*_generate.py` also defines `write(text, most)`: the ids of the tokens that it goes on with.
"""
