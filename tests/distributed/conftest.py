import pytest

from faults.runs import Place, make_place


@pytest.fixture(scope="session")
def still_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Without dropout, which ranks draw on their own."""
    return make_place(tmp_path_factory.mktemp("ranks"), dropout=0.0)
