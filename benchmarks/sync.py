"""A weight update into the embedded vLLM engine: seconds and bytes.

python benchmarks/sync.py --model models/smollm2
"""

from __future__ import annotations

import statistics

from _common import arguments, machine, print_result, print_table

from dppo_lightning.policy import Policy
from dppo_lightning.rollout.engine import EngineSpec
from dppo_lightning.rollout.vllm_embedded import VLLMEmbedded


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="models/smollm2")
    args = parser.parse_args()
    print(machine())
    policy, engine = Policy(args.model), VLLMEmbedded()
    engine.start(EngineSpec(args.model, "float32", 128))
    try:
        updates = [engine.update_weights(policy.named_weights(), version) for version in range(1, args.rounds + 2)][1:]
    finally:
        engine.close()
    seconds = statistics.median(update.seconds for update in updates)
    sent = updates[0].bytes
    print_table(["tensors", "MB", "seconds"], [[str(updates[0].tensors), f"{sent / 1e6:.0f}", f"{seconds:.3f}"]])
    print_result({"seconds": seconds, "gb_per_s": sent / 1e9 / seconds})


if __name__ == "__main__":
    main()
