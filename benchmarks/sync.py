"""A weight update into the embedded vLLM engine: seconds and bytes; and seconds to replace its process when it dies.

python benchmarks/sync.py --model models/smollm2 --dtype float32
"""

from __future__ import annotations

import os
import signal
import statistics
import time

from _common import arguments, machine, print_result, print_table

from dppo_lightning.generate.engine import EngineSpec
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.train.policy import Policy


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--dtype", default="float32", help="of the engine; the trainer's is float32")
    args = parser.parse_args()
    print(machine())
    policy, engine = Policy(args.model), VLLMEmbedded()
    engine.start(EngineSpec(args.model, args.dtype, 128))
    try:
        updates = [engine.update_weights(policy.named_weights(), version) for version in range(1, args.rounds + 2)][1:]
        restart = restart_seconds(engine)
    finally:
        engine.close()
    seconds = statistics.median(update.seconds for update in updates)
    sent = updates[0].bytes
    print_table(
        ["tensors", "MB", "seconds", "seconds to replace the process"],
        [[str(updates[0].tensors), f"{sent / 1e6:.0f}", f"{seconds:.3f}", f"{restart:.1f}"]],
    )
    print_result({"seconds": seconds, "gb_per_s": sent / 1e9 / seconds, "restart_seconds": restart})


def restart_seconds(engine: VLLMEmbedded) -> float:
    """From the death of the engine's process until a new one holds the last weights."""
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    started = time.perf_counter()
    engine.pause()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
