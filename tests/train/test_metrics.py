"""Metrics of an optimizer step, against the same numbers computed from all its tokens at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_lightning.base.batch import TrainingBatch
from dppo_lightning.train.head import HeadOutput
from dppo_lightning.train.metrics import GLOSSARY, StepMetrics, check_names

STEP = 7


def make_micro_batch(tokens: int, seed: int, kl: bool = True) -> tuple[TrainingBatch, HeadOutput]:
    """Random tokens of one micro-batch, and what a head might have found of them."""
    g = torch.Generator().manual_seed(seed)
    rows, width = 2, tokens + 3
    zeros = torch.zeros(tokens, dtype=torch.int64)
    batch = TrainingBatch(
        input_ids=torch.zeros(rows, width, dtype=torch.int64),
        predict_index=zeros,
        targets=zeros,
        rollout_logp=-3 * torch.rand(tokens, generator=g),
        advantage=torch.randint(-1, 2, (tokens,), generator=g).float(),
        weight=torch.rand(tokens, generator=g),
        sequence=zeros,
        position=zeros,
        version=torch.randint(STEP + 1, (tokens,), generator=g),
        step=STEP,
        real_tokens=tokens + 1,
        saved_tokens=seed % 3,
    )
    output = HeadOutput(
        loss=torch.randn((), generator=g),
        logp=-3 * torch.rand(tokens, generator=g),
        token_loss=torch.randn(tokens, generator=g),
        surrogate_loss=torch.randn(tokens, generator=g),
        keep=torch.rand(tokens, generator=g) > 0.3,
        divergence=torch.rand(tokens, generator=g),
        entropy=torch.rand(tokens, generator=g),
        kl=torch.rand(tokens, generator=g) if kl else None,
        diagnostics={"full_tv": torch.rand(tokens, generator=g)},
    )
    return batch, output


def whole_step(micro_batches: list[tuple[TrainingBatch, HeadOutput]]) -> dict[str, float]:
    """The glossary's definitions in numpy, over the tokens of all micro-batches; no token, no statistic."""

    def batch(name: str) -> np.ndarray:
        return np.concatenate([getattr(b, name).double().numpy() for b, _ in micro_batches])

    def output(name: str) -> np.ndarray:
        return np.concatenate([getattr(o, name).double().numpy() for _, o in micro_batches])

    positions = sum(b.input_ids.numel() for b, _ in micro_batches)
    values = {
        "train/loss": sum(float(o.loss) for _, o in micro_batches),
        "train/tokens": float(len(output("logp"))),
        "perf/padding_waste": 1 - sum(b.real_tokens for b, _ in micro_batches) / positions,
    }
    pi, mu = np.exp(output("logp")), np.exp(batch("rollout_logp"))
    advantage, masked = batch("advantage"), 1 - output("keep")
    if len(pi) == 0:
        return values
    counted = [b for b, _ in micro_batches if b.tokens]
    spared, forwarded = sum(b.saved_tokens for b in counted), sum(b.real_tokens for b in counted)
    values |= {
        "perf/packed": 0.0,  # these micro-batches are rows
        "perf/shared_prompt_share": spared / (spared + forwarded),
        "train/surrogate": -output("surrogate_loss").mean(),
        "train/masked_share": masked.mean(),
        "train/moved_negative_share": np.mean((advantage < 0) & (mu - pi > 0.5)),
        "train/mismatch_tv": np.abs(pi - mu).mean(),
        "train/mismatch_kl": np.mean(pi / mu - 1 - np.log(pi / mu)),
        "train/ratio_max": np.max(pi / mu),
        "train/divergence": output("divergence").mean(),
        "train/divergence_max": output("divergence").max(),
        "train/entropy": output("entropy").mean(),
        "train/kl_reference": output("kl").mean(),
        "train/staleness": np.mean(STEP - batch("version")),
        "train/staleness_max": np.max(STEP - batch("version")),
        "diagnostics/full_tv": np.mean(np.concatenate([o.diagnostics["full_tv"].numpy() for _, o in micro_batches])),
    }
    for name, chosen in (("positive", advantage > 0), ("negative", advantage < 0)):
        if chosen.any():
            values[f"train/masked_share_{name}"] = masked[chosen].mean()
    for age in np.unique(STEP - batch("version")).astype(int):
        mine = masked[STEP - batch("version") == age]
        values |= {f"staleness/tokens/{age}": float(len(mine)), f"staleness/masked_share/{age}": mine.mean()}
    return values


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2**16)), min_size=1, max_size=6))
def test_a_step_means_the_same_however_it_was_split(sizes: list[tuple[int, int]]) -> None:
    micro_batches = [make_micro_batch(tokens, seed) for tokens, seed in sizes]
    metrics = StepMetrics()
    for batch, output in micro_batches:
        metrics.update(batch, output)
    assert metrics.compute_and_reset() == {
        name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in whole_step(micro_batches).items()
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_logged_as_it_is(bad: float, place: int) -> None:
    """In whichever micro-batch; of every statistic that the head gives."""
    metrics = StepMetrics()
    for index in range(3):
        batch, output = make_micro_batch(6, seed=index)
        if index == place:
            named = ("loss", "surrogate_loss", "divergence", "entropy", "kl")
            given = {name: getattr(output, name).clone().index_fill_(-1, torch.tensor([0]), bad) for name in named[1:]}
            given |= {"loss": torch.tensor(bad), "diagnostics": {"full_tv": torch.tensor([0.5, bad])}}
            output = output._replace(**given)
        metrics.update(batch, output)
    values = metrics.compute_and_reset()
    names = ("loss", "surrogate", "divergence", "divergence_max", "entropy", "kl_reference")
    found = [values[f"train/{name}"] for name in names] + [values["diagnostics/full_tv"]]
    assert [abs(value) for value in found] == pytest.approx([bad] * len(found), nan_ok=True)
    assert np.isfinite(values["train/mismatch_tv"])


def test_a_log_prob_that_is_not_a_number_shows_in_every_mismatch() -> None:
    batch, output = make_micro_batch(6, seed=1)
    metrics = StepMetrics()
    metrics.update(batch, output._replace(logp=output.logp.index_fill(0, torch.tensor([2]), float("nan"))))
    metrics.update(*make_micro_batch(6, seed=2))
    values = metrics.compute_and_reset()
    assert all(np.isnan(values[f"train/{name}"]) for name in ("mismatch_tv", "mismatch_kl", "ratio_max"))


@given(gap=st.floats(-1e-3, 1e-3), tokens=st.integers(1, 9), logp=st.floats(-8, -1e-2))
def test_the_mismatch_kl_is_never_negative(gap: float, tokens: int, logp: float) -> None:
    batch, output = make_micro_batch(tokens, seed=1)
    mu = torch.full((tokens,), logp)
    pi = mu + gap * torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
    metrics = StepMetrics()
    metrics.update(replace(batch, rollout_logp=mu), output._replace(logp=pi))
    log_ratio = pi.double() - mu.double()
    exact = (log_ratio**2 / 2 + log_ratio**3 / 6 + log_ratio**4 / 24).mean().item()
    kl = metrics.compute_and_reset()["train/mismatch_kl"]
    assert kl >= 0
    assert kl == pytest.approx(exact, rel=1e-5)


def test_sums_are_exact_whatever_the_default_dtype_is() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        metrics = StepMetrics()
        micro_batches = [make_micro_batch(1001, seed=seed) for seed in (1, 2)]
        torch.set_default_dtype(dtype)
        try:
            for batch, output in micro_batches:
                metrics.update(batch, output)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(metrics.compute_and_reset())
    assert found[0] == found[1]
    assert found[0]["train/tokens"] == 2002


def test_nothing_of_a_step_remains_in_the_next() -> None:
    metrics = StepMetrics()
    metrics.update(*make_micro_batch(9, seed=1))
    metrics.compute_and_reset()
    second = make_micro_batch(5, seed=2)
    metrics.update(*second)
    assert metrics.compute_and_reset()["train/ratio_max"] == pytest.approx(whole_step([second])["train/ratio_max"])
    assert metrics.compute_and_reset() == {}


def test_a_statistic_of_no_token_is_left_out() -> None:
    batch, output = make_micro_batch(4, seed=3, kl=False)
    batch.advantage.fill_(1.0)
    metrics = StepMetrics()
    metrics.update(batch, output)
    values = metrics.compute_and_reset()
    assert "train/masked_share_positive" in values
    assert "train/masked_share_negative" not in values
    assert "train/kl_reference" not in values


def test_an_empty_step_has_no_token_statistics_and_no_nan() -> None:
    metrics = StepMetrics()
    metrics.update(*make_micro_batch(0, seed=4))
    values = metrics.compute_and_reset()
    assert set(values) == {"train/loss", "train/tokens", "perf/padding_waste"}
    assert values["train/tokens"] == 0
    assert np.isfinite(list(values.values())).all()


def test_every_name_of_a_step_is_in_the_glossary() -> None:
    metrics = StepMetrics()
    metrics.update(*make_micro_batch(30, seed=5))
    values = metrics.compute_and_reset()
    by_age = {name for name in values if name.startswith("staleness/")}
    assert set(values) - {"diagnostics/full_tv"} - by_age <= set(GLOSSARY)
    assert check_names(values) is values


@pytest.mark.parametrize("name", ["train/part/format", "heldout/part/format", "diagnostics/topk_kl", "train/reward"])
def test_families_of_names_are_known(name: str) -> None:
    check_names({name: 1.0})


@pytest.mark.parametrize("name", ["train/typo", "part/format", "reward", "heldout/reward_std"])
def test_a_name_that_the_glossary_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(KeyError, match=f"{name}.*GLOSSARY"):
        check_names({"train/reward": 1.0, name: 1.0})


def test_every_meaning_is_a_phrase() -> None:
    for name, meaning in GLOSSARY.items():
        assert len(meaning.split()) >= 3, name
        assert not meaning.endswith("."), name
