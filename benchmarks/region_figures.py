"""Draws every trust region in the (mu, pi) plane: ``python benchmarks/region_figures.py --out docs/figures``.

A point is one generated token: the engine gave it mu, the policy now gives it pi. The colour is the gradient that the
region leaves, as a share of the importance-weighted one (-A r grad log pi): blue 1, white 0 (stopped), red negative
(pulled back). It is read off the region's own gradient, so a figure cannot differ from the code. Each figure has a
linear and a logarithmic view, for A > 0 and A < 0. What a region needs beyond mu and pi is said in the figure's title.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from dppo_lightning.trust_region import (
    CISPO,
    CPPO,
    DRPO,
    GSPO,
    SAPO,
    SPO,
    VACO,
    BandPO,
    BinaryKL,
    BinaryTV,
    Combined,
    CovarianceClip,
    CovarianceKL,
    DualClip,
    FullKL,
    FullTV,
    IcePop,
    MinimalMask,
    MiniRL,
    NoTrustRegion,
    PPOClip,
    PredictiveMask,
    RelaxedClip,
    SequenceMask,
    TokenStats,
    TopKKL,
    TopKTV,
    TruncatedIS,
    TrustRegion,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

GRID = 121
RARE = 1e-4

# the outer ends of RdBu are too dark for a line to be seen on them
SOFT = LinearSegmentedColormap.from_list("soft", plt.get_cmap("RdBu")(np.linspace(0.15, 0.82, 256)))

Plane = Callable[[Tensor, Tensor, float], TokenStats]


def alone(mu: Tensor, pi: Tensor, advantage: float) -> TokenStats:
    """Each token a sequence of its own, the trainer's recomputation equal to the engine's."""
    return TokenStats(
        logp=pi.log().requires_grad_(),
        rollout_logp=mu.log(),
        advantage=torch.full_like(mu, advantage),
        recomputed_logp=mu.log(),
        sequence=torch.arange(len(mu)),
        position=torch.zeros(len(mu), dtype=torch.int64),
    )


def with_old(share: float) -> Plane:
    """The trainer recomputes pi_old = share * mu for every token."""

    def plane(mu: Tensor, pi: Tensor, advantage: float) -> TokenStats:
        tokens = alone(mu, pi, advantage)
        return TokenStats(
            tokens.logp, tokens.rollout_logp, tokens.advantage, tokens.rollout_logp + torch.tensor(share).log()
        )

    return plane


def old_and_mu(mu: Tensor, old: Tensor, advantage: float) -> TokenStats:
    """The vertical axis is pi_old, and pi = pi_old."""
    return TokenStats(old.log().requires_grad_(), mu.log(), torch.full_like(mu, advantage), old.log())


def others_shift(mu: Tensor, pi: Tensor, advantage: float) -> TokenStats:
    """Two other tokens share what is left, 75:25 under mu and 60:40 under pi."""
    table_mu = torch.stack([mu, (1 - mu) * 0.75, (1 - mu) * 0.25], dim=1)
    table_pi = torch.stack([pi, (1 - pi) * 0.6, (1 - pi) * 0.4], dim=1)
    tokens = alone(mu, pi, advantage)
    return TokenStats(
        tokens.logp, tokens.rollout_logp, tokens.advantage, topk_logp=table_pi.log(), rollout_topk_logp=table_mu.log()
    )


def last_of(length: int, drift: float) -> Plane:
    """The token is the last of its sequence; the ones before it have mu = 0.5 and pi = 0.5 + drift."""

    def plane(mu: Tensor, pi: Tensor, advantage: float) -> TokenStats:
        before = length - 1
        # columns: the prefix, then the token itself
        logp = torch.cat([torch.full((len(mu), before), 0.5 + drift), pi[:, None]], dim=1).log().flatten()
        return TokenStats(
            logp=logp.requires_grad_(),
            rollout_logp=torch.cat([torch.full((len(mu), before), 0.5), mu[:, None]], dim=1).log().flatten(),
            advantage=torch.full_like(logp, advantage),
            sequence=torch.arange(len(mu)).repeat_interleave(length),
            position=torch.arange(length).repeat(len(mu)),
        )

    return plane


@dataclass(frozen=True)
class Figure:
    region: TrustRegion
    note: str = ""
    plane: Plane = alone
    length: int = 1
    axes: tuple[str, str] = ("μ", "π")

    @property
    def name(self) -> str:
        return f"region_{type(self.region).__name__}.png"


SHIFT = "the other tokens shift from 75:25 to 60:40"
FIGURES = [
    Figure(NoTrustRegion()),
    Figure(TruncatedIS()),
    Figure(PPOClip()),
    Figure(DualClip()),
    Figure(RelaxedClip()),
    Figure(MiniRL(), "π_old = 0.7 μ", with_old(0.7)),
    Figure(CISPO()),
    Figure(MinimalMask()),
    Figure(IcePop(), "vertical axis π_old, and π = π_old", old_and_mu, axes=("μ", "π_old")),
    Figure(BinaryTV()),
    Figure(BinaryKL()),
    Figure(TopKTV(), SHIFT, others_shift),
    Figure(TopKKL(), SHIFT, others_shift),
    Figure(FullTV(), SHIFT, others_shift),
    Figure(FullKL(), SHIFT, others_shift),
    Figure(PredictiveMask(), SHIFT, others_shift),
    Figure(SPO()),
    Figure(DRPO()),
    Figure(SAPO()),
    Figure(GSPO(), "one of 200 tokens, the others at μ = π", last_of(200, 0.0), 200),
    Figure(SequenceMask(), "whichever token of the sequence is the worst"),
    Figure(VACO(delta=0.1), "one of 5 tokens, the others at μ = π", last_of(5, 0.0), 5),
    Figure(CPPO(), "tenth of 10 tokens, the others at |μ - π| = 0.03", last_of(10, 0.03), 10),
    Figure(BandPO()),
    Figure(CovarianceClip(fraction=0.1), "a tenth of a batch spread evenly over the plane"),
    Figure(CovarianceKL(fraction=0.1), "a tenth of a batch spread evenly over the plane"),
    Figure(Combined([IcePop(), BinaryTV()]), "π_old = π: engine and trainer disagree", old_and_mu),
]


def gradient_share(figure: Figure, mu: Tensor, pi: Tensor, advantage: float) -> Tensor:
    """The token's gradient over that of the plain importance-weighted loss, [N]."""
    if isinstance(figure.region, (CovarianceClip, CovarianceKL)):
        # both signs in one batch, as the covariance is taken about the batch's mean advantage
        halves = alone(mu, pi, advantage), alone(mu, pi, -advantage)
        logp, rollout_logp, advantages = (
            torch.cat([getattr(half, name).detach() for half in halves])
            for name in ("logp", "rollout_logp", "advantage")
        )
        index = torch.arange(len(logp))
        tokens = TokenStats(logp.requires_grad_(), rollout_logp, advantages, sequence=index, position=index * 0)
    else:
        tokens = figure.plane(mu, pi, advantage)
    if "chosen" in figure.region.needs:
        tokens = replace(tokens, chosen=figure.region.choose(tokens))
    (gradient,) = torch.autograd.grad(figure.region(tokens).loss.sum(), tokens.logp)
    if figure.length > 1:
        gradient = gradient.view(len(mu), figure.length)[:, -1]
    if isinstance(figure.region, GSPO):
        # its ratio is the sequence's, and hardly differs from 1
        return gradient / -advantage
    return gradient[: len(mu)] / (-advantage * pi / mu)


def draw(figure: Figure, folder: Path) -> Path:
    """One file with four panels: linear and logarithmic, for both signs of A."""
    fig, panels = plt.subplots(1, 4, figsize=(11.2, 3.0), layout="constrained")
    for index, panel in enumerate(panels):
        advantage, logarithmic = (1.0, -1.0)[index % 2], index >= 2
        ends = (RARE, 1 - 1e-4)
        steps = (
            torch.logspace(-4, torch.tensor(ends[1]).log10().item(), GRID)
            if logarithmic
            else torch.linspace(*ends, GRID)
        )
        mu, pi = (axis.flatten() for axis in torch.meshgrid(steps, steps, indexing="xy"))
        share = gradient_share(figure, mu, pi, advantage).view(GRID, GRID)
        mesh = panel.pcolormesh(steps, steps, share.clamp(-1, 1), cmap=SOFT, vmin=-1, vmax=1, rasterized=True)
        panel.plot(ends, ends, color="black", linewidth=1, linestyle="--")
        if logarithmic:
            panel.set(xscale="log", yscale="log")
        panel.set(xlabel=figure.axes[0], xlim=ends, ylim=ends, title=f"A {'>' if advantage > 0 else '<'} 0")
        panel.set_box_aspect(1)
    panels[0].set_ylabel(figure.axes[1])
    fig.colorbar(mesh, ax=panels, shrink=0.85, ticks=[-1, 0, 1], label="share of the gradient")
    described = figure.region.describe()
    settings = ", ".join(
        f"{key} {value}"
        for key, value in described.items()
        if key not in ("region", "anchor") and value not in ("none", described.get("delta") if "_" in key else "")
    )
    title = (
        described["region"]
        if isinstance(figure.region, Combined) or not settings
        else f"{described['region']}: {settings}"
    )
    fig.suptitle(title + (f"   ({figure.note})" if figure.note else ""), fontsize=10)
    path = folder / figure.name
    fig.savefig(path, dpi=72, metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(fig)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the PNG files")
    parser.add_argument("--only", help="class name of one region")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for figure in FIGURES:
        if arguments.only in (None, type(figure.region).__name__):
            print(draw(figure, arguments.out))


if __name__ == "__main__":
    main()
