"""What a member does for its group beside activations."""

from __future__ import annotations

from tests.support.stage import Stage, micro_batch, valid_packets


def test_what_has_come_is_kept_though_activations_always_wait() -> None:
    stage = Stage()
    *_, parameters, _, _ = valid_packets()
    stage.wire.arriving.extend([micro_batch(0), parameters, micro_batch(1), micro_batch(2)])
    for left in (2, 1):
        assert stage.work.serve_one(0.0)
        stage.work.move_pieces(0.0)
        assert len(stage.work._batches) == left
        assert not stage.work._pieces, "a piece waits behind all activations there are"
