"""The student of a run folder -> an exported folder, published once it is proven.

| module | contents |
|---|---|
| `command.py` | the command `distill export` |
| `draft.py` | writes an export once, under a hidden name, and publishes it once proven |
| `verify_folder.py` | the proof of an export that transformers loads |
| `verify_program.py` | the proof of a runtime's export |
| `proof_inputs.py` | the inputs of a proof: held-out texts and the student's logits |
| `checks.py` | requirements of every export: loadable, equal, smaller |
| `proof_record.py` | the contents of proof.json |
| `card.py` | the model card |
| `card_metadata.py` | its metadata, as the Hub reads them: base models, license, results |

`packing/` writes the formats. Importing this package does not import torch.
"""

from distill.export.command import Options, export_folder, main
from distill.export.draft import FINAL, Draft, export, prove_and_publish, write_draft

__all__ = [
    "FINAL",
    "Draft",
    "Options",
    "export",
    "export_folder",
    "main",
    "prove_and_publish",
    "write_draft",
]
