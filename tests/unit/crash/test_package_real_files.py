"""A package of a tree of real projects' files: nothing secret in it, whatever the file that holds it."""

from __future__ import annotations

from pathlib import Path

from tests.unit.crash.packing import content, members, pack, redactor, take
from tests.unit.redact.real_files import FILES
from tests.unit.redact.test_real_files import decoded, encoded


def test_no_secret_of_any_real_file_is_in_a_package_and_json_and_tables_are_looked_at_by_their_form(tmp_path: Path) -> None:
    tree = tmp_path / "roots" / "w"
    for number, (_, path, encoding, text, _) in enumerate(FILES):
        file = tree / f"{number:03d}" / path
        file.parent.mkdir(parents=True)
        file.write_bytes(encoded(text, encoding))
        # A block of the tar is filled by none of them: what touches the next file is looked at by itself anyway.
        assert file.stat().st_size % 512
    done = pack(*take(tmp_path / "data", tree), tmp_path / "out")
    kept = Path(done.path).read_bytes()
    left = []
    for number, (what, path, encoding, text, gone) in enumerate(FILES):
        if "\0" in text:
            assert f"/{number:03d}/{path}" not in "".join(members(done.path))  # a binary file with a secret is left out
            continue
        out = decoded(content(done.path, f"{number:03d}/{path}"), encoding)
        left += [(what, part) for part in gone if part in out or part.encode() in kept]
        assert ("[redacted:" in out) == (redactor().data(encoded(text, encoding), path.encode()) != encoded(text, encoding)), what
    assert left == []
