"""Settings: one declaration a knob; a wrong value stops with expected, got and the fix."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from common.errors import SettingsError
from common.settings import Settings, load, parse
from common.settings_toml import dump_toml
from pipeline.report import main as report
from training.train import main as train


def test_flags_win_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "asi.toml"
    file.write_text("[run]\nseed = 1\nparallel = 4\nexperiments = 9\n")
    monkeypatch.setenv("ASI_RUN__SEED", "2")
    monkeypatch.setenv("ASI_RUN__PARALLEL", "5")
    argv = ["--config", str(file), "--seed", "3"]
    settings, _ = parse(argparse.ArgumentParser(), argv, sections=["run"], short=["run.seed"])
    assert (settings.run.seed, settings.run.parallel, settings.run.experiments) == (3, 5, 9)


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("run", "experiments", "three", "expected a valid integer"),
        ("run", "data_dir", "", "expected a path, got ''"),
        ("training", "cache_dir", "", "expected a path, got ''"),
        ("training", "text", ["a.txt", ""], "expected a path, got ['a.txt', '']"),
        ("run", "data_dir", "\udcff/run", "expected text in UTF-8"),
        ("run", "experiments", True, "expected a number, got True"),
        ("monitor", "slow_factor", True, "expected a number, got True"),
        ("run", "experiments", 0, "greater than or equal to 1"),
        ("services", "embedding_url", "notaurl", "expected a URL such as http://127.0.0.1:8001, got 'notaurl'"),
        ("services", "database_url", "http://", "expected a URL"),
        ("services", "cognition_url", "localhost:13142", "expected a URL"),
        ("services", "embedding_url", "http://127.0.0.1:port", "expected a URL"),
        ("database", "store", "sqlite:////tmp/x.sqlite?mode=ro", "without options"),
        ("run", "sed", 1, "did you mean 'seed'"),
        ("rum", "seed", 1, "did you mean 'run'"),
        ("sandbox", "backend", "jail", "'bubblewrap', 'docker' or 'process'"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_what_came(section: str, key: str, value: object, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(None, {section: {key: value}})
    assert told in str(caught.value)
    assert "fix:" in str(caught.value)


def test_a_profile_is_the_same_file_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    for folder, written in ((".", "mine.toml"), ("deep", "../mine.toml"), ("link", "./../mine.toml")):
        monkeypatch.chdir(tmp_path / folder)
        assert load(None, {"run": {"profile": written}}).run.profile == str(tmp_path.resolve() / "mine.toml")


def test_a_misspelt_environment_section_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_RUNS__SEED", "1")
    with pytest.raises(SettingsError, match="did you mean 'run'"):
        load()


@pytest.mark.parametrize(
    ("name", "meant"), [("ASI_RUN_PROFILE", "ASI_RUN__PROFILE"), ("ASI_LLM_API_KEY", "ASI_LLM__API_KEY")]
)
def test_one_underscore_for_two_is_refused(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(SettingsError, match=f"did you mean {meant}"):
        load()


def test_broken_or_missing_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\nseed = 1")
    for path in (broken, tmp_path / "absent.toml", tmp_path, Path("/dev/zero")):
        with pytest.raises(SettingsError, match=path.name):
            load(path)


def test_the_resolved_settings_read_back_and_hold_no_secret(tmp_path: Path) -> None:
    settings = load(None, {"run": {"seed": 7, "seed_program": ['a "quoted".py']}, "llm": {"api_key": "hush-hush"}})
    file = tmp_path / "settings.toml"
    file.write_text(dump_toml(settings))
    assert "hush-hush" not in file.read_text()
    again = load(file)
    assert again.run == settings.run and again.llm.api_key is None


def test_an_address_with_a_password_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(dump_toml(load(None, {"database": {"store": "mongodb://user:hush@host/db"}})))
    assert "hush" not in file.read_text() and "# store is secret" in file.read_text()
    assert load(file).database == Settings().database
    plain = load(None, {"database": {"store": "mongodb://host:1/db@1"}})
    file.write_text(dump_toml(plain))
    assert load(file).database == plain.database


def test_relative_files_are_meant_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()

    def store(value: str) -> str:
        return load(None, {"database": {"store": value}}).database.store

    assert store("sqlite:///mine.sqlite") == f"sqlite:///{tmp_path}/mine.sqlite"
    for same in ("sqlite:////tmp/a.sqlite", "sqlite:///:memory:", "sqlite:///", "mongodb://host:1/db"):
        assert store(same) == same
    for model, resolved in (("model", f"{tmp_path}/model"), ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2")):
        assert load(None, {"embedding": {"model": model}}).embedding.model == resolved


def test_an_empty_path_of_a_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for main, argv in (
        (train, ["delta_net.py", "--out", ""]),
        (train, ["", "--out", "x"]),
        (report, ["--data-dir", ""]),
        (train, ["delta_net.py", "--out", "x", "--config", ""]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2 and "expected a path, got ''" in capsys.readouterr().err


def test_every_knob_has_help_and_a_default() -> None:
    for section, field in Settings.model_fields.items():
        for key, knob in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert knob.description, f"{section}.{key}"
            assert not knob.is_required(), f"{section}.{key}"
