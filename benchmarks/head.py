"""The LM head and the loss against full logits, TRL's chunked kernel and bare matrix products, in one run.

    python benchmarks/head.py

Work: log-probs of N tokens over V words from hidden states of width H, the DPPO loss (binary TV), and the gradients of
hidden states and weight. "ours" computes what that takes and no entropy. Needs the extra "bench".
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from _common import arguments, in_turn, machine, median, need_peers, peak_extra_mb, print_result, print_table, ratio
from torch import Tensor, nn

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.train.head import HeadOutput, PolicyHead
from dppo_lightning.train.logits import LogitTransform
from dppo_lightning.train.objective import Objective, ReferenceKL
from dppo_lightning.trust_region import BinaryTV, FullTV, TopKTV
from dppo_lightning.trust_region.base import TokenStats, TrustRegion


class Case:
    """One problem and the ways to solve it."""

    def __init__(self, tokens: int, words: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter((torch.randn(words, width, generator=g) * 0.1).to(dtype))
        self.hidden = torch.randn(tokens, width, generator=g).to(dtype).requires_grad_()
        projection = nn.Linear(1, 1, bias=False)
        projection.weight = self.weight
        self.head = PolicyHead(projection, LogitTransform())
        topk = torch.randint(words, (tokens, 21), generator=g)
        self.batch = TrainingBatch(
            input_ids=torch.zeros(1, 1, dtype=torch.int64),
            predict_index=torch.arange(tokens),
            targets=torch.randint(words, (tokens,), generator=g),
            rollout_logp=torch.full((tokens,), -11.0),
            advantage=torch.randn(tokens, generator=g),
            weight=torch.full((tokens,), 1 / tokens),
            sequence=torch.zeros(tokens, dtype=torch.int64),
            position=torch.arange(tokens),
            version=torch.zeros(tokens, dtype=torch.int64),
            step=0,
            real_tokens=tokens,
            topk_ids=topk,
            rollout_topk_logp=torch.full((tokens, 21), -11.0),
        )

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def ours(self, region: TrustRegion | None = None, entropy: bool = False) -> HeadOutput:
        self.clear()
        output = self.head(self.hidden, self.batch, Objective(region or BinaryTV(), ReferenceKL()), entropy=entropy)
        output.loss.backward()
        return output

    def ours_entropy(self) -> HeadOutput:
        return self.ours(entropy=True)

    def ours_topk_entropy(self) -> HeadOutput:
        return self.ours(TopKTV(), entropy=True)

    def prepare_full_tv(self) -> None:
        self.head.remember_rollout()
        self.batch = replace(self.batch, rollout_hidden=self.hidden.detach())

    def ours_full_tv(self) -> HeadOutput:
        if self.batch.rollout_hidden is None:
            self.prepare_full_tv()
        return self.ours(FullTV(0.15))

    def full_logits(self) -> Tensor:
        self.clear()
        table = (self.hidden @ self.weight.t()).float().log_softmax(dim=-1)
        self._loss(table.gather(1, self.batch.targets[:, None]).squeeze(1)).backward()
        return table.detach()

    def trl(self) -> None:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE  # what its trainer uses

        self.clear()
        logp = ChunkedLogProbFunction.apply(
            self.hidden, self.weight, None, self.batch.targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]
        self._loss(logp).backward()

    def matmul(self) -> Callable[[], object]:
        """The forward product alone, into memory that is there: a third of the operations of the whole."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        room = torch.empty(len(hidden), len(weight), dtype=hidden.dtype)
        return lambda: torch.mm(hidden, weight.t(), out=room)

    def _loss(self, logp: Tensor) -> Tensor:
        batch = self.batch
        stats = TokenStats(logp=logp, rollout_logp=batch.rollout_logp, advantage=batch.advantage)
        return (batch.weight * BinaryTV()(stats).loss).sum()


def memory(candidate: str, tokens: int, words: int, width: int) -> float:
    """Extra memory of one run, in MB; a small one goes first, so that the libraries' own buffers do not count."""
    small = Case(32, words, width)
    getattr(small, candidate)()
    del small
    case = Case(tokens, words, width)
    if candidate == "ours_full_tv":
        case.prepare_full_tv()
    return peak_extra_mb(getattr(case, candidate))


def in_new_process(candidate: str, *size: int) -> float:
    options = [f"--{name}={value}" for name, value in zip(("tokens", "words", "width"), size, strict=True)]
    command = [sys.executable, __file__, "--measure", candidate, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--words", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--measure", help="print the extra memory of one candidate in MB, and nothing else")
    parser.add_argument("--long", type=int, default=16384, help="tokens of the second memory measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = (args.words, args.width)
    if args.measure:
        print(memory(args.measure, args.tokens, *size))
        return
    need_peers()
    extra = {name: in_new_process(name, args.tokens, *size) for name in ("ours", "full_logits", "trl", "ours_full_tv")}
    extra_long = in_new_process("ours", args.long, *size)
    print(machine())
    case, coarse = Case(args.tokens, *size), Case(args.tokens, *size, torch.bfloat16)
    candidates: dict[str, Callable[[], object]] = {
        "ours": case.ours,
        "full_logits": case.full_logits,
        "trl": case.trl,
        "one_product": case.matmul(),
        "ours_entropy": case.ours_entropy,
        "ours_topk_entropy": case.ours_topk_entropy,
        "ours_full_tv": case.ours_full_tv,
        "ours_bf16": coarse.ours,
    }
    seconds = in_turn(candidates, args.rounds, args.clock)
    rows = [
        [
            name,
            f"{median(seconds, name):.3f}",
            f"{ratio(seconds, 'ours', name):.2f}",
            f"{extra[name]:.0f}" if name in extra else "",
        ]
        for name in candidates
    ]
    print(
        f"{args.tokens} tokens x {args.words} words x {args.width}, median of {args.rounds} rounds, {args.clock} clock"
    )
    print_table(["", "seconds", "ours / this", "extra MB"], rows)

    # The reference has the same rounded weights and hidden states, and multiplies them in fp32.
    exact = (coarse.hidden.detach().float() @ coarse.weight.detach().float().t()).log_softmax(dim=-1)
    entropy = coarse.ours(entropy=True).entropy
    assert entropy is not None
    error = (entropy + (exact.exp() * exact).sum(dim=-1)).abs()
    print_result(
        {
            "time_vs_trl": ratio(seconds, "ours", "trl"),
            "time_vs_full_logits": ratio(seconds, "ours", "full_logits"),
            "of_matmul_speed": 3 * ratio(seconds, "one_product", "ours"),
            "extra_mb": extra["ours"],
            "extra_mb_16k": extra_long,
            "extra_mb_trl": extra["trl"],
            "extra_mb_full_tv": extra["ours_full_tv"],
            "extra_mb_full_logits": extra["full_logits"],
            "bf16_speedup": ratio(seconds, "ours", "ours_bf16"),
            "bf16_entropy_error": float(error.max()),
            "bf16_entropy_error_mean": float(error.mean()),
            "topk_entropy_overhead": ratio(seconds, "ours_topk_entropy", "ours") - 1,
            "full_tv_overhead": ratio(seconds, "ours_full_tv", "ours"),
        }
    )


if __name__ == "__main__":
    main()
