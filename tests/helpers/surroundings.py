"""What a test may not depend on: the user's settings, the machine's cores, the terminal."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

PREFIXES = (
    *("DPPO_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "VLLM_", "PL_", "LIGHTNING_", "DS_", "DEEPSPEED_"),
    *("SLURM", "SRUN_", "SBATCH_", "PMI_", "OMPI_", "TORCH", "NCCL_", "GLOO_", "CUDA_", "NVIDIA_"),
    *("OMP_", "MKL_", "KMP_", "GOMP_", "LC_", "COV_CORE_"),
)
NAMES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY", "NO_PROXY", "LANG", "LANGUAGE", "PYTHONWARNINGS"),
    *("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TOKENIZERS_PARALLELISM"),
}
KEPT = {
    "DPPO_NO_SLURM",  # the slow suite's own: this machine cannot have SLURM
    "TORCH_EXTENSIONS_DIR",  # where a machine keeps what was compiled
}
SET = {
    "HF_HUB_OFFLINE": "1",  # no test asks the network
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",  # the same sums on any number of cores; two workers have one core each
    "OMP_WAIT_POLICY": "passive",  # spinning threads slow down tiny models
    "CUDA_VISIBLE_DEVICES": "",  # the suite is for any machine; what needs a GPU is measured by benchmarks
    "MPLBACKEND": "agg",
    "NO_PROXY": "*",  # also what a system's own settings would send through a proxy
}

TERMINAL = {"TERM": "dumb", "COLUMNS": "80", "LINES": "24"}
"""Set after pytest has looked at the real one."""


def without_the_users_settings(environ: MutableMapping[str, str]) -> None:
    """Leave what every machine has the same. Before torch loads: it reads some of these once."""
    for name in list(environ):
        if name not in KEPT and (name.upper() in NAMES or name.startswith(PREFIXES)):
            del environ[name]
    environ.update(SET)
    os.umask(0o022)
