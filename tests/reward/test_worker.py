"""What a reward is shown of a completion, and what of it is recorded."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dppo_lightning.base.records import FinishReason, Group, Prompt
from dppo_lightning.base.special_tokens import Decoder
from dppo_lightning.base.timeline import Timeline
from dppo_lightning.reward.worker import RewardWorker
from tests.helpers.models import END
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
