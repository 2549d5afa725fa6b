"""The estimate of `dppo doctor` against the peak of a process that trains a real model for one step."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dppo_lightning.run.doctor.memory import MIB, ModelShape, Plan, activations, head, model_states, total
from dppo_lightning.run.prepare import prepare
from tests.helpers.places import ROOT

PROMPT, NEW, ROWS = 64, 64, 4

STEP = """
import json, re, sys
import numpy as np, torch
from dppo_lightning.base.batch import pack
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.train.policy import Policy
from dppo_lightning.base.records import Sequence
from dppo_lightning.trust_region import BinaryTV

model, checkpointing, prompt, new, rows = sys.argv[1], sys.argv[2] == "True", *map(int, sys.argv[3:])

def peak():
    # of this program alone: getrusage would begin with the peak of the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])

before = peak()
policy = Policy(model, gradient_checkpointing=checkpointing)
optimizer = torch.optim.AdamW(policy.parameters(), foreach=False)
ids = np.random.default_rng(0).integers(0, 49152, (rows, prompt + new))
logp, versions = np.full(new, -9.0, np.float32), np.zeros(new, int)
sequences = [Sequence(row, np.arange(prompt, prompt + new), logp, versions, 1.0) for row in ids]
for _ in range(2):
    batch = pack(sequences, np.full(rows, 1e-3), policy.layout)
    policy.head(policy.hidden_states(batch), batch, Objective(BinaryTV(), ReferenceKL(), 0.0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
print(json.dumps(peak() - before))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    prepare("smollm2", str(folder))
    return str(folder)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_smollm2_peaks_about_where_it_is_said_to(smollm2: str, checkpointing: bool) -> None:
    plan = Plan(gradient_checkpointing=checkpointing, micro_batch=ROWS, prompt_tokens=PROMPT, new_tokens=NEW)
    shape = ModelShape.from_name(smollm2)
    said = total([*model_states(shape, plan), activations(shape, plan), head(shape, plan)])
    arguments = [smollm2, str(checkpointing), *map(str, (PROMPT, NEW, ROWS))]
    done = subprocess.run(
        [sys.executable, "-c", STEP, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"estimated {said / MIB:,.0f} MiB, measured {measured / MIB:,.0f} MiB")
    assert 0.7 < said / measured < 1.4
