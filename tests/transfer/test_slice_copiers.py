"""Tables of slices and their copiers: NumPy everywhere, the GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from dualpath.transfer.cuda.device_memory import DeviceMemory, HostPin
from dualpath.transfer.cuda.gpu_copier import GpuCopier, Method
from dualpath.transfer.cuda.slice_copier import NumpyCopier
from dualpath.transfer.cuda.slice_table import SliceTable
from dualpath.transfer.errors import InvalidRequest, Unavailable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

HOST_BYTES = 3 << 20
DEVICE_BYTES = 4 << 20
WAIT_S = 30.0


@dataclass
class Bench:
    """A copier with its two memories; `read` and `fill` reach the device's bytes."""

    copier: Any
    host: NDArray[np.uint8]
    device: Any
    array: Any

    def fill(self, content: NDArray[np.uint8]) -> None:
        self.array[:] = content if isinstance(self.array, np.ndarray) else _cupy().asarray(content)

    def read(self) -> NDArray[np.uint8]:
        if isinstance(self.array, np.ndarray):
            return self.array.copy()
        content: NDArray[np.uint8] = _cupy().asnumpy(self.array)
        return content


def _cupy() -> Any:
    import cupy

    return cupy


@pytest.fixture(params=["numpy", "gpu"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    host = np.zeros(HOST_BYTES, np.uint8)
    if request.param == "numpy":
        array = np.zeros(DEVICE_BYTES, np.uint8)
        yield Bench(NumpyCopier(), host, array, array)
        return
    try:
        copier = GpuCopier(staging_bytes=1 << 20)
    except Unavailable as error:
        pytest.skip(str(error))
    with HostPin(host):
        on_gpu = _cupy().zeros(DEVICE_BYTES, np.uint8)
        yield Bench(copier, host, DeviceMemory.of(on_gpu), on_gpu)
        copier.close()


@st.composite
def tables(draw: st.DrawFn) -> SliceTable:
    """Slices that overlap nowhere: distinct cells of a grid on both sides, shifted."""
    nbytes = draw(st.sampled_from([1, 3, 64, 656, 4096, 40960, 41984, 65540, 262144]))
    grain = draw(st.sampled_from([1, 4, 16]))
    step = -(-nbytes // grain) * grain
    cells = min(HOST_BYTES - 64, DEVICE_BYTES - 64) // step
    count = draw(st.integers(1, min(cells, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shift = draw(st.integers(0, 3)) * grain
    order = draw(st.sampled_from(["packed", "strided", "scattered"]))
    if order == "packed":
        host = np.arange(count)
    elif order == "strided":
        host = np.arange(count) * max(1, cells // count)
    else:
        host = rng.permutation(cells)[:count]
    device = rng.permutation(cells)[:count]
    return SliceTable(
        host.astype(np.int64) * step + shift, device.astype(np.int64) * step + shift, nbytes
    )


def _expected(
    source: NDArray[np.uint8], sources: Any, target: NDArray[np.uint8], targets: Any, n: int
) -> NDArray[np.uint8]:
    result = target.copy()
    for at, to in zip(sources.tolist(), targets.tolist(), strict=True):
        for offset in {0, n // 2, n - 1}:
            result[to + offset] = source[at + offset]
        result[to : to + n] = source[at : at + n]
    return result


fast = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fast
@given(slices=tables(), seed=st.integers(0, 2**32))
def test_scatter_writes_every_byte_of_its_slices_and_no_other(
    bench: Bench, slices: SliceTable, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bench.host[:] = rng.integers(0, 256, HOST_BYTES, np.uint8)
    before = rng.integers(0, 256, DEVICE_BYTES, np.uint8)
    bench.fill(before)
    assert bench.copier.scatter(bench.host, bench.device, slices).wait(WAIT_S)
    expected = _expected(bench.host, slices.host, before, slices.device, slices.nbytes)
    assert np.array_equal(bench.read(), expected)


@fast
@given(slices=tables(), seed=st.integers(0, 2**32))
def test_gather_brings_back_what_the_pages_hold_and_touches_nothing_else(
    bench: Bench, slices: SliceTable, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    before = rng.integers(0, 256, HOST_BYTES, np.uint8)
    bench.host[:] = before
    pages = rng.integers(0, 256, DEVICE_BYTES, np.uint8)
    bench.fill(pages)
    assert bench.copier.gather(bench.device, bench.host, slices).wait(WAIT_S)
    expected = _expected(pages, slices.device, before, slices.host, slices.nbytes)
    assert np.array_equal(bench.host, expected)


def test_calls_in_a_row_are_ordered_on_the_device(bench: Bench) -> None:
    slices = SliceTable(np.arange(50) * 41984, np.arange(50)[::-1] * 41984, 41984)
    for fill in (1, 2, 3):
        bench.host[:] = fill
        done = bench.copier.scatter(bench.host, bench.device, slices)
        assert done.wait(WAIT_S)
    assert (bench.read()[: 50 * 41984] == 3).all()


def test_slices_outside_of_the_memory_are_refused_before_any_byte_moves(bench: Bench) -> None:
    for host, device in ((-1, 0), (HOST_BYTES - 15, 0), (0, DEVICE_BYTES - 15), (0, -16)):
        slices = SliceTable(np.array([0, host]), np.array([32, device]), 16)
        with pytest.raises(InvalidRequest, match="slices cover"):
            bench.copier.scatter(bench.host, bench.device, slices)
    assert not bench.read().any()


def test_pages_of_an_engine_become_offsets_layer_after_layer() -> None:
    slices = SliceTable.of_pages(
        [0, 1000], [7, 2], page_stride_bytes=64, layer_block_bytes=48, block_bases=[4096, 8192]
    )
    assert slices.host.tolist() == [4096, 8192, 4144, 8240]
    assert slices.device.tolist() == [448, 128, 1448, 1128]


@pytest.mark.parametrize(
    ("bases", "pages", "stride", "blocks", "message"),
    [
        ([0], [1, 2], 64, [0], "2 pages for 1 blocks"),
        ([0], [1], 32, [0], "cannot hold 48 bytes"),
        ([0], [], 64, [], "0 slices"),
    ],
)
def test_pages_that_do_not_fit_together_are_refused(
    bases: list[int], pages: list[int], stride: int, blocks: list[int], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SliceTable.of_pages(
            bases, pages, page_stride_bytes=stride, layer_block_bytes=48, block_bases=blocks
        )


@settings(max_examples=60, deadline=None)
@given(slices=tables(), data=st.data())
def test_runs_name_every_slice_of_their_range_once(slices: SliceTable, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(slices.host) - 1))
    end = data.draw(st.integers(start + 1, len(slices.host)))
    seen = []
    for run in slices.host_runs(start, end):
        assert run.stride == 0 if run.count == 1 else run.stride >= slices.nbytes
        seen += [
            (run.offset + i * run.stride, run.packed + i * slices.nbytes) for i in range(run.count)
        ]
    assert seen == [
        (int(at), i * slices.nbytes) for i, at in enumerate(slices.host[start:end].tolist())
    ]


def test_an_array_without_the_cuda_interface_is_refused_by_its_type() -> None:
    with pytest.raises(InvalidRequest, match="ndarray has no __cuda_array_interface__"):
        DeviceMemory.of(np.zeros(4))


class _Fake:
    def __init__(self, **interface: object) -> None:
        self.__cuda_array_interface__ = interface


def test_only_whole_writable_arrays_are_device_memory() -> None:
    good = _Fake(data=(4096, False), shape=(3, 5), typestr="<f2", strides=None)
    assert DeviceMemory.of(good).nbytes == 30
    packed = _Fake(data=(4096, False), shape=(3, 5), typestr="<f2", strides=(10, 2))
    assert DeviceMemory.of(packed).pointer == 4096
    with pytest.raises(InvalidRequest, match="not contiguous"):
        DeviceMemory.of(_Fake(data=(4096, False), shape=(3, 5), typestr="<f2", strides=(2, 6)))
    with pytest.raises(InvalidRequest, match="read-only"):
        DeviceMemory.of(_Fake(data=(4096, True), shape=(3,), typestr="|u1"))


def _gpu(**options: int) -> GpuCopier:
    try:
        return GpuCopier(**options)
    except Unavailable as error:
        pytest.skip(str(error))


def test_host_memory_that_is_not_page_locked_is_refused_with_the_remedy() -> None:
    copier = _gpu()
    device = DeviceMemory.of(_cupy().zeros(1 << 20, np.uint8))
    with pytest.raises(InvalidRequest, match="HostPin"):
        copier.scatter(
            np.zeros(1 << 20, np.uint8), device, SliceTable(np.array([0]), np.array([0]), 64)
        )


def test_each_way_of_copying_is_chosen_where_it_fits() -> None:
    copier = _gpu()
    host = np.random.default_rng(5).integers(0, 256, 64 << 20, np.uint8)
    array = _cupy().zeros(64 << 20, np.uint8)
    device = DeviceMemory.of(array)
    rng = np.random.default_rng(6)
    packed = np.arange(512, dtype=np.int64)
    for nbytes, at, method in (
        (40960, packed, Method.STAGED),
        (40960, packed * 3, Method.STAGED),
        (40960, np.sort(rng.permutation(1500)[:512]), Method.MAPPED),
        (4 << 20, packed[:8], Method.SINGLE),
    ):
        to = rng.permutation(1500 if nbytes == 40960 else 12)[: len(at)]
        slices = SliceTable(at * nbytes, to.astype(np.int64) * nbytes, nbytes)
        with HostPin(host):
            array[:] = 0
            _cupy().cuda.Device().synchronize()
            assert copier.scatter(host, device, slices).wait(WAIT_S)
            assert copier.method is method
        got = _cupy().asnumpy(array)
        for source, target in zip(slices.host.tolist(), slices.device.tolist(), strict=True):
            assert np.array_equal(got[target : target + nbytes], host[source : source + nbytes])


def test_a_read_only_mapping_is_a_source_and_never_a_target() -> None:
    copier = _gpu()
    host = np.arange(1 << 20, dtype=np.uint8)
    host.flags.writeable = False
    device = DeviceMemory.of(_cupy().zeros(1 << 20, np.uint8))
    slices = SliceTable(np.array([4096]), np.array([0]), 4096)
    with HostPin(host):
        assert copier.scatter(host, device, slices).wait(WAIT_S)
        with pytest.raises(InvalidRequest, match="read-only"):
            copier.gather(device, host, slices)


def test_a_stream_waits_for_the_copies_without_the_caller() -> None:
    copier, cupy = _gpu(), _cupy()
    host = np.full(64 << 20, 7, np.uint8)
    array = cupy.zeros(64 << 20, np.uint8)
    slices = SliceTable(np.arange(1600) * 40960, np.arange(1600)[::-1] * 40960, 40960)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with HostPin(host):
        done = copier.scatter(host, DeviceMemory.of(array), slices)
        done.order_before(stream.ptr)
        with stream:
            total = int(array[: 1600 * 40960].sum(dtype=np.uint64))
        assert done.wait(WAIT_S)
    assert total == 7 * 1600 * 40960
