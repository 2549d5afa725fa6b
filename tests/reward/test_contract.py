"""What holds for every reward."""

import copy
import math
import pickle

import pytest

from tests.reward.cases import CASES, Case

every_reward = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_reward
def test_one_finite_number_for_each_completion(case: Case):
    scores = case.reward(case.samples)
    assert len(scores) == len(case.samples)
    assert all(math.isfinite(score.value) for score in scores)


@every_reward
def test_no_completions_no_scores(case: Case):
    assert case.reward([]) == []


@every_reward
def test_a_score_depends_on_its_own_completion_only(case: Case):
    together = case.reward(case.samples)
    assert case.reward(case.samples[::-1]) == together[::-1]
    assert [case.reward([sample])[0] for sample in case.samples] == together


@every_reward
def test_scoring_again_gives_the_same_and_leaves_the_samples_alone(case: Case):
    before = copy.deepcopy(case.samples)
    assert case.reward(case.samples) == case.reward(case.samples)
    assert case.samples == before


@every_reward
def test_the_samples_are_not_all_worth_the_same(case: Case):
    assert len({score.value for score in case.reward(case.samples)}) > 1


@every_reward
def test_another_process_can_be_given_the_reward(case: Case):
    assert pickle.loads(pickle.dumps(case.reward))(case.samples) == case.reward(case.samples)
