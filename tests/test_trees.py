"""Where leaves are, and the leading axis that they share."""

import numpy as np
import pytest

from gdx.trees import leading_axis, paths


def test_paths_name_every_leaf_and_a_tree_that_is_one():
    assert list(paths({"a": [1, 2], "b": None, "c": 3})) == ["['a'][0]", "['a'][1]", "['c']"]
    assert list(paths(np.ones(3))) == ["the root"]


def test_the_axis_that_all_share():
    assert leading_axis("x:", {"a": np.ones((5, 2)), "b": np.ones(5)}, "steps") == 5
    assert leading_axis("x:", np.ones((0, 2)), "steps") == 0


@pytest.mark.parametrize(
    ("tree", "least", "words"),
    [
        ({}, 0, r"^x: there are no arrays; expected arrays with a leading axis of steps, of one length; mend$"),
        (np.ones(()), 0, r"^x: the root has shape \(\); expected"),
        (np.ones((0, 2)), 1, r"^x: the root has shape \(0, 2\); expected"),
        ([np.ones(3), np.ones(4)], 0, r"^x: \[0\] has shape \(3,\), \[1\] has shape \(4,\); expected"),
        ([np.ones(3), np.ones(())], 0, r"\[1\] has shape \(\); expected"),
    ],
)
def test_what_has_none(tree, least, words):
    with pytest.raises(ValueError, match=words):
        leading_axis("x:", tree, "steps", least=least, mend="; mend")
