"""The compatibility page says what tests try."""

import json
import re
from pathlib import Path

import pytest
from compatibility import GROUPS, page

from benchmarks.architectures.page import page as architectures

ROOT = Path(__file__).parents[1]
TESTS = sorted({test for rows in GROUPS.values() for _, _, test in rows if test})


def test_the_page_is_as_generated():
    assert (ROOT / "docs" / "compatibility.md").read_text("utf8") == page()


def test_the_page_of_architectures_is_as_generated():
    lines = (ROOT / "docs" / "architectures.jsonl").read_text("utf8").splitlines()
    there = (ROOT / "docs" / "architectures.md").read_text("utf8")
    known, version = re.search(r"Of (\d+) model", there), re.search(r"transformers ([\d.]+),", there)
    assert there == architectures([json.loads(line) for line in lines], int(known[1]), version[1])


@pytest.mark.parametrize("test", TESTS)
def test_a_row_names_a_test_that_exists(test):
    file, name = test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text("utf8"), re.MULTILINE), test


def test_what_works_or_is_refused_names_its_test():
    for rows in GROUPS.values():
        for what, happens, test in rows:
            assert test or not happens.startswith(("works", "refused")), what
