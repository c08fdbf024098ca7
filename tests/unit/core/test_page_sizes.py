"""Pages, and the mappings that they need."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kunserve_sglang.core.page_sizes import mappings_for, page_bytes_for, page_bytes_on_cpu


@given(st.integers(0, 1 << 45))
def test_page_sizes_grow_with_the_budget(budget: int) -> None:
    page = page_bytes_for(budget, 2 << 20, 32 << 20)
    assert page % (2 << 20) == 0
    assert budget // page <= 16_384 or page == 32 << 20
    assert page == 2 << 20 or budget // (page // 2) > 16_384


def test_the_usual_limit_of_mappings_is_good_for_56_gib() -> None:
    def needed(gib: int) -> int:
        return mappings_for((gib << 30) // page_bytes_on_cpu(gib << 30))

    assert needed(32) < needed(55) < 65_530 < needed(57)
