"""What a file's name says of it."""

from __future__ import annotations

import pytest

from mothball.redact import files

STEMS = (
    "main", "index.d", "secret", "secrets", "my-token", "api_key", "credentials", "auth", "hosts", "config", "settings.env",
    "passwd", "netrc", "master.key", "local.settings", "id_rsa", "prod.tfvars", "environment", "Makefile", "nohup.out", "SECRET",
)  # fmt: skip


@pytest.mark.parametrize("end", files._PROGRAMS)
def test_what_is_said_at_once_of_a_program_is_what_a_whole_look_says(end: bytes) -> None:
    for stem in STEMS:
        name = stem.encode() + end
        assert files.judged_as(name) == files.judged_as(b"a/.git/" + name) == files._of_base(name)


@pytest.mark.parametrize("name", [b".env.js", b"x/.env.py", b".env"])
def test_a_hidden_file_of_variables_is_one_whatever_it_ends_with(name: bytes) -> None:
    assert files.judged_as(name)[0] == files.CREDENTIALS
