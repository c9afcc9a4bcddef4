"""When a technique is applied to the student: thin classes over the functions of `compress/`.

| file | what it owns |
|---|---|
| `base.py` | what all techniques share: the schedule, what a checkpoint holds, what they may act on |
| `prune_structure.py` | neurons and attention heads |
| `prune_layers.py` | whole blocks |
| `factorize.py` | linear layers as products of two |
| `prune_weights.py` | single weights |
| `quantize.py` | weights, embeddings and activations of few bits |
| `vocabulary.py` | tokens that no training text holds |
"""

from distill.callbacks.base import Compression
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
