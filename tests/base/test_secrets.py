"""Secrets are known by their names and taken out of texts, command lines and settings; nothing else is."""

from __future__ import annotations

import pytest
from jsonargparse import Namespace

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.base.secrets import hide, hide_settings, hide_words, is_secret, remember
from dppo_lightning.generate.vllm.client import check_urls


@pytest.mark.parametrize(
    "name",
    ["api_key", "data.engine.init_args.api_key", "hf_token", "token", "password", "client_secret", "authorization"],
)
def test_a_secret_setting_is_known_by_its_name(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["max_new_tokens", "stop_token_ids", "tokenizer", "token_ids", "key", "answer_key", "data.seed", "passes"]
)
def test_other_settings_are_not(name: str) -> None:
    assert not is_secret(name)


def test_the_environments_secrets_are_taken_out_of_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_API_KEY", "canary-of-dppo")
    monkeypatch.setenv("HF_TOKEN", "canary-of-dppo-and-more")
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a-long-value-that-is-no-secret")
    said = hide("got canary-of-dppo-and-more, canary-of-dppo, short, a-long-value-that-is-no-secret")
    assert said == "got ***, ***, short, a-long-value-that-is-no-secret"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("{'api_key': 'abc', 'threads': 1}", "{'api_key': ***, 'threads': 1}"),
        ('{"api_key": "a b c"}', '{"api_key": ***}'),
        ("Namespace(api_key=abc, urls=None)", "Namespace(api_key=***, urls=None)"),
        ("Authorization: Bearer abc", "Authorization: ***"),
        ("api_key: null", "api_key: null"),
        ("api_key=None)", "api_key=None)"),
        ("http://me:word@host:8000 and https://host/x@y", "http://***@host:8000 and https://host/x@y"),
        ("set api_key, or DPPO_API_KEY in the environment", "set api_key, or DPPO_API_KEY in the environment"),
        ("refused the API key (VLLMRemote's api_key)", "refused the API key (VLLMRemote's api_key)"),
        ("a completion ends with the token: 5", "a completion ends with the token: 5"),
    ],
)
def test_a_named_secret_and_a_urls_user_are_taken_out_of_text(text: str, hidden: str) -> None:
    assert hide(text) == hidden
    assert str(ConfigError(text)) == hidden


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["fit", "--data.engine.init_args.api_key=abc"], ["fit", "--data.engine.init_args.api_key=***"]),
        (["--data.engine.init_args.api_key", "abc", "--x"], ["--data.engine.init_args.api_key", "***", "--x"]),
        (["--data.engine.api_key", "--x=1"], ["--data.engine.api_key", "--x=1"]),
        (["--data.engine", '{"init_args": {"api_key": "abc"}}'], ["--data.engine", '{"init_args": {"api_key": ***}}']),
        (["--data.engine.urls=[http://me:word@host:1]"], ["--data.engine.urls=[http://***@host:1]"]),
        (["--data.max_new_tokens=8", "--config", "a.yaml"], ["--data.max_new_tokens=8", "--config", "a.yaml"]),
    ],
)
def test_a_command_line_is_shown_without_secrets(words: list[str], shown: list[str]) -> None:
    assert hide_words(words) == shown


def test_nested_settings_are_copied_without_secrets() -> None:
    given = Namespace(
        engine=Namespace(class_path="X", init_args=Namespace(api_key="abc", urls=["http://me:word@host"], threads=2)),
        rewards=[{"password": "abc", "weight": 0.5}],
        token=None,
    )
    found = hide_settings(given, None)
    assert found.engine.init_args == Namespace(api_key=None, urls=["http://***@host"], threads=2)
    assert found.rewards == [{"password": None, "weight": 0.5}]
    assert found.token is None
    assert given.engine.init_args.api_key == "abc"
    assert hide_settings(given).engine.init_args.api_key == "***"


def test_the_value_of_a_secret_setting_is_known_in_any_text_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo_lightning.base.secrets._GIVEN", set())
    remember(Namespace(rewards=[{"init_args": Namespace(api_key="canary-of-settings", other="kept-as-it-is")}]))
    assert hide("HTTP 401 for canary-of-settings, kept-as-it-is") == "HTTP 401 for ***, kept-as-it-is"


def test_a_url_with_a_user_is_refused_without_saying_it() -> None:
    with pytest.raises(ConfigError) as refused:
        check_urls(["http://me:word@host:8000"])
    assert "word" not in str(refused.value)
    assert "has a user" in str(refused.value)
