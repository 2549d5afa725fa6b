"""What a reward is shown of a completion, and what of it is recorded."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dppo_lightning.base.errors import RewardError
from dppo_lightning.base.records import Failure, FinishReason, Group, Prompt
from dppo_lightning.base.special_tokens import Decoder
from dppo_lightning.base.timeline import Timeline
from dppo_lightning.reward import CodeReward, PythonReward, ReasoningGymReward, RewardFunction
from dppo_lightning.reward.failures import FailureBound
from dppo_lightning.reward.rewarding import FAILURES, Rewarding
from dppo_lightning.reward.worker import RewardWorker
from tests.helpers import hostile
from tests.helpers.models import END
from tests.helpers.processes import PATIENCE
from tests.helpers.records import make_completion
from tests.helpers.rewards import IN_PROCESS, Scored


@pytest.fixture(scope="module")
def tokenizer(tiny_policy_dir: str) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_policy_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "<turn>"], "pad_token": "<pad>"})
    return tokenizer


def test_a_reward_sees_special_tokens_ids_and_the_raw_text(tokenizer: PreTrainedTokenizerBase) -> None:
    think, turn, pad = tokenizer.convert_tokens_to_ids(["<think>", "<turn>", "<pad>"])
    rows: list[tuple[list[int], FinishReason]] = [
        ([think, 33, END], "stop"),
        ([33, turn], "stop"),
        ([33, pad, 34], "length"),
        ([33, END], "length"),
    ]
    group = Group(Prompt("p", (1,), "?", "A"), [make_completion(ids, reason=reason) for ids, reason in rows], [])
    reward = Scored(lambda sample: float("<think>" in sample.completion))
    worker = RewardWorker(reward, Decoder(tokenizer, (END, turn)), IN_PROCESS, Timeline())
    worker.submit(group).result(9)
    worker.close()
    assert group.rewards is not None
    assert group.rewards.tolist() == [1, 0, 0, 0]
    assert [(sample.completion, sample.raw_completion) for sample in reward.seen] == [
        ("<think>A", "<think>A<end>"),
        ("A", "A<turn>"),
        ("AB", "A<pad>B"),
        ("A", "A<end>"),
    ]
    assert [sample.token_ids for sample in reward.seen] == [tuple(ids) for ids, _ in rows]
    assert [sample.finished for sample in reward.seen] == [True, True, False, False]
    # Recorded only where more is missing than the token that ended the completion.
    assert [record.get("raw_completion") for record in group.records()] == [None, None, "A<pad>B", "A<end>"]


def groups_of(tokenizer: PreTrainedTokenizerBase, *texts: str, size: int = 2) -> list[Group]:
    """Groups of completions with these texts."""
    rows = [make_completion([*tokenizer(text, add_special_tokens=False)["input_ids"], END]) for text in texts]
    return [
        Group(Prompt(f"p{place}", (1,), "?", "7", {"task": "countdown"}), rows[place : place + size], [])
        for place in range(0, len(rows), size)
    ]


def scored(
    tokenizer: PreTrainedTokenizerBase, reward: RewardFunction, groups: list[Group], **settings: Any
) -> dict[str, float]:
    """Reward groups, which are submitted at once; what the worker counts of them."""
    worker = RewardWorker(reward, Decoder(tokenizer, (END,)), Rewarding(**settings), Timeline())
    try:
        for future in [worker.submit(group, 0.5) for group in groups]:
            future.result(PATIENCE)
        return worker.check(groups)
    finally:
        worker.close()


FAIL_AT = PythonReward("tests.helpers.hostile.fail_at", {"words": ["bad"]})


@pytest.mark.parametrize("settings", [{"workers": 1}, {"workers": 3}, {"isolation": "none"}], ids=str)
def test_a_completion_that_fails_gets_the_configured_value_and_is_kept_for_a_look(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    groups = groups_of(tokenizer, "a", "bad", "ccc", "dd", "very bad", "e")
    counts = scored(tokenizer, FAIL_AT, groups, failure_value=-2.0, **settings)
    assert [np.asarray(group.rewards).tolist() for group in groups] == [[1, -2], [3, 2], [-2, 1]]
    assert counts == {f"reward/failed_{kind}": 2.0 * (kind == "raised") for kind in FAILURES}
    records = [record for group in groups for record in group.records()]
    assert [record.get("not_scored", "")[:7] for record in records] == ["", "raised:", "", "", "raised:", ""]
    assert "hostile.py" in records[1]["not_scored"]
    assert records[1]["not_scored"].endswith("ValueError: bad")
    assert "could not score 'very bad' (raised: " in caplog.text
    assert [record["parts"]["letters"] for record in records] == [1, None, 1, 1, None, 1]


def test_a_reward_that_always_fails_stops_with_its_error_and_its_line(tokenizer: PreTrainedTokenizerBase) -> None:
    line = inspect.getsource(hostile).splitlines().index("            raise ValueError(sample.completion)") + 1
    reason = (
        rf"hostile.fail_at could not score 4 of 4 completions, .*max_failed_share=0.5 \(4 made the reward raise an "
        rf"error\); the last: raised: \S*hostile.py:{line}: ValueError: bad"
    )
    with pytest.raises(RewardError, match=reason):
        scored(tokenizer, FAIL_AT, groups_of(tokenizer, *["bad"] * 4))


@pytest.mark.parametrize(("bad", "share", "stops"), [(2, 0.5, False), (3, 0.5, True), (1, 0.0, True), (4, 1.0, False)])
def test_a_share_above_the_bound_stops_the_run(
    bad: int, share: float, stops: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    groups = groups_of(tokenizer, *["bad"] * bad, *["good"] * (4 - bad))
    settings = {"max_failed_share": share, "isolation": "none"}
    if stops:
        with pytest.raises(RewardError, match=f"could not score {bad} of 4 completions"):
            scored(tokenizer, FAIL_AT, groups, **settings)
    else:
        scored(tokenizer, FAIL_AT, groups, **settings)


def test_a_long_rollout_is_not_waited_for() -> None:
    failure = Failure("timeout", "10 s")
    FailureBound("Mine", 0.5).add([failure] * 255)  # too few to tell
    with pytest.raises(RewardError, match=r"Mine could not score 200 of 256 completions.*200 took longer"):
        FailureBound("Mine", 0.5).add([failure] * 200 + [None] * 56)


def test_a_wrong_count_and_a_nan_are_errors_of_the_reward(tokenizer: PreTrainedTokenizerBase) -> None:
    for function, reason in (("length_twice", "2 rewards for 1 completions"), ("not_a_number", "nan.*finite")):
        reward = PythonReward(f"tests.helpers.hostile.{function}")
        with pytest.raises(RewardError, match=rf"hostile.{function} returned .*{reason}"):
            scored(tokenizer, reward, groups_of(tokenizer, "a", "b"))


def test_a_reward_that_sees_whole_groups_succeeds_or_fails_for_all_of_one(tokenizer: PreTrainedTokenizerBase) -> None:
    groups = groups_of(tokenizer, "a", "bb", "c", "bad")
    reward = PythonReward("tests.helpers.hostile.rank_of", whole_groups=True)
    scored(tokenizer, reward, groups, failure_value=-1.0)
    assert [np.asarray(group.rewards).tolist() for group in groups] == [[0, 1], [-1, -1]]


def test_what_may_execute_a_completion_is_not_called_in_the_trainers_process(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for reward in (CodeReward(), ReasoningGymReward(), PythonReward("builtins.list", runs_completions=True)):
        with pytest.raises(RewardError, match=r"may execute what the model writes.*isolation: process"):
            scored(tokenizer, reward, groups_of(tokenizer, "a", "b"), isolation="none")


def test_many_groups_are_scored_alike_by_any_number_of_workers(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [letter * count for count in range(1, 20) for letter in "abcdefgh"]
    found = []
    for workers in (1, 3):
        groups = groups_of(tokenizer, *texts, size=8)
        scored(tokenizer, PythonReward("tests.helpers.hostile.at_random"), groups, workers=workers)
        found.append([np.asarray(group.rewards).tolist() for group in groups])
    assert found[0] == found[1]
