"""LoadProgress against a model that looks at every byte's chunk each time."""

from __future__ import annotations

import pytest
from dualpath.agent.load_progress import LoadProgress
from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given, settings
from hypothesis import strategies as st

LAYOUTS = [
    KVLayout(layers=1, block_tokens=16, layer_bytes=1000, dtype="fp8"),
    KVLayout(layers=5, block_tokens=16, layer_bytes=200 << 10, dtype="fp8"),
    KVLayout(layers=3, block_tokens=16, layer_bytes=1 << 20, dtype="fp16"),
    KVLayout(layers=61, block_tokens=64, layer_bytes=41_984, dtype="fp8"),
]


class BruteForce:
    """The same answers from the definitions."""

    def __init__(self, layout: KVLayout, blocks: int) -> None:
        self.layout = layout
        self.valid = blocks
        self.done: set[tuple[int, int]] = set()

    def block_done(self, block: int) -> bool:
        return all((block, chunk) in self.done for chunk in range(self.layout.chunk_count))

    def complete_blocks(self) -> int:
        count = 0
        while count < self.valid and self.block_done(count):
            count += 1
        return count

    def layer_done(self, layer: int) -> bool:
        start = layer * self.layout.layer_bytes
        end = start + self.layout.layer_bytes
        for chunk in range(self.layout.chunk_count):
            offset, nbytes = self.layout.chunk_extent(chunk)
            if offset < end and offset + nbytes > start:
                for block in range(self.valid):
                    if (block, chunk) not in self.done:
                        return False
        return True

    def layers_ready(self) -> int:
        count = 0
        while count < self.layout.layers and self.layer_done(count):
            count += 1
        return count


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LAYOUTS), st.integers(0, 6), st.data())
def test_progress_equals_a_brute_force_model(
    layout: KVLayout, blocks: int, data: st.DataObject
) -> None:
    progress, model = LoadProgress(layout, blocks), BruteForce(layout, blocks)
    total = blocks * layout.chunk_count
    order = data.draw(st.permutations(range(total)))
    cuts = data.draw(st.dictionaries(st.integers(0, max(0, total - 1)), st.integers(0, 6)))
    for step, index in enumerate([*order, -1]):
        assert progress.layers_ready == model.layers_ready()
        assert progress.complete_blocks() == model.complete_blocks()
        assert progress.blocks_valid == model.valid
        assert progress.complete == (model.complete_blocks() == model.valid)
        if index < 0:
            break
        if step in cuts:
            before = model.valid
            model.valid = min(model.valid, cuts[step])
            expected = {
                (block, chunk)
                for block in range(model.valid, before)
                for chunk in range(layout.chunk_count)
            } - model.done
            dropped = progress.cut(cuts[step])
            assert {progress.chunk_ref(one) for one in dropped} == expected
            assert list(dropped) == sorted(dropped)
        block, chunk = progress.chunk_ref(index)
        if block < model.valid:
            model.done.add((block, chunk))
        progress.verified([index])
        progress.verified([index])


@given(st.sampled_from(LAYOUTS), st.integers(1, 9))
def test_indices_go_layer_major_and_cover_each_chunk_once(layout: KVLayout, blocks: int) -> None:
    progress = LoadProgress(layout, blocks)
    refs = [progress.chunk_ref(index) for index in range(len(progress.chunk_nbytes))]
    assert refs == sorted(refs, key=lambda ref: (ref[1], ref[0]))
    assert len(set(refs)) == blocks * layout.chunk_count
    for index, (_, chunk) in enumerate(refs):
        assert progress.chunk_nbytes[index] == layout.chunk_extent(chunk)[1]
    assert sum(progress.chunk_nbytes) == blocks * layout.block_bytes


def test_layers_become_ready_in_order_while_later_chunks_are_missing() -> None:
    layout = LAYOUTS[2]
    progress = LoadProgress(layout, 2)
    per_layer = layout.layer_bytes // layout.chunk_bytes * 2
    for index in range(per_layer):
        assert progress.layers_ready == 0
        progress.verified([index])
    assert progress.layers_ready == 1
    assert not progress.complete
    assert progress.complete_blocks() == 0


def test_cutting_all_blocks_leaves_nothing_to_wait_for() -> None:
    progress = LoadProgress(LAYOUTS[1], 3)
    assert len(progress.cut(0)) == 3 * LAYOUTS[1].chunk_count
    assert progress.complete
    assert progress.complete_blocks() == 0
    assert progress.layers_ready == LAYOUTS[1].layers
    assert progress.cut(2) == ()


def test_wrong_indices_are_refused_by_value() -> None:
    progress = LoadProgress(LAYOUTS[0], 2)
    with pytest.raises(InvalidRequest, match=r"chunk index 2 is outside of 0\.\.1"):
        progress.verified([2])
    with pytest.raises(InvalidRequest, match="chunk index -1"):
        progress.verified([0, -1])
    assert progress.complete_blocks() == 0, "all of them or none"
    with pytest.raises(InvalidRequest, match="chunk index -1"):
        progress.chunk_ref(-1)
    with pytest.raises(InvalidRequest, match="-1 blocks"):
        progress.cut(-1)
    with pytest.raises(InvalidRequest, match="not -2"):
        LoadProgress(LAYOUTS[0], -2)
