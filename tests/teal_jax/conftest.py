import pytest


@pytest.fixture(scope="session")
def halves(fixtures, tmp_path_factory):
    """Calibration and evaluation text: two halves of the fixtures' text, as files."""
    folder = tmp_path_factory.mktemp("text")
    text = (fixtures / "text.txt").read_text()
    first, second = folder / "first.txt", folder / "second.txt"
    first.write_text(text[: len(text) // 2])
    second.write_text(text[len(text) // 2 :])
    return first, second
