"""Ignore rules answer as git does, cannot be made slow, and say where a broken pattern stands."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mothball.errors import InvalidParams
from mothball.store.ignore import MAX_GLOBS, MAX_PATTERNS, IgnoreRules
from mothball.store.wildmatch import BrokenPattern, compile_glob
from tests.support import require_tool

Files = Mapping[str, bytes]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty repository that reads nothing but its own `.gitignore` files."""
    root = tmp_path_factory.mktemp("git")
    git(root, "init", "-q")
    return root


def git(root: Path, *arguments: str, stdin: bytes | None = None) -> bytes:
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": "/nonexistent"}
    done = subprocess.run(
        [require_tool("git"), "-C", str(root), *arguments],
        input=stdin,
        env=environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode in {0, 1}, done.stderr
    return done.stdout


def with_folders(paths: list[bytes]) -> dict[bytes, bool]:
    """Every path with whether it is a folder: a name that lies above another one, or ends with a slash, is."""
    found = {path.rstrip(b"/"): path.endswith(b"/") for path in sorted(paths)}
    for path in list(found):
        parts = path.split(b"/")
        for count in range(1, len(parts)):
            found[b"/".join(parts[:count])] = True
    return found


def ours(ignore_files: Files, paths: dict[bytes, bool], given_patterns: tuple[str, ...] = ()) -> set[bytes]:
    """What a walk with `IgnoreRules` leaves out; an ignore file below an ignored folder is never seen."""
    out: set[bytes] = set()
    root = IgnoreRules.root(given_patterns)
    rules = {b"": root.descend("", [ignore_files[""]] if "" in ignore_files else [], [".gitignore"])}
    for path in sorted(paths, key=lambda item: item.split(b"/")):
        parent = path.rpartition(b"/")[0]
        if parent in out or rules[parent].ignored(os.fsdecode(path), paths[path]):
            out.add(path)
        elif paths[path]:
            text = ignore_files.get(os.fsdecode(path))
            rules[path] = rules[parent].descend(os.fsdecode(path), [] if text is None else [text], [".gitignore"])
    return out


def gits(root: Path, ignore_files: Files, paths: dict[bytes, bool]) -> set[bytes]:
    """What `git check-ignore` says about the same paths, which are made for it because folders matter."""
    base = os.fsencode(root)
    for path in sorted(paths, key=lambda item: item.split(b"/")):
        if paths[path]:
            os.makedirs(base + b"/" + path)
        else:
            with open(base + b"/" + path, "wb"):
                pass
    for folder, text in ignore_files.items():
        (root / folder / ".gitignore").write_bytes(text)
    try:
        out = git(root, "check-ignore", "--no-index", "-z", "--stdin", stdin=b"".join(path + b"\0" for path in paths))
        return set(out.split(b"\0")) - {b""}
    finally:
        for name in os.listdir(base):
            if name != b".git":
                subprocess.run([b"rm", b"-rf", b"--", base + b"/" + name], check=True)


def same(root: Path, ignore_files: Files, paths: dict[bytes, bool]) -> None:
    assert ours(ignore_files, paths) == gits(root, ignore_files, paths)


TREE = with_folders(
    [
        b"a", b"b.txt", b"foo/bar/baz.o", b"foo/bar/keep.o", b"foo/x.log", b"src/foo/x", b"src/deep/er/foo/bar.c", b"build/out/",
        b"build/a.o", b"# comment", b"!bang", b"trail ", b"trail", b"tab\t", b"back\\slash", b"star*", b"quest?", b"[x]", b"a b",
        b"caf\xc3\xa9", b"lat\xe9n", b"new\nline", b"cr\r", b"AbC", b"9", b"_", b"-", b"]", b"^", b"!", b"z/a/b/c/d/e", b"z/e",
        b"dir.d/", b"x.tar.gz", b".hidden", b"foobar/baz", b"fooX/Y/bar", b"foobar2", b"deep/build/z.o", b"a.b/c.d/e.f",
    ]
)  # fmt: skip

TRICKY: dict[str, bytes] = {
    "plain": b"a\n",
    "suffix": b"*.o\n",
    "suffix of a folder": b"*.d/\n",
    "folder only": b"build/\n",
    "folder only does not match a file": b"b.txt/\n",
    "anchored": b"/foo\n",
    "anchored file": b"/x\n/a\n",
    "with a slash is anchored": b"foo/bar\n",
    "double slash": b"foo//bar\n//\n/\n",
    "negated": b"*.o\n!keep.o\n",
    "negated below an ignored folder": b"foo/\n!foo/bar/keep.o\n",
    "last match wins": b"!a\na\n!b.txt\nb.txt\n!b.txt\n",
    "double negation": b"a\n!!a\n",
    "only a bang": b"!\n",
    "everything but": b"/*\n!/foo\n/foo/*\n!/foo/bar\n",
    "double star in front": b"**/foo\n",
    "double star behind": b"foo/**\n",
    "double star between": b"z/**/e\n",
    "double star alone": b"**\n",
    "double star folder": b"**/\n",
    "double star twice": b"**/**/x\n",
    "double star inside a name": b"z/a**/e\nfoo**/bar\n",
    "double star escaped slash": b"z/**\\/e\n",
    "triple star": b"z/***/e\n***/x\n",
    "star does not cross": b"z/*/e\nfoo/*.o\n",
    "star and slash": b"*/x\n*/\n",
    "empty star": b"foo*/bar\n",
    "question": b"?\n??\n",
    "bracket": b"[ab]\n[!a]\n",
    "bracket caret": b"[^a]\n",
    "bracket range": b"[0-9]\n[z-a]\n",
    "bracket bracket": b"[]]\n[[]x]\n[]-]\n",
    "bracket backslash": b"[\\]]\n[\\\\]\nback[\\\\]slash\n",
    "bracket dash": b"[a-]\n[-a]\n[_-]\n",
    "bracket never crosses": b"foo[/]bar\nfoo[^x]x.log\n",
    "bracket class": b"[[:digit:]]\n[[:upper:]]bC\n[![:alnum:]]\n",
    "bracket class blank and cntrl": b"a[[:blank:]]b\ntab[[:cntrl:]]\nnew[[:space:]]line\n",
    "bracket class without end": b"[[:digit]\n[[:digit:\n[[:nothing:]]\n",
    "bracket without end": b"[ab\na\n[\n",
    "escapes": b"\\a\n\\#\\ comment\n\\!bang\nstar\\*\nquest\\?\n\\[x\\]\n",
    "comment": b"# comment\n",
    "escaped comment": b"\\# comment\n",
    "trailing spaces": b"trail   \n",
    "escaped trailing space": b"trail\\ \n",
    "escaped then plain trailing spaces": b"trail\\   \n",
    "trailing tab stays": b"a\t\ntab\t\n",
    "leading space stays": b" a\n",
    "trailing backslash": b"a\\\nb.txt\n",
    "carriage return": b"a\r\nb.txt\r\n",
    "two carriage returns": b"a\r\r\ncr\r\r\n",
    "no line feed at the end": b"a\nb.txt",
    "carriage return without line feed": b"b.txt\na\r",
    "byte order mark": b"\xef\xbb\xbfa\n",
    "byte order mark later": b"b.txt\n\xef\xbb\xbfa\n",
    "NUL ends a line": b"a\0b\nb.txt\0\n",
    "only NUL": b"\0\n\0a\n",
    "bytes": b"lat\xe9n\ncaf\xc3\xa9\n",
    "question is one byte": b"caf?\nlat?n\n",
    "newline in a name": b"new?line\n",
    "case": b"abc\n",
    "dot is a letter": b"x.tar.g.\n.*\n",
    "folders by name at any depth": b"bar/\n",
    "regex letters": b"(a|b)\na+\n^\n$\n.\n",
    "prefix of a name": b"foo\n",
    "path through a file": b"a/b\nb.txt/c\n",
    "empty": b"",
    "blank lines": b"\n\n   \n\t\na\n",
}


@pytest.mark.parametrize("case", TRICKY)
def test_tricky_patterns_answer_as_git_does(case: str, repository: Path) -> None:
    same(repository, {"": TRICKY[case]}, TREE)


NESTED: dict[str, Files] = {
    "deepest first": {"": b"*.o\n", "foo": b"!*.o\n", "foo/bar": b"baz.o\n"},
    "anchored to its folder": {"foo": b"/bar\n", "src": b"/x\nfoo/x\n"},
    "below an ignored folder nothing is read": {"": b"foo/\n", "foo": b"!bar\n!*\n"},
    "upper rules reach down": {"": b"z/a\nbar.c\n", "z": b"!a\n"},
    "a slash in a nested file": {"z": b"a/b\n**/e\n"},
    "taken back above": {"": b"!x\n", "src/foo": b"x\n"},
    "given back one level up": {"": b"*\n!*/\n!*.c\n", "src/deep": b"*.c\n"},
}


@pytest.mark.parametrize("case", NESTED)
def test_nested_ignore_files_answer_as_git_does(case: str, repository: Path) -> None:
    same(repository, NESTED[case], TREE)


_NAMES = st.lists(
    st.sampled_from([b"a", b"b", b"ab", b"*", b"a.b", b"]", b" ", b"\\", b"-", b"\xe9", b"A"]), min_size=1, max_size=3
)
_SEGMENT = _NAMES.map(b"".join)
_PATHS = st.lists(st.lists(_SEGMENT, min_size=1, max_size=4).map(b"/".join).map(lambda path: path.rstrip()), min_size=1, max_size=8)
_PIECES = [
    b"a", b"b", b"ab", b"*", b"**", b"?", b"/", b"/", b"!", b"\\", b"[", b"]", b"[a]", b"[!a]", b"[a-b]", b"[[:alpha:]]", b" ",
    b"#",
    b".", b"-", b"**/", b"/**", b"\r", b"\xe9", b"^", b"[^", b":]",
]  # fmt: skip
_LINES = st.lists(st.lists(st.sampled_from(_PIECES), max_size=6).map(b"".join), min_size=1, max_size=6)
_TEXTS = _LINES.map(b"\n".join)


def _clean(paths: list[bytes]) -> dict[bytes, bool]:
    found = [path for path in paths if all(part and part.strip() for part in path.split(b"/"))]
    return with_folders(found or [b"a"])


@given(_TEXTS, st.none() | _TEXTS, _PATHS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example(b"a**/b", None, [b"ab", b"ax/y/b", b"a/b", b"b"])
def test_any_rules_answer_as_git_does(repository: Path, text: bytes, nested: bytes | None, paths: list[bytes]) -> None:
    tree = _clean(paths)
    files = {"": text}
    if nested is not None and tree.get(b"a"):
        files["a"] = nested
    same(repository, files, tree)


_SLOW = ["*a" * 12 + "*b", "**/" + "a*" * 20 + "b", "/".join(["**/a*a"] * 8) + "/b", "*" + "?*" * 30 + "x", "[ab]*" * 15 + "c"]


@pytest.mark.parametrize("pattern", _SLOW)
def test_a_pattern_made_to_be_slow_is_not(pattern: str) -> None:
    rules = IgnoreRules.root([pattern])
    names = ["a" * 255, "/".join(["a" * 120] * 30), "ab" * 100, "/".join(["aa"] * 300)]
    begun = time.perf_counter()
    for name in names:
        rules.ignored(name, False)
    assert time.perf_counter() - begun < 1


def test_a_typical_file_costs_little_per_entry() -> None:
    text = b"\n".join(
        [b"*.pyc", b"__pycache__/", b"/build/", b"node_modules", b"*.log", b"!keep.log", b"docs/_build/", b".env", b"*~"]
    )
    rules = IgnoreRules.root(()).descend("", [text])
    begun = time.perf_counter()
    for number in range(20_000):
        rules.ignored(f"src/package/module/file{number}.py", False)
    assert time.perf_counter() - begun < 1


def test_without_rules_nothing_is_made_or_asked() -> None:
    rules = IgnoreRules.root(())
    assert not rules.active()
    assert rules.descend("a", []) is rules
    assert rules.descend("a", [b"# nothing\n\n"]) is rules
    assert rules.descend("a", [b"x"]).active()
    assert IgnoreRules.root(["x"]).active()


def test_patterns_of_the_capture_are_stronger_than_files() -> None:
    rules = IgnoreRules.root(["*.o", "!keep.o"]).descend("", [b"keep.o\n!x.o\nother"])
    assert rules.ignored("x.o", False)
    assert not rules.ignored("a/keep.o", False)
    assert rules.ignored("other", True)


def test_the_later_file_of_one_folder_is_stronger() -> None:
    rules = IgnoreRules.root(()).descend("d", [b"a\nb\n", b"!a\n"])
    assert not rules.ignored("d/a", False)
    assert rules.ignored("d/b", False)
    assert not rules.ignored("b", False)


@pytest.mark.parametrize("pattern", ["a\\", "[a", "a/[", "[[:nothing:]]", "x/[[:alpha:", "!*["])
def test_a_broken_pattern_names_its_file_and_line(pattern: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        IgnoreRules.root(()).descend("d/e", [b"ok\n\n" + pattern.encode() + b"\n"], [".mothballignore"])
    assert caught.value.message.startswith("d/e/.mothballignore, line 3: ")
    with pytest.raises(InvalidParams, match="ignore pattern 2 "):
        IgnoreRules.root(["ok", pattern])


def test_a_broken_pattern_of_a_gitignore_matches_nothing() -> None:
    rules = IgnoreRules.root(()).descend("", [b"[a\nb\\\nc\n"], [".gitignore"])
    assert not rules.ignored("a", False)
    assert rules.ignored("c", False)


@pytest.mark.parametrize("pattern", ["a\0b", "a\nb", "\ud800"])
def test_given_patterns_must_be_one_line_of_text(pattern: str) -> None:
    with pytest.raises(InvalidParams, match="ignore pattern 1 "):
        IgnoreRules.root([pattern])


def test_the_message_about_a_broken_pattern_holds_no_control_characters() -> None:
    with pytest.raises(InvalidParams) as caught:
        IgnoreRules.root(()).descend("d\udce9", [b"\x1b[31m[\n"])
    assert caught.value.message.isprintable()


def test_too_many_patterns_are_refused() -> None:
    rules = IgnoreRules.root(())
    assert rules.descend("", [b"x\n" * MAX_PATTERNS]).active()
    with pytest.raises(InvalidParams, match=str(MAX_PATTERNS)):
        rules.descend("", [b"x\n" * (MAX_PATTERNS + 1)])
    half = b"".join(b"a%d*\n" % number for number in range(MAX_GLOBS // 2 + 1))
    deeper = rules.descend("", [half])
    with pytest.raises(InvalidParams, match=str(MAX_GLOBS)):
        deeper.descend("d", [half])


@pytest.fixture(params=[b"[", b"a\\", b"[[:x:]]", b"[a-"])
def broken(request: pytest.FixtureRequest) -> Iterator[bytes]:
    yield request.param


def test_a_pattern_git_never_matches_is_told_apart(broken: bytes) -> None:
    with pytest.raises(BrokenPattern):
        compile_glob(broken, path=False)
