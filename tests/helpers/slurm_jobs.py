"""What SLURM tells a task of a job of one."""

ONE_TASK = {
    "SLURM_JOB_NAME": "dppo",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
}
