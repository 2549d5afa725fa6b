"""Every causal LM of transformers, tiny: are its log-probs, as they are trained, those of the model itself?

Each architecture is built with two small layers, random weights and every scale and cap of logits and attention that
its config knows, saved, and loaded as a policy. Then the log-probs of six sequences of 15 to 50 tokens, in rows and
packed, are held against those of transformers' plain ("eager") attention on each sequence alone. ``--write`` puts the
table into docs/models.md, and tests/slow/test_models.py holds the page to it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import tempfile
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dppo_lightning.base.batch import pack
from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.pretrained import load_model
from dppo_lightning.base.records import Completion, Prompt, Sequence
from dppo_lightning.train import attention
from dppo_lightning.train.policy import Policy

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- benchmarks/models.py writes from here -->\n", "<!-- to here -->"
VOCABULARY = 97
NEAR = 5e-4
"""Nats. The deepest of them (hrm_text) rounds by 1e-4, what is wrong with others began at 0.5."""
SECONDS = 60
"""For one architecture."""

_WIDTHS = "hidden_size n_embd d_model lru_width word_embed_proj_dim moe_intermediate_size expert_ffn_hidden_size"
_INNER = "intermediate_size ffn_dim decoder_ffn_dim n_inner ffn_hidden_size mamba_d_ssm"
_LAYERS = "num_hidden_layers n_layer n_layers num_layers decoder_layers"
_HEADS = "num_attention_heads n_head n_heads num_heads decoder_attention_heads"
_CONTEXTS = "max_position_embeddings n_positions max_seq_len n_ctx"
_EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts"
_CHOSEN = "num_experts_per_tok moe_k moe_topk"
_EIGHT = (
    "kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_n_heads mamba_d_head mamba_chunk_size index_topk "
    "linear_key_head_dim linear_value_head_dim block_size"
)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys((_WIDTHS + " shared_expert_intermediate_size").split(), 32),
    **dict.fromkeys(_INNER.split(), 64),
    **dict.fromkeys(_LAYERS.split(), 2),
    **dict.fromkeys(_HEADS.split(), 4),
    **dict.fromkeys(_CONTEXTS.split(), 128),
    **dict.fromkeys(_EXPERTS.split(), 4),
    **dict.fromkeys(_CHOSEN.split(), 2),
    **dict.fromkeys(_EIGHT.split(), 8),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "mamba_n_groups"], 1),
    **dict.fromkeys(["state_size", "mamba_d_conv", "time_step_rank", "conv_kernel", "linear_num_value_heads"], 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 16,
    "qk_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "rotary_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "linear_num_key_heads": 2,
    "partial_rotary_factor": 1.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "init_std": 0.2,
}
PLAIN = {key: value for key, value in SMALL.items() if key not in ("head_dim", "rotary_dim", "partial_rotary_factor")}
SIZES = (SMALL, PLAIN | {"num_key_value_heads": 4})
"""Tried one after the other: some configs derive what others want to be told."""

SCALES = {
    **dict.fromkeys(["logits_scaling", "lm_head_multiplier", "logit_scale"], 0.5),
    **dict.fromkeys(["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"], 2.0),
    "attn_logit_softcapping": 1.0,
}


class Row(NamedTuple):
    """One architecture: whether rows and packed sequences gave the model's own log-probs, and what is done with it."""

    name: str
    rows: str
    packed: str
    done: str


class NotTried(Exception):
    """An architecture that is not built here."""


def sequences() -> list[Sequence]:
    """Six, of three prompts."""
    numbers, rows = np.random.default_rng(0), []
    for prompt, lengths in ((20, [9, 30, 5]), (12, [14]), (20, [3, 3])):
        asked = Prompt("p", tuple(numbers.integers(3, VOCABULARY, prompt).tolist()), "")
        for length in lengths:
            ids, zeros = numbers.integers(3, VOCABULARY, length), np.zeros(length, np.int64)
            completion = Completion("r", ids, zeros.astype(np.float32), "stop", zeros)
            rows.append(Sequence.from_completion(asked, completion, 1.0))
    return rows


def save(kind: str, folder: str) -> None:
    """A tiny model of an architecture, with random weights."""
    error: Exception | None = None
    for sizes in SIZES:
        try:
            config = tiny(kind, sizes)
            torch.manual_seed(0)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > 15_000_000:
                raise NotTried(f"{size / 1e6:.0f}M parameters at the smallest")
            model = AutoModelForCausalLM.from_config(config).float()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.3 if parameter.shape[-1] <= 64 else 0.15)
            model.save_pretrained(folder)
            own(folder)
            return
        except NotTried:
            raise
        except Exception as failure:
            error = failure
    raise NotTried("cannot be built so small") from error


def tiny(kind: str, sizes: dict[str, Any]) -> Any:
    """A config with small sizes wherever it has a name for them."""
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict()
    if "text_config" in known or "decoder" in known:
        raise NotTried("made of several models")
    given = {name: value for name, value in (sizes | SCALES).items() if name in known}
    if known.get("layer_types"):
        given["layer_types"] = known["layer_types"][:2]
    try:
        return config_class(**given)
    except Exception:
        given.pop("layer_types", None)
        return config_class(**given)


def own(folder: str) -> torch.Tensor:
    """Log-probs of the model as transformers runs it, on each sequence alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for row in sequences():
            ids = torch.from_numpy(row.token_ids)
            table = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            found.append(table[torch.from_numpy(row.generated - 1), ids[row.generated]])
    return torch.cat(found)


def tried(kind: str) -> Row:
    """Save an architecture, load it as a policy, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        save(kind, folder)
        expected, rows = own(folder), sequences()
        try:
            policy = Policy(folder)
        except ConfigError as error:
            reason = str(error).rpartition("cannot be trained: it ")[2]
            return Row(kind, "", "", f"refused: it {timeless(reason)}")
        right = {}
        for layout in ("rows", "packed") if policy.layout == "packed" else ("rows",):
            found = policy.logp(pack(rows, np.ones(len(rows)), layout))
            right[layout] = "right" if (found - expected).abs().max() < NEAR else "wrong"
        kernel = "eager attention" if policy.model.config._attn_implementation == "eager" else ""
        softcapped = getattr(policy.model.config, "attn_logit_softcapping", None) is not None
        done = "packed" if policy.layout == "packed" else f"rows: {timeless(policy.why_rows)}"
        done += f"; {kernel}" if kernel and softcapped else ""
        if policy.layout == "rows" and attention.supports_segments(policy.model):
            right["packed"] = "wrong"
        return Row(kind, right["rows"], right.get("packed", ""), done)


def timeless(reason: str) -> str:
    """Without what differs from machine to machine."""
    reason = re.sub(r",? by [\d.e+-]+ nats,?", "", reason)
    return reason.replace("|", "/")


@contextmanager
def limited(seconds: int) -> Generator[None, None, None]:
    def expired(*_: Any) -> None:
        raise NotTried(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sweep(kinds: list[str]) -> tuple[list[Row], dict[str, str]]:
    """The rows of the table, and what was not tried, with the reason."""
    rows, left = [], {}
    for kind in kinds:
        try:
            with limited(SECONDS):
                rows.append(tried(kind))
                print(*rows[-1], sep=" | ", flush=True)
        except NotTried as reason:
            left[kind] = str(reason)
        except Exception as error:  # of ours: it is to stand in the table, and the others to be tried
            rows.append(Row(kind, "", "", f"wrong: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"))
            print(*rows[-1], sep=" | ", flush=True)
    return rows, left


def page(rows: list[Row], left: dict[str, str]) -> str:
    """What stands in docs/models.md."""
    lines = ["| architecture | rows | packed | trained as |", "| --- | --- | --- | --- |"]
    lines += [f"| `{row.name}` | {row.rows} | {row.packed} | {row.done} |" for row in rows]
    lines += ["", f"Not tried, {len(left)}:", ""]
    for reason in sorted(set(left.values())):
        names = ", ".join(f"`{name}`" for name, why in left.items() if why == reason)
        lines.append(f"- {reason}: {names}")
    return "\n".join(lines) + "\n"


def cost(folder: str) -> float:
    """Processor seconds that the check adds to loading a model: the median of three."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        load_model(folder)
        loaded = time.process_time()
        Policy(folder)  # loads, too
        seconds.append((time.process_time() - loaded) - (loaded - started))
    return sorted(seconds)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="Architectures; all of transformers' causal LMs if not given.")
    parser.add_argument("--write", action="store_true", help=f"Write the table to {PAGE.parent.name}/{PAGE.name}.")
    parser.add_argument("--out", help="Write the table to this file.")
    parser.add_argument("--cost", metavar="FOLDER", help="Only time the check of this model.")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.cost:
        print(json.dumps({"model": args.cost, "check_cpu_seconds": round(cost(args.cost), 2)}))
        return
    rows, left = sweep(args.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    if args.out:
        Path(args.out).write_text(page(rows, left))
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + page(rows, left) + END + rest.partition(END)[2])
    wrong = [row.name for row in rows if row.rows == "wrong" or row.done.startswith("wrong")]
    wrong += [row.name for row in rows if row.done == "packed" and row.packed != "right"]
    print(json.dumps({"tried": len(rows), "not_tried": len(left), "wrong": wrong}))


if __name__ == "__main__":
    main()
