"""Scripts of `distill.isolated`. Nothing here imports `distill`.

| script | what it returns |
|---|---|
| `time_models.py` | latency and throughput of transformers models, which take turns |
| `model_memory.py` | parameters and peak memory of one model |
| `time_generation.py` | times of the tokens that models generate, in turns; bytes of their caches |
| `generation_memory.py` | peak memory of one model that generates |
| `harness.py` | metrics of lm-eval's tasks |
| `time_runtimes.py` | latency and throughput of a student in several runtimes, which take turns |
| `runtime_predictions.py` | predictions and peak memory of one of them |
| `transformers_proof.py` | outputs of an exported folder, loaded by plain transformers |
| `program_proof.py` | outputs of the program of a runtime's export |

| shared module | contents |
|---|---|
| `measurements.py` | wall times, percentiles, peak memory, the machine |
| `runtime_models.py` | loads a model for one runtime |
"""
