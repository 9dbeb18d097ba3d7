"""The messages about classes."""

from jitscale.preparation.labels import described_names


def test_the_first_and_the_last_classes_are_named_with_their_numbers() -> None:
    assert described_names(["ant", "bee"]) == "0 ant, 1 bee"
    assert described_names(list("abcdef")) == "0 a, 1 b, 2 c, 3 d, 4 e, 5 f"
    assert described_names(list("abcdefgh")) == "0 a, 1 b, 2 c, ..., 5 f, 6 g, 7 h"
