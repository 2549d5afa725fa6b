"""ZeroStrategy's settings, and that deepspeed is not there before a run needs it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.scaling.zero import ZeroStrategy


def test_the_settings_are_deepspeeds() -> None:
    sizes: dict[str, Any] = {"reduce_bucket_size": 7, "allgather_bucket_size": 8}
    two = ZeroStrategy(stage=2, offload_optimizer="cpu", **sizes).config["zero_optimization"]
    assert (two["stage"], two["reduce_bucket_size"], two["allgather_bucket_size"]) == (2, 7, 8)
    assert two["offload_optimizer"]["device"] == "cpu"
    assert not any(name.startswith("stage3") for name in two)
    three = ZeroStrategy(
        stage=3,
        offload_optimizer="nvme",
        offload_parameters="nvme",
        nvme_path="scratch",
        param_persistence_threshold=1,
        prefetch_bucket_size=2,
        max_live_parameters=3,
    ).config["zero_optimization"]
    assert three["stage3_param_persistence_threshold"] == 1
    assert three["stage3_prefetch_bucket_size"] == 2
    assert three["stage3_max_live_parameters"] == 3
    for name in ("offload_optimizer", "offload_param"):
        assert (three[name]["device"], three[name]["nvme_path"]) == ("nvme", "scratch")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 0}, "stage must be 1, 2 or 3, got 0"),
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters='cpu' needs stage 3, got stage 2"),
        ({"stage": 1, "offload_optimizer": "nvme", "nvme_path": "x"}, "offload_optimizer='nvme' needs stage 3"),
        ({"stage": 3, "offload_optimizer": "nvme"}, "needs nvme_path"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ZeroStrategy(**settings)


def test_a_missing_deepspeed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else found(name, *a))
    with pytest.raises(ConfigError, match=r"^deepspeed is not installed: pip install 'dppo-lightning\[deepspeed\]'$"):
        ZeroStrategy()


def test_deepspeed_is_imported_by_a_run_alone() -> None:
    code = (
        "import sys; from dppo_lightning.scaling.zero import ZeroStrategy; import dppo_lightning.train.module; "
        "ZeroStrategy(stage=3); assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_says_which_lock_it_would_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "of a killed build" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    strategy = ZeroStrategy()
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # its import fails: what comes after the warning is not run
    strategy.accelerator = CPUAccelerator()
    strategy.parallel_devices = [torch.device("cpu")]
    for age, warnings in ((60, 0), (7200, 1)):
        os.utime(lock, (time.time() - age,) * 2)
        with pytest.raises(ImportError):
            strategy.setup_environment()
        assert len(caplog.messages) == warnings
    assert caplog.messages[0].endswith(f"if nothing is being compiled, rm '{lock}'")
    assert "\n" not in caplog.messages[0]
