"""Our engine against bare vLLM on the same requests, in turn, each in a process of its own.

    python benchmarks/rollout.py --model models/smollm2

Bare vLLM is ``LLM.generate`` with its own defaults for log-probs (one object a token), the same scheduler limits, and
the same environment, in which OpenMP threads do not spin.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
from _common import arguments, in_turn, machine, median, print_result, print_table, ratio

from dppo_lightning.generate.engine import EngineSpec, Request, Sampling
from dppo_lightning.generate.vllm.embedded import VLLMEmbedded
from dppo_lightning.generate.vllm.settings import ENVIRONMENT


def make_prompts(count: int, length: int, words: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(5, words, (count, length)).tolist()


class Ours:
    def __init__(self, engine: VLLMEmbedded, prompts: list[list[int]], args: dict[str, int], topk: int) -> None:
        self.engine, self.prompts, self.args, self.topk, self.round = engine, prompts, args, topk, 0

    def __call__(self) -> None:
        self.round += 1
        sampling = Sampling(max_new_tokens=self.args["tokens"], topk_logprobs=self.topk)
        requests = [
            Request(f"{self.topk}/{self.round}/{i}/{j}", tuple(prompt), sampling, seed=1000 * i + j)
            for i, prompt in enumerate(self.prompts)
            for j in range(self.args["samples"])
        ]
        self.engine.submit(requests)
        tokens = done = 0
        while done < len(requests):
            arrived = self.engine.poll()
            done += len(arrived)
            tokens += sum(len(completion) for completion in arrived)  # type: ignore[arg-type]
        assert tokens == len(requests) * self.args["tokens"]


class Bare:
    """A child that generates when it is told to."""

    def __init__(self, child: subprocess.Popen[str], topk: int) -> None:
        self.child, self.topk = child, topk

    def __call__(self) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        print(self.topk, file=self.child.stdin, flush=True)
        while (line := self.child.stdout.readline()) != "done\n":
            if not line:
                raise RuntimeError("bare vLLM died")


def serve_bare(model: str, prompts: list[list[int]], samples: int, tokens: int) -> None:
    """In the child: one generation for each line of standard input."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=len(prompts[0]) + tokens,
        max_logprobs=20,
        logprobs_mode="processed_logprobs",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_num_seqs=256,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=2**30,
    )
    print("done", flush=True)
    for line in sys.stdin:
        params = [
            SamplingParams(max_tokens=tokens, seed=1000 * i + j, logprobs=int(line), detokenize=False, ignore_eos=True)
            for i in range(len(prompts))
            for j in range(samples)
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(samples)]
        llm.generate(inputs, params, use_tqdm=False)
        print("done", flush=True)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--words", type=int, default=40000, help="prompts are random ids from 5 to this")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--bare", action="store_true", help="be the child that runs bare vLLM")
    args = parser.parse_args()
    prompts = make_prompts(args.prompts, args.prompt_length, args.words)
    if args.bare:
        serve_bare(args.model, prompts, args.samples, args.tokens)
        return
    print(machine())
    child = subprocess.Popen(
        [sys.executable, __file__, "--bare", *sys.argv[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"},
    )
    assert child.stdout is not None
    while (line := child.stdout.readline()) != "done\n":
        if not line:
            raise RuntimeError("bare vLLM did not start")
    engine = VLLMEmbedded()
    engine.start(EngineSpec(args.model, "float32", args.prompt_length + args.tokens, max_logprobs=20))
    try:
        shape = {"samples": args.samples, "tokens": args.tokens}
        candidates = {
            "ours": Ours(engine, prompts, shape, 0),
            "bare vLLM": Bare(child, 1),
            "ours, top-20": Ours(engine, prompts, shape, 20),
            "bare vLLM, top-20": Bare(child, 20),
        }
        seconds = in_turn(candidates, args.rounds)
    finally:
        engine.close()
        child.terminate()
        child.wait()
    total = args.prompts * args.samples * args.tokens
    rows = [[n, f"{median(seconds, n):.2f}", f"{total / median(seconds, n):.0f}"] for n in candidates]
    print_table(["", "seconds", "tokens/s"], rows)
    print_result(
        {
            "vs_bare_vllm": ratio(seconds, "bare vLLM", "ours"),
            "vs_bare_vllm_top20": ratio(seconds, "bare vLLM, top-20", "ours, top-20"),
        }
    )


if __name__ == "__main__":
    main()
