"""Threads run near the network device whose bytes they move, where that means something."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from dualpath.transfer.affinity import ANY_NODE, near, node_of, node_towards, nodes

MINE = sorted(os.sched_getaffinity(0))


def machine(root: Path, *lists: str) -> Path:
    for number, text in enumerate(lists):
        (root / f"node{number}").mkdir(parents=True)
        (root / f"node{number}" / "cpulist").write_text(text + "\n")
    return root


def device(root: Path, name: str, node: int) -> None:
    (root / name / "device").mkdir(parents=True)
    (root / name / "device" / "numa_node").write_text(f"{node}\n")


def processors_of_a_new_thread() -> list[int]:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(sorted(os.sched_getaffinity(0))))
    thread.start()
    thread.join()
    return found


def test_a_thread_that_is_started_near_a_node_stays_there(tmp_path: Path) -> None:
    root = machine(tmp_path, "4096", str(MINE[-1]))
    with near(1, root):
        assert processors_of_a_new_thread() == [MINE[-1]]
    assert sorted(os.sched_getaffinity(0)) == MINE
    assert processors_of_a_new_thread() == MINE


@pytest.mark.parametrize("node", [ANY_NODE, 0, 7])
def test_nothing_changes_without_a_node_of_ours(tmp_path: Path, node: int) -> None:
    root = machine(tmp_path, "4096", str(MINE[-1]))
    with near(node, root):
        assert processors_of_a_new_thread() == MINE


def test_devices_are_on_a_node_if_all_of_them_are_on_one(tmp_path: Path) -> None:
    sys_net = tmp_path / "net"
    for name, node in (("eth0", 1), ("eth1", 1), ("eth2", 0), ("eth3", -1)):
        device(sys_net, name, node)
    root = machine(tmp_path / "nodes", "0-3", "4-5,7")
    assert nodes(root) == {0: {0, 1, 2, 3}, 1: {4, 5, 7}}
    assert node_of({"eth0", "eth1"}, root, sys_net) == 1
    assert node_of({"eth0", "eth2"}, root, sys_net) == ANY_NODE
    assert node_of({"eth3"}, root, sys_net) == ANY_NODE
    assert node_of(set(), root, sys_net) == ANY_NODE


def test_a_machine_of_one_node_has_no_near_and_far(tmp_path: Path) -> None:
    device(tmp_path / "net", "eth0", 0)
    root = machine(tmp_path / "nodes", "0-7")
    assert node_of({"eth0"}, root, tmp_path / "net") == ANY_NODE
    assert node_towards("127.0.0.1:7070") == ANY_NODE
