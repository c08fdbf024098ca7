"""The check that every test says what it needs."""

from __future__ import annotations

import pytest

from tests.support import hardware
from tests.support.places import ROOT

TESTS = ROOT / "tests"


def _items(folder: str, source: str, request: pytest.FixtureRequest) -> list[pytest.Item]:
    """What pytest would collect from a module with this source in a folder of `tests`."""
    names: dict[str, object] = {"pytest": pytest}
    exec(source, names)
    tests = [(n, f) for n, f in names.items() if n.startswith("test_")]
    made = []
    for name, function in tests:
        item = pytest.Function.from_parent(request.node.parent, name=name, callobj=function)
        item.path = TESTS / folder / "test_made_up.py"
        # Marks of this module are not those of the one made up.
        item.own_markers = list(getattr(function, "pytestmark", []))
        made.append(item)
    return made


def _names(item: pytest.Item) -> list[str]:
    return [mark.name for mark in item.own_markers]


@pytest.mark.parametrize("folder", ["unit", "integration", "browser"])
def test_folders_for_cpus_say_it_for_their_tests(
    folder: str, request: pytest.FixtureRequest
) -> None:
    (item,) = _items(folder, "def test_a(): pass", request)
    hardware.assign([item], TESTS)
    assert _names(item) == ["cpu"]


@pytest.mark.parametrize("marker", ["gpu", "multi_gpu"])
def test_tests_for_gpus_say_how_many(marker: str, request: pytest.FixtureRequest) -> None:
    source = f"@pytest.mark.{marker}\ndef test_a(): pass"
    (item,) = _items("gpu", source, request)
    hardware.assign([item], TESTS)
    assert _names(item) == [marker]
    with pytest.raises(pytest.UsageError, match=f"test_a has {marker}"):
        hardware.assign(_items("unit", source, request), TESTS)


@pytest.mark.parametrize("folder", ["gpu", "a_new_folder"])
def test_elsewhere_a_test_without_a_marker_is_refused(
    folder: str, request: pytest.FixtureRequest
) -> None:
    items = _items(folder, "def test_a(): pass", request)
    with pytest.raises(pytest.UsageError, match="test_a has none"):
        hardware.assign(items, TESTS)


def test_two_markers_are_refused(request: pytest.FixtureRequest) -> None:
    source = "@pytest.mark.gpu\n@pytest.mark.cpu\ndef test_a(): pass"
    with pytest.raises(pytest.UsageError, match="test_a has cpu and gpu"):
        hardware.assign(_items("unit", source, request), TESTS)


def test_tests_are_skipped_for_want_of_gpus_only(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    source = "\n".join(
        f"@pytest.mark.{marker}\ndef test_{marker}(): pass" for marker in hardware.GPUS_NEEDED
    )
    items = _items("gpu", source, request)
    hardware.skip_without_gpus(items)
    assert {item.name: "skip" in _names(item) for item in items} == {
        "test_cpu": False,
        "test_gpu": False,
        "test_multi_gpu": True,
    }
