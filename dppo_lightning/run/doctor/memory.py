"""Estimate of the memory that a recipe needs on each GPU, from the model's config, without loading the model.

It is for deciding what to switch on before a job is submitted. Every formula is in the docstring of the function that
computes it. It counts the largest micro-batch there can be (every completion as long as allowed, no prompt shared), so
a run usually needs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dppo_lightning.base.pretrained import load_config

MIB, GIB = 2**20, 2**30
CUDA_CONTEXT = 1 * GIB
"""Context, kernels and libraries of one process, and what the allocator cannot use: a round figure."""

EngineKind = Literal["vllm", "transformers", "elsewhere"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that decide over memory.

    Attributes:
        parameters: Number of parameters, tied ones counted once.
        largest_layer: Number of parameters of the largest decoder layer.
        linears: (name, inputs, outputs) of every linear layer but the output projection.
        hidden: Width H of the hidden states.
        layers: Number of decoder layers.
        intermediate: Width of the gated MLP that one token goes through; in a mixture, of all experts it is sent to.
        query: Width of all query heads together.
        key_value: Width of all key heads together, which is that of all value heads.
        vocabulary: Number V of token ids.
        context: Tokens of the longest sequence that the model takes, or None.
        outside: Number of parameters outside of the decoder's layers: embedding, projection, last norm.
    """

    parameters: int
    largest_layer: int
    linears: tuple[tuple[str, int, int], ...] = field(repr=False)
    hidden: int
    layers: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int
    context: int | None
    outside: int = 0

    @classmethod
    def from_name(cls, name: str) -> ModelShape:
        """Read the sizes of a model; it is built on the meta device, where parameters take no memory.

        Args:
            name: Hugging Face id or folder.

        Raises:
            ConfigError: There is no such model.
        """
        config = load_config(name)
        text = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings()
        layers = [sum(p.numel() for p in layer.parameters()) for layer in _decoder_layers(model)]
        parameters = sum(p.numel() for p in model.parameters())
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        experts = getattr(text, "num_experts_per_tok", None)
        wide = getattr(text, "moe_intermediate_size", None) if experts else None
        return cls(
            parameters=parameters,
            largest_layer=max(layers, default=parameters),
            linears=tuple(
                (name, module.in_features, module.out_features)
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and module is not head
            ),
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            intermediate=experts * (wide or text.intermediate_size) if experts else text.intermediate_size,
            query=heads * width,
            key_value=(getattr(text, "num_key_value_heads", None) or heads) * width,
            vocabulary=text.vocab_size,
            context=getattr(text, "max_position_embeddings", None),
            outside=parameters - sum(layers),
        )

    def adapters(self, rank: int, targets: Sequence[str] | None) -> int:
        """Number of parameters of LoRA adapters: rank x (inputs + outputs) for each layer that gets one.

        Args:
            rank: Rank of the adapters.
            targets: Names of the linear layers that get adapters; None: all of them.
        """
        wanted = [
            (inputs, outputs)
            for name, inputs, outputs in self.linears
            if targets is None or any(name == target or name.endswith(f".{target}") for target in targets)
        ]
        return sum(rank * (inputs + outputs) for inputs, outputs in wanted)


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Layers of the decoder, which is the longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


@dataclass(frozen=True)
class Plan:
    """Settings of a recipe that decide over memory.

    Args:
        ranks: Number of training processes, each with a GPU of its own.
        stage: What is sharded over the ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too.
        deepspeed: Whether DeepSpeed shards, which keeps float32 copies of the weights with the optimizer's state.
        ddp: Whether gradients are reduced in buckets of their own.
        offload_optimizer: Whether the optimizer state lives on the CPU.
        offload_parameters: Whether the weights live on the CPU while they are not used.
        reduce_bucket: Number of elements in a piece in which DeepSpeed reduces gradients.
        max_live: Number of elements that DeepSpeed's stage 3 may have whole at a time.
        precision: Value of Lightning's ``trainer.precision``.
        optimizer_bytes: Bytes of optimizer state for each float32 parameter.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        lora_rank: Rank of the adapters; None: the model itself is trained.
        lora_targets: Names of the layers with adapters; None: all.
        micro_batch: Number of sequences in one micro-batch on one rank.
        prompt_tokens: Tokens of the longest prompt.
        new_tokens: Tokens of the longest completion.
        logits_mib: Value of ``model.logits_mib``.
        whole_vocabulary: Whether the region or the diagnostics compare whole distributions.
        reference: Whether a reference model is loaded.
        rollout_bytes: Bytes of one of the engine's weights.
        engine: Kind of the engine on rank 0's GPU; "elsewhere": it needs no memory there.
        engine_share: Share of a GPU that vLLM takes; None: ``kv_cache`` decides.
        kv_cache: Bytes for keys and values; None: what ``engine_share`` leaves.
        engine_sequences: Number of completions generated at a time.
        engines: Number of vLLM engines on rank 0's GPU.
    """

    ranks: int = 1
    stage: Literal[0, 1, 2, 3] = 0
    deepspeed: bool = False
    ddp: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket: int = 200_000_000
    max_live: int = 1_000_000_000
    precision: str = "32-true"
    optimizer_bytes: int = 8
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] | None = None
    micro_batch: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 256
    logits_mib: int = 64
    whole_vocabulary: bool = False
    reference: bool = False
    rollout_bytes: int = 4
    engine: EngineKind = "vllm"
    engine_share: float | None = 0.5
    kv_cache: int | None = None
    engines: int = 1
    engine_sequences: int = 256

    @property
    def half(self) -> bool:
        """Whether matrix products have two bytes an element."""
        return "16" in self.precision

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Part:
    """One row of the table: bytes on the fullest GPU, and what they are computed from."""

    name: str
    bytes: float
    formula: str


def estimate(shape: ModelShape, plan: Plan, gpu_bytes: float) -> list[Part]:
    """Estimate every part of the memory of rank 0's GPU, which has the engine too.

    Args:
        shape: Sizes of the model.
        plan: Settings of the recipe.
        gpu_bytes: Bytes of memory of the GPU.
    """
    parts = [*model_states(shape, plan), activations(shape, plan), head(shape, plan)]
    if plan.reference and plan.lora_rank is None:
        share = plan.ranks if plan.stage == 3 else 1
        parts.append(Part("reference model", shape.parameters * 4 / share, f"4 B/parameter{_over(share)}"))
    parts += engine(shape, plan, gpu_bytes)
    return [*parts, Part("CUDA context", CUDA_CONTEXT, "a round figure")]


def model_states(shape: ModelShape, plan: Plan) -> list[Part]:
    """Estimate weights, gradients and optimizer state.

    Bytes of a parameter, without DeepSpeed: "32-true" and the mixed precisions keep 4 + 4 + 8 (weights, gradients,
    AdamW's two moments), and mixed ones a copy of 2 for the products; "bf16-true" 2 + 2 + 4. Under DDP the gradients
    are there twice, once in the buckets of the reduction, unless they are views of these. With DeepSpeed (ZeRO, arXiv
    1910.02054, section 3.1) in two bytes 2 + 4 + 12: gradients summed in float32, float32 weights and two moments; in
    float32 4 + 4 + 12. Stage 1 divides the last number by the number of ranks, stage 2 the middle one too, stage 3 all.

    What is whole at a time: see ``gathered``. A model with adapters has gradients and optimizer state of the adapters
    alone.
    """
    total = shape.parameters
    adapters = None if plan.lora_rank is None else shape.adapters(plan.lora_rank, plan.lora_targets)
    trained = total if adapters is None else adapters
    true_half = plan.precision in ("bf16-true", "16-true")
    small = plan.half if plan.deepspeed else true_half
    weight_bytes = 2 if small else 4
    gradient_bytes = weight_bytes if not plan.deepspeed else 4
    state_bytes = plan.optimizer_bytes + 4 if plan.deepspeed else plan.optimizer_bytes // (2 if true_half else 1)
    n = [plan.ranks if plan.stage >= least else 1 for least in (3, 2, 1)]
    all_weights = total + (adapters or 0)
    where = " on the CPU" if plan.offload_parameters else _over(n[0])
    weights = 0.0 if plan.offload_parameters else all_weights * weight_bytes / n[0]
    parts = [Part("weights", weights, f"{weight_bytes} B/parameter{where}"), *gathered(shape, plan, weight_bytes)]
    if plan.half and not small and plan.stage < 3:
        parts.append(Part("weights in 16 bits", all_weights * 2, "2 B/parameter"))
    gradient_bytes *= 2 if plan.ddp else 1
    gradients = trained * gradient_bytes / n[1]
    parts.append(Part("gradients", gradients, f"{gradient_bytes} B/trained parameter{_over(n[1])}"))
    where = " on the CPU" if plan.offload_optimizer else _over(n[2])
    state = 0.0 if plan.offload_optimizer else trained * state_bytes / n[2]
    return [*parts, Part("optimizer state", state, f"{state_bytes} B/trained parameter{where}")]


def gathered(shape: ModelShape, plan: Plan, weight_bytes: int) -> list[Part]:
    """Estimate what is whole at a time of weights and gradients that are in shards, and the buffers they go through.

    DeepSpeed's stage 3 has ``max_live_parameters`` whole, or the largest layer, and a bucket of gradients; stage 2, and
    stage 1 in float32, two buckets. FSDP2 has two layers whole, the second ahead of its use, and a gradient of one with
    its float32 sum, in two bytes an element under mixed precision; embedding and projection in float32, with gradients.
    """
    parts = []
    if plan.deepspeed and (plan.stage > 1 or not plan.half):
        copies = 1 if plan.stage == 3 else 2
        size = copies * plan.reduce_bucket * weight_bytes
        parts.append(Part("buckets of gradients", size, f"{copies} x {plan.reduce_bucket:,} x {weight_bytes} B"))
    if plan.stage == 3 and plan.deepspeed:
        live = min(shape.parameters, max(plan.max_live, shape.largest_layer, shape.outside))
        parts.append(Part("weights that are whole", live * weight_bytes, f"{weight_bytes} B x {live:,} at a time"))
    elif plan.stage == 3:
        each = 3 * (2 if plan.half else 4) + 4
        parts.append(Part("layers that are whole", shape.largest_layer * each, f"{each} B x {shape.largest_layer:,}"))
        parts.append(Part("embedding and projection", shape.outside * 8.0, f"8 B x {shape.outside:,}"))
    return parts


def activations(shape: ModelShape, plan: Plan) -> Part:
    """Estimate what the forward pass keeps for the backward pass.

    Counted as in arXiv 2205.05198, section 4.1 (the inputs of every operation that its gradient needs), for a layer
    with two RMSNorms, grouped queries and a gated MLP, attention without stored scores; e bytes an element:

        per token and layer   16 H + e (2 H + 3 Q + 2 K + 4 I)

    16 H: each norm's input and result, in float32. 2 H: inputs of the query/key/value and of the gate/up projections.
    3 Q + 2 K: queries, keys, values and result of attention, and the input of the output projection. 4 I: gate, its
    activation, up, and their product. The last norm adds 8 H. With gradient checkpointing e H for each layer, and one
    layer whole.
    """
    e = 2 if plan.half else 4
    tokens = plan.micro_batch * plan.longest
    layer = 16 * shape.hidden + e * (2 * shape.hidden + 3 * shape.query + 2 * shape.key_value + 4 * shape.intermediate)
    each = shape.layers * e * shape.hidden + layer if plan.gradient_checkpointing else shape.layers * layer
    each += 8 * shape.hidden
    return Part("activations", float(tokens * each), f"{tokens:,} tokens x {each / 1024:,.0f} KiB")


def head(shape: ModelShape, plan: Plan) -> Part:
    """Estimate a chunk of logits, and the gradients that the head forms in the forward pass (train/head.py).

    Two tables of ``logits_mib`` (half a table more in 16 bits), the float32 gradient of the projection 4 V H, and
    the gradient of the hidden states. Whole-vocabulary comparisons add three tables of half the size and a copy of the
    projection.
    """
    e = 2 if plan.half else 4
    table = plan.logits_mib * 2**20
    size = table * (2.5 if plan.half else 2.0) + 4 * shape.vocabulary * shape.hidden
    size += e * plan.micro_batch * plan.new_tokens * shape.hidden
    if plan.whole_vocabulary:
        size += 1.5 * table + e * shape.vocabulary * shape.hidden
    return Part("head", size, f"{plan.logits_mib} MiB tables, 4 B x {shape.vocabulary:,} x {shape.hidden:,}")


def engine(shape: ModelShape, plan: Plan, gpu_bytes: float) -> list[Part]:
    """Estimate what the engine holds on rank 0's GPU.

    Keys and values take 2 x layers x K x bytes for each token. vLLM reserves its share of the GPU for weights and cache
    together, also where it needs less.
    """
    if plan.engine == "elsewhere":
        return []
    weights = shape.parameters * plan.rollout_bytes
    per_token = 2 * shape.layers * shape.key_value * plan.rollout_bytes
    if plan.engine == "transformers":
        cache = float(per_token * plan.longest * plan.engine_sequences)
        text = f"{per_token / 1024:,.0f} KiB/token x {plan.longest:,} x {plan.engine_sequences}"
        return [Part("engine weights", weights, f"{plan.rollout_bytes} B/parameter"), Part("engine cache", cache, text)]
    cache = float(plan.kv_cache or max((plan.engine_share or 0) * gpu_bytes - weights, per_token * plan.longest))
    text = f"holds {int(cache // (per_token * plan.longest)):,} sequences of {plan.longest:,} tokens"
    n, times = plan.engines, f" x {plan.engines} servers" if plan.engines > 1 else ""
    return [
        Part("engine weights", n * weights, f"{plan.rollout_bytes} B/parameter{times}"),
        Part("engine cache", n * cache, f"{text}{times}"),
    ]


def total(parts: Sequence[Part]) -> float:
    """Bytes of all parts together."""
    return sum(part.bytes for part in parts)


def _over(ranks: int) -> str:
    return f" / {ranks} ranks" if ranks > 1 else ""
