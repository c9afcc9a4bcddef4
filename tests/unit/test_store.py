import pytest

from distill import store


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "kind" / "entry"
    with store.writing(folder) as inside:
        (inside / "deep").mkdir()
        (inside / "deep" / "weights").write_bytes(bytes(range(256)))
        (inside / "config").write_text("x")
    return folder


def test_what_was_written_is_intact(folder):
    assert store.intact(folder)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest", "bad manifest"])
def test_a_damaged_entry_is_never_used(folder, damage):
    file, manifest = folder / "deep" / "weights", folder / store.MANIFEST
    content = file.read_bytes()
    {
        "truncated": lambda: file.write_bytes(content[:-1]),
        "flipped": lambda: file.write_bytes(bytes([content[0] ^ 1]) + content[1:]),
        "missing": file.unlink,
        "no manifest": manifest.unlink,
        "bad manifest": lambda: manifest.write_text("{"),
    }[damage]()
    assert not store.intact(folder)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_entry_leaves_nothing(tmp_path, interruption):
    with pytest.raises(interruption), store.writing(tmp_path / "kind" / "entry") as inside:
        (inside / "half").write_text("x")
        raise interruption
    assert list((tmp_path / "kind").iterdir()) == []


def test_an_entry_is_replaced_only_when_the_new_one_is_whole(folder):
    with pytest.raises(RuntimeError), store.writing(folder) as inside:
        (inside / "config").write_text("new")
        raise RuntimeError
    assert (folder / "config").read_text() == "x"


def test_every_ingredient_counts():
    same = {"a": 1, "b": [1, 2]}
    assert store.entry("k", same) == store.entry("k", {"b": [1, 2], "a": 1})
    others = [{"a": 2, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": 1}]
    assert len({store.entry("k", other) for other in [same, *others]} | {store.entry("l", same)}) == 5


def test_links_show_the_same_files(folder, tmp_path):
    store.link(folder, tmp_path / "run")
    store.link(folder, tmp_path / "run")  # a second time is no error
    assert store.intact(folder)
    assert (tmp_path / "run" / "config").read_text() == "x"
