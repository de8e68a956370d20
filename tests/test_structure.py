"""The package stays a house of small rooms: files that can be read at once, folders that can be looked over."""

from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
LONGEST, MOST = 350, 15


def test_no_file_is_too_long_to_be_read_at_once():
    lines = {str(file.relative_to(SOURCE)): len(file.read_text().splitlines()) for file in FILES}
    assert lines and not {name: count for name, count in lines.items() if count > LONGEST}


def test_no_folder_has_too_many_files_to_look_over():
    """``__init__.py`` is the folder's face and is not counted."""
    counts: dict[str, int] = {}
    for file in FILES:
        folder = str(file.parent.relative_to(SOURCE))
        counts[folder] = counts.get(folder, 0) + (file.name != "__init__.py")
    assert counts["comcat"] > 10 and not {name: count for name, count in counts.items() if count > MOST}
