"""Profiles: the shipped ones load and hold together, wrong ones are refused with what is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.errors import UsageError
from common.knobs import Check, Monitor
from common.process import REPOSITORY
from training.profiles import (
    OWN_SHARE,
    OWN_TASKS,
    CheckpointSpec,
    DataSpec,
    ModelSpec,
    Profile,
    TrainSpec,
    load_profile,
    own_benchmarks,
    profile_names,
)

TINY = REPOSITORY / "tests" / "assets" / "tiny.toml"


def test_the_shipped_profiles_load() -> None:
    assert {"cpu-smoke", "cpu", "20m", "340m"} <= set(profile_names())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name and profile.description


@pytest.mark.parametrize("name", ["cpu-smoke", "cpu"])
def test_cpu_profiles_need_nothing_from_outside(name: str) -> None:
    profile = load_profile(name)
    assert profile.data.source == "docstrings" and profile.data.tokenizer == "bpe"
    assert set(profile.eval.benchmarks) <= set(OWN_TASKS) and len(profile.eval.benchmarks) >= 4
    assert profile.search.measured_clip and (profile.search.cold_start, profile.search.update_batch) == (4, 2)


def test_published_scales_have_the_published_numbers() -> None:
    small, large = load_profile("20m"), load_profile("340m")
    assert (small.model.hidden_size, small.model.layers, small.model.heads, small.model.ffn) == (256, 8, 8, 768)
    assert (large.model.hidden_size, large.model.layers, large.model.ffn, large.model.tied) == (1024, 24, 2816, False)
    for profile in (small, large):
        assert profile.train.tokens_per_step == 524_288 and profile.train.steps == 2000
        assert (
            len(profile.eval.benchmarks) == 13
            and profile.eval.benchmarks[-1] == "wikitext"
            and not profile.search.measured_clip
        )
        assert (profile.search.cold_start, profile.search.update_batch) == (200, 50)


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="cpu-smoke"):
        load_profile("cpu-smokee")


def test_a_profile_file_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"profile file .*nope.toml does not exist"):
        load_profile(tmp_path / "nope.toml")
    with pytest.raises(UsageError, match="is no TOML file"):
        load_profile(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps = 30", "steps = -1", "train.steps"),
        ("symbols = 16", "symbols = true", "tasks.symbols.*a number, got True"),
        ("steps = 30", 'stepz = 30\nsteps = "many"', "stepz"),
        ('heldout = ["sklearn"]', 'heldout = ["numpy"]', "data.heldout"),
        ("symbols = 16", "symbols = 16\nrecall_pairs = 3\nx = 1", "overwrite"),
        ("seq_len = 64", "seq_len = 16", "seq_len"),
        ("vocab = 512", "vocab = 290", "model.vocab"),
        ("vocab = 512", "vocab = 70_000", "expected a number of at most 65536, got 70_?000"),
        ("copy_length = 8", "copy_length = 2", "copy_length"),
        ("hidden_size = 32", "hidden_size = 33", "model.heads must divide model.hidden_size, got 2 and 33\\n"),
        ("lr = 4e-3", "lr = inf", "train.lr: .*finite number, got inf"),
        ("lr = 4e-3", "lr = 40.0", "train.lr: expected a number of at most 1.0, got 40.0"),
        (
            "lr = 4e-3",
            "lr = 0.5\nweight_decay = 3.0",
            "lr x train.weight_decay must be below 1, .*got 0.5 x 3\\n",
        ),
        ("lr = 4e-3", "lr = 4e-3\nbetas = [2.0, 0.9]", "train.betas.0: expected a number below 1.0, got 2.0"),
        ("lr = 4e-3", "lr = 4e-3\nbetas = [0.9, -0.1]", "train.betas.1: expected a number of at least 0.0, got -0.1"),
        ("lr = 4e-3", "lr = 4e-3\neps = -1.0", "train.eps: expected a number of at least 1e-30, got -1.0"),
        ("lr = 4e-3", "lr = 4e-3\neps = 1e-60", "train.eps: .*got 1e-60"),
        ("lr = 4e-3", "lr = 4e-3\nweight_decay = inf", "train.weight_decay: .*finite number, got inf"),
        ("lr = 4e-3", "lr = 4e-3\nclip = nan", "train.clip: .*got nan"),
        ("lr = 4e-3", "lr = 4e-3\nz_loss = inf", "train.z_loss: .*finite number"),
        ("vocab = 512", "vocab = 512\nnorm_eps = -1", "model.norm_eps: .*got -1"),
        ("vocab = 512", "vocab = 512\nconv_size = 0", "model.conv_size: .*got 0"),
        ("vocab = 512", "vocab = 512\nexpand_v = 0.0", "model.expand_v: .*got 0.0"),
        ("seconds = 240", "seconds = inf", "limits.seconds: .*finite number"),
        (
            '"induction", "cloze"]',
            '"induction", "cloze", "cloze"]',
            "eval.benchmarks must be different, got .*cloze",
        ),
        ("items = 40\n", "", "eval.items: this key is missing\\n"),
        ("steps = 30", "stepz = 30\nsteps = 30", "train.stepz: there is no such key\\n"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TINY.read_text().replace(old, new))
    with pytest.raises(UsageError, match=f"(?i){said}"):
        load_profile(path)


def test_no_number_of_a_profile_may_be_infinite() -> None:
    """Whichever key it is, and whichever is added later."""
    profile = load_profile(TINY).model_dump()
    tried = 0
    for section, values in profile.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, float):
                tried += 1
                with pytest.raises(ValidationError, match="finite"):
                    Profile.model_validate({**profile, section: {**values, key: math.inf}})
    assert tried > 10


def test_an_error_says_once_what_came_and_dumps_no_section(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TINY.read_text().replace("hidden_size = 32", "hidden_size = 33").replace("items = 40", ""))
    with pytest.raises(UsageError) as raised:
        load_profile(path)
    lines = raised.value.message.splitlines()
    assert len(lines) == 2 and all(line.count("got") <= 1 and "{" not in line for line in lines)


def test_the_fingerprint_follows_what_changes_a_result_and_nothing_else() -> None:
    profile = load_profile(TINY)
    search = profile.search.model_copy(update={"cold_start": 9})
    train = profile.train.model_copy(update={"lr": 1e-3})
    assert profile.model_copy(update={"search": search}).fingerprint() == profile.fingerprint()
    assert profile.model_copy(update={"train": train}).fingerprint() != profile.fingerprint()


def test_every_profile_key_setting_and_rule_is_documented() -> None:
    text = (REPOSITORY / "docs" / "training.md").read_text()
    for name in profile_names():
        assert f"| `{name}` |" in text, name
    for spec, prefix in ((ModelSpec, ""), (TrainSpec, ""), (CheckpointSpec, ""), (DataSpec, "data.")):
        for key in spec.model_fields:
            assert f"`{prefix}{key}`" in text, f"{spec.__name__}.{key}"
    for key in Monitor.model_fields:
        assert f"`{key}`" in text, key
    verifier = (REPOSITORY / "docs" / "verifier.md").read_text()
    for key in Check.model_fields:
        assert f"`check.{key}`" in verifier, key


def test_scales_of_20_tokens_a_parameter() -> None:
    for name, millions in (("60m", 60), ("130m", 130)):
        train = load_profile(name).train
        assert train.steps * train.tokens_per_step == pytest.approx(20e6 * millions, rel=0.01)
    long = load_profile("340m-15b").train
    assert long.steps * long.tokens_per_step == pytest.approx(15e9, rel=1e-3) and long.schedule == "cosine"
    assert long.warmup * long.tokens_per_step == pytest.approx(0.5e9, rel=1e-3)
    assert load_profile("20m-v16k").stable_steps() == [400, 800, 1600]


def test_own_benchmarks_take_the_place_of_those_of_the_hub() -> None:
    assert own_benchmarks(load_profile("cpu")) == load_profile("cpu")
    small = own_benchmarks(load_profile("20m-v16k"))
    assert small.eval.benchmarks == ["recall", "copying", "induction", "cloze"] and small.tasks.share == OWN_SHARE
    published = own_benchmarks(load_profile("20m"))  # its tokenizer has no symbols for generated tasks
    assert published.eval.benchmarks == ["cloze"] and published.tasks.share == 0
    assert published.fingerprint() != load_profile("20m").fingerprint()
    # Whole benchmarks of the hub are no measure for how many items a text of our own gives.
    assert own_benchmarks(load_profile("340m")).eval.own_items == 10_000 < load_profile("340m").eval.items
    assert load_profile("cpu").eval.own_items == load_profile("cpu").eval.items


def test_own_benchmarks_that_do_not_fit_are_wrong_usage() -> None:
    profile = load_profile("20m-v16k")
    short = profile.model_copy(update={"train": profile.train.model_copy(update={"seq_len": 32})})
    with pytest.raises(UsageError, match=r"do not fit profile 20m-v16k: train\.seq_len must be at least"):
        own_benchmarks(short)
