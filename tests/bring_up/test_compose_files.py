"""The compose files, the Dockerfile and .env.example agree with the settings and with each other."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from common.process import REPOSITORY
from common.settings import Settings, load
from tests.bring_up.compose import (
    FILES,
    FOLDERS,
    closure,
    environment,
    example,
    filled,
    read,
    services,
    stages,
    variables,
)
from training.profiles import load_profile

SERVICES = services()
SECRETS = {name for name, value in example().items() if not value}
KNOWN = {**example(), **dict.fromkeys(SECRETS, "secret0")}
EVERY = pytest.mark.parametrize("name", SERVICES)
OURS = pytest.mark.parametrize("name", [name for name in SERVICES if "build" in SERVICES[name]])


def knob(variable: str) -> Any:
    """The field behind ASI_SECTION__KEY; KeyError where there is none."""
    section, key = variable.removeprefix("ASI_").lower().split("__")
    return Settings.model_fields[section].annotation.model_fields[key]  # type: ignore[union-attr]


@OURS
def test_every_variable_is_a_setting_and_its_value_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [variable for variable in SERVICES[name]["environment"] if variable.startswith("ASI_")]
    assert ours
    for variable in ours:
        assert knob(variable)
    given = environment(SERVICES[name], KNOWN)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    settings = load()
    for variable in set(ours) & set(given):
        section, key = variable.removeprefix("ASI_").lower().split("__")
        found = getattr(getattr(settings, section), key)
        assert (found.get_secret_value() if isinstance(found, SecretStr) else str(found)) == given[variable]


def test_whoever_asks_a_language_model_is_given_the_same_of_it() -> None:
    wanted = {name for name in SERVICES["pipeline"]["environment"] if name.startswith("ASI_LLM__")}
    assert wanted | {"ASI_DATABASE__JUDGE"} <= set(SERVICES["database"]["environment"])
    assert SERVICES["database"]["extra_hosts"] == SERVICES["pipeline"]["extra_hosts"]


def test_a_wrong_name_would_be_seen() -> None:
    with pytest.raises(KeyError):
        knob("ASI_DATABASE__STOER")


def test_the_example_names_what_the_files_use_and_nothing_else() -> None:
    used = {name for file in FILES for name, _, _ in variables(read(file))}
    passed = {name for one in SERVICES.values() for name, value in one["environment"].items() if value is None}
    assert set(example(comments=True)) == used | passed
    for name in example(comments=True):
        assert not name.startswith("ASI_") or knob(name)


def test_no_secret_has_a_value_or_a_default() -> None:
    looks = re.compile(r"PASSWORD|_KEY$|SECRET|TOKEN")
    for name, value in example(comments=True).items():
        assert not (looks.search(name) and value), f"{name} has a value in .env.example"
    for file in FILES:
        for name, kind, _ in variables(read(file)):
            assert name not in SECRETS or kind == "?", f"{file}: write ${{{name}:?...}}"
            assert not looks.search(name) or name in SECRETS, f"{name} is no secret in .env.example"
    for one in SERVICES.values():
        for name, value in one["environment"].items():
            if name.startswith("ASI_") and knob(name).annotation in (SecretStr, SecretStr | None):
                assert value is None or re.fullmatch(r"\$\{\w+:\?[^}]*\}", value), f"{name} has a value"
            assert not looks.search(name) or value is None or "${" in value, f"{name} has a value"
    for place in (".env", "database/.env", "cognition_base/.env"):
        ignored = subprocess.run(["git", "-C", str(REPOSITORY), "check-ignore", "-q", place], check=False)
        assert ignored.returncode == 0, f"{place} would be committed"


def test_every_secret_setting_of_a_service_can_be_given_to_it() -> None:
    """An API key that a section has and the compose file forgets would leave a server open, or refuse to start it."""
    for name, sections in (
        ("database", ["database", "llm"]),
        ("cognition", ["cognition"]),
        ("pipeline", ["services", "llm"]),
    ):
        for section in sections:
            fields = Settings.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
            secret = [key for key, field in fields.items() if field.annotation in (SecretStr, SecretStr | None)]
            wanted = {f"ASI_{section}__{key}".upper() for key in secret}
            assert wanted <= set(SERVICES[name]["environment"]), f"{name} is not given {wanted}"


@pytest.mark.parametrize("target", ["database", "cognition"])
def test_an_image_has_every_package_that_its_code_imports(target: str) -> None:
    stage = stages()[target]
    installed = closure(stage.packages)
    homes = importlib.metadata.packages_distributions()
    for source, _ in [copy for copy in stage.copies if not copy[1].startswith("/")]:
        for file in (REPOSITORY / source).rglob("*.py"):
            if "llm" in file.parts and target == "cognition":  # the loop's and the judge's alone
                continue
            for top in imported(file) & set(homes):
                names = {re.sub(r"[-_.]+", "-", home).lower() for home in homes[top]}
                assert names & installed, f"{file} imports {top}: install one of {names} in the Dockerfile's {target}"


def imported(file: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_defaults_of_variables_are_those_of_the_example() -> None:
    for file in FILES:
        for name, kind, text in variables(read(file)):
            assert kind != "-" or text == example()[name], name


@EVERY
def test_only_loopback_is_published(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+:-\d+\}:\d+", port), f"{name} publishes {port}"
    assert SERVICES[name].get("network_mode") is None


def test_ports_are_those_of_the_settings() -> None:
    settings = Settings()
    published = {name: filled(one["ports"], {})[0].split(":")[1:] for name, one in SERVICES.items() if "ports" in one}
    assert published["database"] == [str(settings.database.port)] * 2
    assert published["cognition"] == [str(settings.cognition.port)] * 2
    assert published["opensearch"] == [settings.cognition.opensearch_url.rsplit(":", 1)[1]] * 2
    assert published["mongodb"][0] == "27018" and "${port:-27018}" in Path(FOLDERS[0], "start_api.sh").read_text()
    for name, section in (("database", "DATABASE"), ("cognition", "COGNITION")):
        given = SERVICES[name]["environment"]
        assert given[f"ASI_{section}__PORT"] == published[name][1] == stages()[name].exposed[0]
        assert given[f"ASI_{section}__HOST"] == "0.0.0.0"  # else the published port would lead nowhere


@OURS
def test_addresses_lead_to_services_of_the_project(name: str) -> None:
    listening = {other: one["ports"][0].rsplit(":", 1)[1] for other, one in SERVICES.items() if "ports" in one}
    for variable, value in environment(SERVICES[name], KNOWN).items():
        for host, port in re.findall(r"://(?:[^/@]*@)?([\w.-]+):(\d+)", value):
            assert listening.get(host) == port, f"{variable} leads to {host}:{port}"
            assert SERVICES[name]["depends_on"][host] == {"condition": "service_healthy"}


@EVERY
def test_volumes_are_declared_and_hold_the_paths(name: str) -> None:
    declared = read(SERVICES[name]["file"]).get("volumes", {})
    mounted = dict(volume.split(":") for volume in SERVICES[name].get("volumes", []))
    assert set(mounted) <= set(declared)
    for variable, value in environment(SERVICES[name], KNOWN).items():
        if value.startswith("/"):
            assert any(Path(value).is_relative_to(place) for place in mounted.values()), f"{variable} is lost: {value}"
    where = {"mongodb": "/data/db", "opensearch": "/usr/share/opensearch/data"}
    assert name not in where or where[name] in mounted.values()


@EVERY
def test_every_service_is_limited_pinned_and_asked_for_its_health(name: str) -> None:
    one = SERVICES[name]
    assert re.fullmatch(r"\d+[mg]", one["mem_limit"])
    assert one["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL") and one["restart"]
    if "build" in one:
        stage = stages()[one["build"]["target"]]
        assert one["command"] == stage.command and (REPOSITORY / stage.command[1]).is_file()
        assert (one["file"].parent / one["build"]["context"]).resolve() == REPOSITORY
        assert one["cap_drop"] == ["ALL"] and "no-new-privileges:true" in one["security_opt"]
    else:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+", one["image"]), "an exact version, please"


def test_images_start_from_an_exact_version_and_end_without_root() -> None:
    found = stages()
    assert {"database", "cognition", "pipeline", "worker"} <= set(found)
    for stage in found.values():
        assert stage.parent in found or re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", stage.parent)
    for name in ("database", "cognition", "pipeline", "worker"):
        assert found[name].user is not None and found[name].user.split(":")[0] not in ("root", "0")


def test_what_is_copied_into_images_is_let_through() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*" and let_through == {source for one in stages().values() for source, _ in one.copies}


def test_the_root_file_includes_both_services_and_the_loop_for_cpu_and_gpu() -> None:
    root = read(FILES[2])
    assert [REPOSITORY / one for one in root["include"]] == list(FILES[:2])
    assert {read(file)["name"] for file in FILES} == {root["name"]}  # one project, so that volumes are the same
    assert SERVICES["pipeline"]["profiles"] == ["cpu"] and SERVICES["pipeline-gpu"]["profiles"] == ["gpu"]
    assert SERVICES["pipeline-gpu"]["gpus"] == "all"


def test_the_example_merges_candidates_as_its_profile_does() -> None:
    search = load_profile(example()["PIPELINE_PROFILE"]).search
    assert example()["ASI_DATABASE__COLD_START"] == str(search.cold_start)
    assert example()["ASI_DATABASE__UPDATE_BATCH"] == str(search.update_batch)
