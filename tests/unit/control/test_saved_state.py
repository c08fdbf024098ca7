"""A router goes on where the one before it has ended, whatever that has left."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kunserve_sglang.control.saved_state import SavedState, StateFile
from tests.support.mock_instance import vote_no, vote_yes
from tests.support.mock_worker import Canned, MockWorker
from tests.support.router_harness import RouterCluster
from tests.support.waiting import until

Start = Callable[..., RouterCluster]


def again(router: RouterCluster) -> None:
    """The next router, at the same address."""
    router.stop_router()
    router.start_router()


def written(router: RouterCluster, what: str) -> None:
    until(lambda: what in Path(router.config.state_file).read_text())


def saved(router: RouterCluster) -> SavedState:
    state = StateFile(Path(router.config.state_file)).read()
    assert state is not None
    return state


def test_groups_and_epochs_are_found_as_they_are(start_router: Start) -> None:
    router = start_router(2)
    assert router.post("/kunserve/drop", {}).json["status"] == "committed"
    router.ready(2)
    before = {i["id"]: (i["group"], i["epoch"], i["layers"]) for i in router.status()["instances"]}
    again(router)
    # No request is turned away meanwhile: the first answer says that both serve.
    assert router.get("/readiness").json == {"status": "ok", "available": 2, "expected": 2}
    router.ready(2)
    after = {i["id"]: (i["group"], i["epoch"], i["layers"]) for i in router.status()["instances"]}
    assert after == before
    restored = router.post("/kunserve/restore", {}).json
    assert restored["status"] == "committed"
    assert restored["epoch"] > max(epoch for _, epoch, _ in before.values())


def test_no_epoch_is_used_again_that_was_decided_against(start_router: Start) -> None:
    router = start_router(2)
    router.instances[0].on_prepare = vote_no
    for _ in range(3):
        refused = router.post("/kunserve/drop", {}).json
        assert refused["status"] == "aborted"
    router.instances[0].on_prepare = vote_yes
    until(lambda: saved(router).last_epoch >= refused["epoch"])
    again(router)
    router.ready(2)
    dropped = router.post("/kunserve/drop", {}).json
    assert dropped["status"] == "committed"
    assert dropped["epoch"] > refused["epoch"]


def test_what_was_set_stays_set(start_router: Start) -> None:
    router = start_router(1)
    wanted = router.put("/kunserve/policy", {"auto": False, "drop": 0.8, "cooldown_s": 9}).json
    written(router, '"cooldown_s":9')
    again(router)
    assert router.get("/kunserve/policy").json == wanted


@pytest.mark.parametrize("key", [None, "s3cret"])
def test_plain_servers_stay_under_their_numbers_and_keys(
    start_router: Start, worker: MockWorker, key: str | None
) -> None:
    router = start_router(0)
    body: dict[str, Any] = {"url": worker.url} | ({} if key is None else {"api_key": key})
    added = router.post("/workers", body).json
    until(lambda: router.get("/readiness").status == 200)
    written(router, worker.url)
    again(router)
    assert router.get("/readiness").json["available"] == 1
    (known,) = router.get("/workers").json["workers"]
    assert (known["id"], known["url"]) == (added["id"], added["url"])
    worker.answers["/generate"] = Canned({})
    assert router.post("/generate", {"text": "x"}).status == 200
    shown = worker.requests("/generate")[-1].headers.get("authorization")
    assert shown == (f"Bearer {key}" if key else None)
    assert router.post("/workers", {"url": "http://127.0.0.1:9"}).json["id"] == added["id"] + 1


def test_nobody_else_can_read_the_keys_in_it(start_router: Start) -> None:
    router = start_router(0)
    router.post("/workers", {"url": "http://127.0.0.1:9", "api_key": "s3cret"})
    written(router, "s3cret")
    assert stat.S_IMODE(Path(router.config.state_file).stat().st_mode) == 0o600


def test_one_that_has_left_is_not_missed(start_router: Start) -> None:
    router = start_router(2)
    assert router.call("DELETE", "/workers/1").status == 200
    written(router, '"expected":[0]')
    router.instances.pop().stop()
    again(router)
    assert router.get("/readiness").json == {"status": "ok", "available": 1, "expected": 1}


def test_one_that_dies_while_there_is_no_router_is_gone_for_its_group(start_router: Start) -> None:
    """The next router has never heard of it but from the last."""
    router = start_router(2)
    assert router.post("/kunserve/drop", {}).json["status"] == "committed"
    router.ready(2)
    router.stop_router()
    router.instances.pop().stop()
    router.start_router()
    survivor = router.instances[0]
    until(lambda: survivor.lost and not survivor.layout.cooperative)
    assert router.described(1)["mode"] == "dead"


def test_numbers_that_are_lent_are_not_lent_again(start_router: Start) -> None:
    from tests.unit.router.test_joining import MODEL, join

    router = start_router(1, model=MODEL)
    first = join(router).json["instance"]
    written(router, f'"next_number":{first + 1}')
    again(router)
    assert join(router).json["instance"] == first + 1


@pytest.mark.parametrize("left", [b"", b"{", b'{"policy": 1}', None])
def test_what_cannot_be_read_is_nothing(
    start_router: Start, left: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Instances say again what they are; only what they do not know is lost."""
    router = start_router(1)
    router.stop_router()
    file = Path(router.config.state_file)
    file.unlink()
    if left is not None:
        file.write_bytes(left)
    router.start_router()
    router.ready(1)
    assert ("unreadable" in caplog.text) == (left is not None)


def test_a_disk_that_is_full_ends_no_router(start_router: Start) -> None:
    router = start_router(1)
    folder = Path(router.folder) / "router.json.new"
    folder.mkdir()  # so the file cannot be written
    assert router.put("/kunserve/policy", {"auto": False}).status == 200
    router.ready(1)
    folder.rmdir()
    assert router.put("/kunserve/policy", {"drop": 0.8}).status == 200
    until(lambda: (s := StateFile(Path(router.config.state_file)).read()) and s.policy.drop == 0.8)
