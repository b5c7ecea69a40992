"""The house rules: rooms that are not crowded, files and functions that can be read, one way in."""

from pathlib import Path

import pytest

from tools import structure


@pytest.fixture(scope="module")
def files() -> list[Path]:
    if not (structure.ROOT / ".git").exists():
        pytest.skip("needs a git checkout, which knows what belongs to the repository")
    return structure.tracked()


def test_folders_files_and_functions_have_limits(files: list[Path]) -> None:
    def over(sizes: dict[str, int], limit: int) -> dict[str, int]:
        return {name: size for name, size in sizes.items() if size > limit}

    assert not over(structure.entries(files), structure.MAX_ENTRIES)
    assert not over(structure.lines(files), structure.MAX_LINES)
    assert not over(structure.functions(files), structure.MAX_FUNCTION)


def test_imports_go_one_way() -> None:
    assert not structure.upward_imports()


def test_one_room_drives_the_engine() -> None:
    assert structure.lint_exceptions("llama_cpp") == [
        "zo_gguf/engine/**",
        "zo_gguf/merging/stock_eval.py",  # which must not import zo_gguf
    ]


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {
        entry.name.removesuffix(".py")
        for entry in structure.PACKAGE.iterdir()
        if entry.suffix == ".py" or (entry / "__init__.py").is_file()
    }
    assert rooms == set(structure.ORDER)


def test_an_import_against_the_order_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zo_gguf" / "data").mkdir(parents=True)
    module = tmp_path / "zo_gguf" / "data" / "rows.py"
    module.write_text(
        "from zo_gguf.engine.engine import Engine\nfrom zo_gguf.errors import ZoError\n"
    )
    monkeypatch.setattr(structure, "ROOT", tmp_path)
    monkeypatch.setattr(structure, "PACKAGE", tmp_path / "zo_gguf")
    assert structure.upward_imports() == ["zo_gguf/data/rows.py imports zo_gguf.engine.engine"]
