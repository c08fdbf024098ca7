"""Images, and the containers that compose makes of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kunserve_sglang import launch_instance, launch_server
from tests.support.manifests import DEPLOY, compose

CONTAINERFILE = DEPLOY / "Containerfile"
SERVICES = compose()["services"]
PARSERS = {"router": launch_server.kunserve_parser, "instance": launch_instance.parser}


def test_the_containerfile_has_no_faults_that_a_linter_finds() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, CONTAINERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", PARSERS)
def test_services_give_flags_that_there_are(name: str) -> None:
    module, *words = SERVICES[name]["command"]
    assert module == PARSERS[name].__module__
    _, others = PARSERS[name]().parse_known_args(_filled(words))
    assert [word.partition("=")[0] for word in others] in ([], ["--model-path"])


@pytest.mark.parametrize("name", PARSERS)
def test_services_are_of_images_that_there_are(name: str) -> None:
    service, text = SERVICES[name], CONTAINERFILE.read_text()
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert f" AS {service['build']['target']}\n" in text
    (file,) = set(re.findall(r'CMD \["test", "-e", "(.+)"\]', text))
    assert f"--ready-file={file}" in service["command"]


@pytest.mark.parametrize("name", PARSERS)
def test_what_services_name_is_declared(name: str) -> None:
    service = SERVICES[name]
    assert set(service["secrets"]) == set(compose()["secrets"])
    for key in re.findall(r"=/run/secrets/(\S+)", " ".join(service["command"])):
        assert key in service["secrets"]
    named = {volume.partition(":")[0] for volume in service["volumes"] if volume[0].isalpha()}
    assert named <= set(compose()["volumes"])
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"] is True


def test_instances_find_the_router() -> None:
    words = dict(word.split("=", 1) for word in SERVICES["router"]["command"][1:])
    assert f"--router=http://router:{words['--port']}" in SERVICES["instance"]["command"]
    assert words["--control-address"].startswith("tcp://router:")


def _filled(words: list[str]) -> list[str]:
    """With what the environment would say: each variable's default."""
    return [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words]
