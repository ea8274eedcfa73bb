"""The short forms of `make faults`: each part once, at a small size."""

import os
from pathlib import Path

import pytest

from faults.disks import try_disks
from faults.endurance import endure
from faults.fuzz import fuzz, hostile_templates
from faults.numbers import try_numbers
from faults.runs import Place, make_place

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


@pytest.mark.slow
def test_templates_made_to_do_harm(place: Place) -> None:
    assert hostile_templates(place) == []


@pytest.mark.slow
def test_memory_and_files_level_off(place: Place, tmp_path: Path) -> None:
    found = endure(place, tmp_path, steps=600)
    assert found.passed, (found.growth, found.open_files, found.resident_bytes)
