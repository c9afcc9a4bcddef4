"""Compression techniques: Lightning callbacks that apply the functions of `distill/compress`.

README.md in this folder describes each of them for users.

| file | contents |
|---|---|
| `compression.py` | the base class of all techniques: schedule, checks, state |
| `structure_base.py` | the base class of the removal of neurons, heads and layers |
| `prune_structure.py` | `PruneNeurons`, `PruneHeads` |
| `prune_layers.py` | `PruneLayers`: transformer blocks |
| `factorize.py` | `Factorize`: low-rank factors of linear layers |
| `prune_weights.py` | `PruneWeights`: individual weights |
| `quantize.py` | `Quantize`: weights, embeddings and activations with few bits |
| `trim_vocabulary.py` | `TrimVocabulary`: tokens that no training text uses |
| `save_dense.py` | `SaveDense`: the student before compression, for comparison |
"""

from distill.callbacks.compression import Compression
from distill.callbacks.factorize import Factorize
from distill.callbacks.prune_layers import PruneLayers
from distill.callbacks.prune_structure import PruneHeads, PruneNeurons
from distill.callbacks.prune_weights import PruneWeights
from distill.callbacks.quantize import Quantize
from distill.callbacks.trim_vocabulary import TrimVocabulary

__all__ = [
    "Compression",
    "Factorize",
    "PruneHeads",
    "PruneLayers",
    "PruneNeurons",
    "PruneWeights",
    "Quantize",
    "TrimVocabulary",
]
