"""The short forms of `make faults`: each part once, at a small size."""

import os
from pathlib import Path

import pytest

from faults.disks import try_disks
from faults.endurance import Endurance, endure
from faults.fuzz import fuzz, hostile_templates
from faults.numbers import try_numbers
from faults.runs import Place, make_place
from siliang.safety import limits

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked, which this system cannot")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("faults"))


def test_disks(place: Place, tmp_path: Path) -> None:
    assert not try_disks(place, tmp_path).failed


def test_numbers(place: Place, tmp_path: Path) -> None:
    assert not try_numbers(place, tmp_path).failed


@pytest.mark.filterwarnings("ignore")
def test_hostile_files(place: Place, tmp_path: Path) -> None:
    found = fuzz(place, tmp_path, cases=480)
    assert found.passed, (list(found.failures), found.outside)
    assert found.worked.total() > 20 and found.refused.total() > 200


def test_templates_made_to_do_harm(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)  # most of them run to the limit
    assert hostile_templates(place) == []


@pytest.mark.slow
def test_memory_and_files_level_off(place: Place, tmp_path: Path) -> None:
    found = endure(place, tmp_path, steps=600)
    assert found.passed, (found.growth, found.open_files, found.resident_bytes)


def test_a_file_that_stays_open_is_told_from_one_that_is_read() -> None:
    level, memory = [19] * 30, [600_000_000] * 30
    read, leaked = [*level[:25], 20, *level[26:]], [19 + i // 10 for i in range(30)]
    assert Endurance(resident_bytes=memory, open_files=read).passed
    assert Endurance(resident_bytes=memory, open_files=leaked).passed is False
    assert Endurance(resident_bytes=[n + 4_000_000 * i for i, n in enumerate(memory)], open_files=level).passed is False
