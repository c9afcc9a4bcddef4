"""Recipes: YAML files and command lines -> a validated :class:`Run`, without importing torch.

| file | contents |
|---|---|
| `config.py` | the schema: :class:`Run` and its sections, every key documented below its field |
| `config_models.py` | the sections about data and models |
| `config_training.py` | the sections about the loss and the training |
| `schema.py` | the types of its keys |
| `validation.py` | checks of single values |
| `memory_keys.py` | checks of the keys that save memory against others |
| `compose.py` | reads, validates and saves recipes |
| `yaml_files.py` | files of recipes, read safely |
| `references.py` | `${...}` in recipes, and values of environment variables hidden |
| `explain.py` | errors of OmegaConf and Hydra -> one sentence |
| `targets.py` | `_target_`: a dotted path -> the class it names |
| `trust.py` | the modules that a recipe may name |
| `formats.py` | what each export format supports, as a table |
| `capabilities.py` | checks of recipes, techniques and tensors against that table |
| `arguments.py` | the command line -> arguments that Hydra accepts |
| `hydra_config.py` | the command line of `distill.train` |
| `help.py` | the text of its `--help` |
"""

from distill.recipe.compose import load_recipe
from distill.recipe.config import Run

__all__ = ["Run", "load_recipe"]
