"""What can go wrong with a run, done on purpose: each injection ends a job or damages what it left.

An injection takes a run's inputs, a folder of its own and a random generator. When it returns, everything
that it promises of the fault itself has been checked; the caller then lets the run continue to its end.
"""

from __future__ import annotations

from pathlib import Path

from tests.faults.cut_nodes import cut_in_saving, cut_in_training, lose_a_node, on_two_nodes
from tests.faults.damaged_files import damage_both, damage_latest, flip_a_bit, remove_a_file, truncate_a_file
from tests.faults.ended_jobs import (
    kill_in_saving,
    kill_in_training,
    kill_one_rank,
    not_a_number,
    signal_at_any_moment,
    signal_in_exporting,
    signal_in_loading,
    signal_in_saving,
    signal_in_scoring,
    terminate,
    terminate_one_rank,
)
from tests.faults.inputs import Injection
from tests.faults.storage import can_mount, disk_that_fills_up, full_disk, read_only_folder
from tests.harness.two_nodes import reason_against

NEED_MOUNT = ("full_disk", "disk_that_fills_up", "read_only_folder")
ON_TWO_NODES = [
    on_two_nodes(injection)
    for injection in (
        kill_one_rank,
        terminate,
        terminate_one_rank,
        signal_in_loading,
        signal_in_scoring,
        signal_in_saving,
        signal_in_exporting,
    )
]
NEED_NODES = ("cut_in_training", "cut_in_saving", "lose_a_node", *(one.__name__ for one in ON_TWO_NODES))

INJECTIONS: dict[str, Injection] = {
    injection.__name__: injection
    for injection in (
        kill_in_training,
        kill_in_saving,
        kill_one_rank,
        terminate,
        terminate_one_rank,
        signal_at_any_moment,
        signal_in_loading,
        signal_in_scoring,
        signal_in_saving,
        signal_in_exporting,
        not_a_number,
        truncate_a_file,
        flip_a_bit,
        remove_a_file,
        damage_latest,
        damage_both,
        full_disk,
        disk_that_fills_up,
        read_only_folder,
        cut_in_training,
        cut_in_saving,
        lose_a_node,
        *ON_TWO_NODES,
    )
}


def reason_to_skip(name: str, folder: Path) -> str:
    """Why an injection cannot be made here; empty where it can. ``folder`` is made for trying it."""
    if name in NEED_MOUNT and not can_mount(folder):
        return "needs the right to mount a disk in memory"
    return f"network namespaces: {reason_against()}" if name in NEED_NODES and reason_against() else ""
