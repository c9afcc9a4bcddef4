"""A small setting of each technique; each row goes through resume, two-process and export tests."""

from typing import Any


def technique(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"distill.callbacks.{name}", **arguments}


RAMP = {"start": 0.2, "end": 0.6, "every": 1}
HALF = {"amount": 0.5, **RAMP}

# row -> export format, callbacks of the recipe
TECHNIQUES: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("packed", {"prune": technique("PruneWeights", sparsity=0.6, **RAMP)}),
    "global": (
        "packed",
        {"prune": technique("PruneWeights", sparsity=0.6, scope="global", **RAMP)},
    ),
    "movement": (
        "packed",
        {"prune": technique("PruneWeights", sparsity=0.5, score="movement", **RAMP)},
    ),
    "wanda": (
        "packed",
        {"prune": technique("PruneWeights", sparsity=0.5, score="wanda", scope="row", **RAMP)},
    ),
    "2:4": ("packed", {"prune": technique("PruneWeights", pattern="2:4", **RAMP)}),
    "neurons": ("dense", {"neurons": technique("PruneNeurons", **HALF)}),
    "neurons, unequal": (
        "dense",
        {"neurons": technique("PruneNeurons", equal=False, score="magnitude", **HALF)},
    ),
    "neurons, stepwise": (
        "dense",
        {"neurons": technique("PruneNeurons", stepwise=True, score="gradient", **HALF)},
    ),
    "heads": ("dense", {"heads": technique("PruneHeads", **HALF)}),
    "layers": ("dense", {"layers": technique("PruneLayers", layers=[0], start=0.4)}),
    "int8": (
        "torchao",
        {"quantize": technique("Quantize", bits=8, activations="dynamic", start=0.3)},
    ),
    "int8, static": (
        "packed",
        {"quantize": technique("Quantize", bits=8, activations="static", start=0.3)},
    ),
    "4 bit": ("packed", {"quantize": technique("Quantize", bits=4, start=0.3)}),
    "3 bit, symmetric": (
        "packed",
        {"quantize": technique("Quantize", bits=3, symmetric=True, group=8, start=0.3)},
    ),
    "codebook": (
        "packed",
        {"quantize": technique("Quantize", bits=3, method="codebook", start=0.3, every=2)},
    ),
    "nf4": (
        "packed",
        {"quantize": technique("Quantize", bits=4, method="nf4", group=16, start=0.3)},
    ),
    "factors": ("dense", {"factorize": technique("Factorize", rank=4, start=0.3)}),
    "factors, weighted": (
        "dense",
        {"factorize": technique("Factorize", energy=0.6, weighted=True, start=0.3)},
    ),
    "vocabulary": ("dense", {"vocabulary": technique("TrimVocabulary")}),
    "sparse and quantized": (
        "packed",
        {
            "quantize": technique("Quantize", bits=8, start=0.3),
            "prune": technique("PruneWeights", sparsity=0.5, **RAMP),
        },
    ),
    "everything": (
        "packed",
        {
            "neurons": technique("PruneNeurons", amount=0.5, start=0.1, end=0.3, every=1),
            "heads": technique("PruneHeads", amount=0.5, start=0.1, end=0.3, every=1),
            "factorize": technique(
                "Factorize", rank=4, start=0.3, layers=["*attention.output.dense"]
            ),
            "prune": technique("PruneWeights", sparsity=0.5, start=0.4, end=0.6, every=1),
            "quantize": technique("Quantize", bits=4, group=8, start=0.6),
            "vocabulary": technique("TrimVocabulary"),
        },
    ),
}
