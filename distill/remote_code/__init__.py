"""All that a compressed model needs to load, beside torch, safetensors and transformers: the two files that travel with an export.

| file | what it owns |
|---|---|
| `modeling.py` | the modules that `config.compression` describes, and what codes mean |
| `container.py` | the layout of `packed.safetensors`, and loading through transformers |
"""
