"""Runs under SLURM.

script    ``dppo slurm``: the batch script of a run
check     the set-up of a job, before the trainer starts
requeue   saving a run when the job's time is up, and going on
job       what a run that srun started has in addition
"""

from dppo_lightning.run.slurm.job import Requeue

__all__ = ["Requeue"]
