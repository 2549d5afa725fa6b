"""What a user can get wrong, and the one line that says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dppo_lightning.base.errors import ConfigError, DPPOError
from dppo_lightning.train.module import DPPOModule
from dppo_lightning.train.objective import Objective, ReferenceKL
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
    DivergenceMask,
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
    Surrogate,
    TokenStatsError,
    TopKKL,
    TopKTV,
    TruncatedIS,
    TrustRegion,
    check_tokens,
)
from tests.trust_region.batches import random_batch, stats
from tests.trust_region.cases import DEFAULTS

NAN, INF = float("nan"), float("inf")

OUT_OF_RANGE = [
    (lambda: NoTrustRegion(max_ratio=0), "max_ratio"),
    (lambda: TruncatedIS(-1), "max_ratio"),
    (lambda: TruncatedIS(NAN), "max_ratio"),
    (lambda: PPOClip(epsilon_low=1.0), "epsilon_low"),
    (lambda: PPOClip(epsilon_high=0), "epsilon_high"),
    (lambda: PPOClip(max_ratio=-2), "max_ratio"),
    (lambda: PPOClip(anchor="reference"), "anchor"),
    (lambda: DualClip(dual=1.0), "dual"),
    (lambda: DualClip(epsilon_low=-0.1), "epsilon_low"),
    (lambda: RelaxedClip(alpha=0), "alpha"),
    (lambda: RelaxedClip(alpha=1.1), "alpha"),
    (lambda: RelaxedClip(side="left"), "side"),
    (lambda: MiniRL(epsilon_low=2), "epsilon_low"),
    (lambda: MiniRL(max_ratio=0), "max_ratio"),
    (lambda: CISPO(epsilon_high=0), "epsilon_high"),
    (lambda: CISPO(epsilon_low=-1), "epsilon_low"),
    (lambda: MinimalMask(0), "delta"),
    (lambda: MinimalMask(1.5), "delta"),
    (lambda: IcePop(low=-0.1), "low"),
    (lambda: IcePop(low=5, high=5), "low"),
    (lambda: IcePop(high=NAN), "low"),
    (lambda: BinaryTV(0), "delta"),
    (lambda: BinaryTV(NAN), "delta"),
    (lambda: BinaryTV(delta_low=0), "delta_low"),
    (lambda: BinaryKL(delta_high=-1), "delta_high"),
    (lambda: BinaryKL(max_ratio=0), "max_ratio"),
    (lambda: TopKTV(k=0), "k must"),
    (lambda: TopKKL(sampled_token="drop"), "sampled_token"),
    (lambda: TopKTV(anchor="recomputed"), "anchor"),
    (lambda: TopKKL(anchor="recomputed"), "anchor"),
    (lambda: FullTV(anchor="recomputed"), "anchor"),
    (lambda: FullKL(0), "delta"),
    (lambda: PredictiveMask(0), "delta"),
    (lambda: PredictiveMask(k=0), "k must"),
    (lambda: SPO(0), "epsilon"),
    (lambda: DRPO(-0.15), "delta"),
    (lambda: SAPO(tau_positive=0), "tau_positive"),
    (lambda: SAPO(tau_negative=NAN), "tau_negative"),
    (lambda: GSPO(epsilon_low=1), "epsilon_low"),
    (lambda: SequenceMask(0), "delta"),
    (lambda: SequenceMask(reduce="sum"), "reduce"),
    (lambda: VACO(0), "delta"),
    (lambda: CPPO(w_min=0), "w_min"),
    (lambda: CPPO(w_min=1.01), "w_min"),
    (lambda: CPPO(budget=0), "budget"),
    (lambda: BandPO(0), "delta"),
    (lambda: BandPO(divergence="js"), "divergence"),
    (lambda: CovarianceClip(0), "fraction"),
    (lambda: CovarianceClip(1.5), "fraction"),
    (lambda: CovarianceKL(beta=0), "beta"),
    (lambda: Combined([BinaryTV()]), "at least two"),
    (lambda: Combined([BinaryTV(), SPO()]), "SPO"),
    (lambda: Combined([GSPO(), BinaryTV()]), "GSPO"),
    (lambda: Combined([BinaryTV(), DualClip()]), "DualClip"),
    (lambda: Combined([TopKTV(k=5), TopKKL(k=20)]), "same k"),
    (lambda: Combined([TopKTV(), FullTV()]), "Top-K"),
    (lambda: Combined([FullTV(), VACO(0.1)]), "over sequences"),
]


@pytest.mark.parametrize(("build", "named"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_when_built(build, named):
    with pytest.raises(ConfigError, match=named) as refusal:
        build()
    assert "\n" not in str(refusal.value)


ONE_ANCHOR = [
    NoTrustRegion,
    TruncatedIS,
    RelaxedClip,
    MiniRL,
    MinimalMask,
    IcePop,
    PredictiveMask,
    SPO,
    DRPO,
    SequenceMask,
    VACO,
    CPPO,
    BandPO,
]


@pytest.mark.parametrize("region", ONE_ANCHOR)
def test_a_method_with_one_anchor_has_no_such_argument(region):
    with pytest.raises(TypeError, match="anchor"):
        region(anchor="recomputed")


BAD = {
    "logp": [NAN, INF, -INF],
    "rollout_logp": [NAN, INF, -INF],
    "advantage": [NAN, INF, -INF],
    "recomputed_logp": [NAN, INF, -INF],
    "topk_logp": [NAN, INF],
    "rollout_topk_logp": [NAN, INF],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_numbers_that_are_not_finite_are_named_and_counted(case, name, value):
    tokens = case.stats(random_batch(0), dtype=torch.float32, requires_grad=False)
    spoilt = getattr(tokens, name).clone()
    spoilt[torch.tensor([2, 5, 11]), ...] = value
    needed = name in ("logp", "rollout_logp", "advantage") or name in case.region.needs
    needed |= name.endswith("topk_logp") and bool(case.region.needs & {"topk", "full"})
    spoilt_tokens = replace(tokens, **{name: spoilt})
    if not needed:
        case.region(spoilt_tokens)
        return
    count = 3 if spoilt.ndim == 1 else 3 * spoilt.shape[1]
    with pytest.raises(TokenStatsError, match=rf"\b{name} has {count} of {spoilt.numel()}") as refusal:
        case.region(spoilt_tokens)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_a_missing_statistic_is_named(case):
    tokens = case.stats(random_batch(0), requires_grad=False)
    needed = set(case.region.needs & {"recomputed_logp", "entropy", "chosen"})
    needed |= {"topk_logp", "rollout_topk_logp"} if case.region.needs & {"topk", "full"} else set()
    needed |= {"sequence", "position"} if case.region.scope == "sequence" else set()
    for name in needed:
        with pytest.raises(TokenStatsError, match=rf"{type(case.region).__name__} needs {name}"):
            case.region(replace(tokens, **{name: None}))


@pytest.mark.parametrize("anchored", [PPOClip, DualClip, CISPO, BinaryTV, BinaryKL, SAPO, GSPO, CovarianceKL])
def test_the_recomputed_anchor_never_falls_back_to_the_rollout(anchored):
    tokens = replace(stats(random_batch(0)), recomputed_logp=None)
    tokens = replace(tokens, chosen=torch.zeros(len(tokens.logp), dtype=torch.bool))
    anchored()(tokens)
    with pytest.raises(TokenStatsError, match="recomputed_logp"):
        anchored(anchor="recomputed")(tokens)


@pytest.mark.parametrize(
    "name", ["rollout_logp", "advantage", "recomputed_logp", "topk_logp", "entropy", "sequence", "position"]
)
def test_tensors_of_different_length_are_refused(name):
    tokens = stats(random_batch(0))
    with pytest.raises(TokenStatsError, match=f"30 tokens.*{name}.*29"):
        BinaryTV()(replace(tokens, **{name: getattr(tokens, name)[:-1]}))


def test_topk_tables_of_different_width_are_refused():
    tokens = stats(random_batch(0))
    with pytest.raises(TokenStatsError, match=r"\(30, 5\).*\(30, 6\)"):
        TopKTV()(replace(tokens, topk_logp=tokens.topk_logp[:, 1:]))


def test_the_check_can_be_called_on_its_own():
    tokens = stats(random_batch(0))
    check_tokens(TopKTV(), tokens)
    with pytest.raises(TokenStatsError):
        check_tokens(TopKTV(), replace(tokens, topk_logp=None))


def test_errors_are_of_the_kind_that_the_command_line_prints():
    assert issubclass(TokenStatsError, DPPOError)


def test_a_members_missing_statistic_is_asked_for_by_the_combination():
    region = Combined([IcePop(), TopKTV(k=5), VACO(0.1)])
    assert region.needs == {"recomputed_logp", "topk"}
    assert (region.scope, region.k) == ("sequence", 5)
    with pytest.raises(TokenStatsError, match="recomputed_logp"):
        region(replace(stats(random_batch(0)), recomputed_logp=None))


def test_a_plug_in_without_a_weight_cannot_be_combined():
    class Bare(TrustRegion):
        def forward(self, tokens):
            return Surrogate(-tokens.logp, torch.ones_like(tokens.logp, dtype=torch.bool))

    with pytest.raises(ConfigError, match="Bare"):
        Combined([Bare(), BinaryTV()])(stats(random_batch(0)))


def test_a_plug_in_writes_only_its_divergence():
    class HellingerMask(DivergenceMask):
        def divergence(self, tokens):
            p, q = tokens.logp.exp(), tokens.rollout_logp.exp()
            return 1 - (p * q).sqrt() - ((1 - p) * (1 - q)).sqrt()

    region = HellingerMask(delta=0.01)
    tokens = stats(random_batch(1))
    surrogate = region(tokens)
    p, q = tokens.logp.detach().exp(), tokens.rollout_logp.exp()
    distance = ((p.sqrt() - q.sqrt()) ** 2 + ((1 - p).sqrt() - (1 - q).sqrt()) ** 2) / 2
    assert torch.equal(surrogate.keep, ~((distance > 0.01) & (tokens.advantage * (p - q) > 0)))
    assert not surrogate.keep.all()
    assert region.describe()["region"] == "HellingerMask"


class Asking(DivergenceMask):
    """A plug-in that asks for what the class attributes say."""

    def __init__(self, needs: set[str], k: int = 0, scope: str = "token") -> None:
        super().__init__(0.1)
        self.needs, self.k, self.scope = frozenset(needs), k, scope


@pytest.mark.parametrize(
    ("region", "named"),
    [
        (Asking({"top_k"}, k=5), "top_k"),
        (Asking({"topk"}), "set k"),
        (Asking({"topk", "full"}, k=5), "one table"),
        (Asking({"full"}, scope="sequence"), "scope must be"),
        (Asking({"chosen"}), "write its method choose"),
    ],
    ids=["unknown", "no-k", "both-tables", "full-over-sequences", "chooses-nothing"],
)
def test_a_plug_in_that_asks_for_what_cannot_be_given_is_refused_when_the_module_is_built(region, named):
    with pytest.raises(ConfigError, match=named) as refusal:
        DPPOModule("none", region)
    assert "\n" not in str(refusal.value)
    assert "Asking" in str(refusal.value)


class Forward(TrustRegion):
    """Returns what a function makes of its tokens."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, tokens):
        return self.made(tokens)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda tokens: tokens.logp, "Forward.forward returned a Tensor: return a Surrogate"),
        (
            lambda tokens: Surrogate(tokens.logp.sum(), tokens.logp > 0),
            r"loss has the shape \(\): .* each of 30 tokens",
        ),
        (lambda tokens: Surrogate(tokens.logp, tokens.logp), "keep is torch.float64: it must be bool"),
        (lambda tokens: Surrogate(tokens.logp, tokens.logp[1:] > 0), r"keep has the shape \(29,\)"),
    ],
)
def test_what_is_no_surrogate_of_the_tokens_is_refused(made, said):
    with pytest.raises(TokenStatsError, match=said):
        Forward(made)(stats(random_batch(0)))


class Unwritten(DivergenceMask):
    pass


class Uninitialised(TrustRegion):
    def __init__(self):
        self.delta = 0.1


@pytest.mark.parametrize(
    ("region", "said"),
    [
        (lambda: Unwritten(0.1), "Unwritten has no divergence: write the method"),
        (TrustRegion, "TrustRegion has no forward: write the method"),
        (Uninitialised, "Uninitialised is not initialised.*super"),
    ],
)
def test_an_unfinished_region_is_refused_when_the_objective_is_built(region, said):
    with pytest.raises(ConfigError, match=said):
        Objective(region(), ReferenceKL())
