"""The code of compressed models: two files that are copied into the exports that need them.

They need torch, safetensors and transformers only, and nothing else of this library.

| file | contents |
|---|---|
| `modeling.py` | `CompressionConfig`, the layers that it describes, dequantization |
| `container.py` | the file format `packed.safetensors`, and loading it through transformers |
"""

from distill.remote_code.container import CompressedModel
from distill.remote_code.modeling import CompressionConfig

__all__ = ["CompressedModel", "CompressionConfig"]
