import os

import llm_shared  # noqa: F401  before torch: how OpenMP's threads wait

os.environ["LLM_OFFLINE"] = "1"  # also in the notebooks' kernels
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
