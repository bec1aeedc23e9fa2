"""Promise 2: it is a value."""

import copy
import pickle

import jax
import numpy as np

import gdx
from tests.contract.table import another, every_case, every_row

# what the text of a transform is evaluated in
NAMES = {name: getattr(gdx, name) for name in gdx.__all__}


@every_case
def test_its_text_evaluates_to_it(row, settings):
    tx = row.make(**settings)
    if row.make in NAMES.values():  # the others hold functions
        assert eval(repr(tx), NAMES) == tx


@every_case
def test_copies_are_equal_and_hash_alike(row, settings):
    tx = row.make(**settings)
    copies = [row.make(**settings), copy.copy(tx), copy.deepcopy(tx), jax.tree.map(lambda x: x, tx), tx.replace()]
    if row.make in NAMES.values():  # optax's functions cannot be pickled
        copies.append(pickle.loads(pickle.dumps(tx)))
    assert all(other == tx and hash(other) == hash(tx) and repr(other) == repr(tx) for other in copies)


@every_case
def test_every_hyperparameter_counts_and_can_be_replaced(row, settings):
    tx = row.make(**settings)
    for name, value in tx.hyperparams.items():
        new = another(name, value)
        changed = tx.replace(**{name: new})
        assert changed != tx
        assert changed.hyperparams[name] == new
        assert changed.replace(**{name: value}) == tx


@every_row
def test_leaves_are_the_hyperparameters(row):
    tx = row.tx
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tx)]
    assert len(set(paths)) == len(paths) == len(tx.hyperparams)
    assert [path.split(".")[-1] for path in paths] == [name.split(".")[-1] for name in tx.hyperparams]
    assert jax.tree.leaves(tx) == list(tx.hyperparams.values())
    jitted = jax.jit(lambda tx: tx)(tx)
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(jitted)] == paths
    np.testing.assert_allclose(jax.tree.leaves(jitted), jax.tree.leaves(tx), rtol=1e-7)
