"""10. Made from a key, saved and read again."""

import io

import equinox as eqx
import jax
import jax.random as jr

from discretax.testing._compare import path_of, require, same
from discretax.testing._law import law
from discretax.testing._subject import Subject, parameters


@law()
def serialise_and_deserialise(subject: Subject):
    """Saved, and read into a mixer of another key, it gives the same outputs."""
    mixer, x = subject.single()
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, mixer)
    file.seek(0)
    again = eqx.tree_deserialise_leaves(file, subject.made(seed=1)[0])
    same(subject.run(again, x), subject.run(mixer, x), 0, of="read again", to="the one saved")


@law()
def one_key_one_mixer(subject: Subject):
    """One key makes one mixer; another changes every number, but in the fields of `not_drawn`."""
    first, again, other = (parameters(subject.make(jr.key(seed))) for seed in (0, 0, 1))
    for path, leaf in first.items():
        require((leaf == again[path]).all(), f"mixer.{path} differs between two of one key")
        drawn = not set(path.split(".")) & set(subject.not_drawn)
        found = "has numbers that two keys share" if drawn else "of `not_drawn` is drawn"
        require((leaf != other[path]).all() == drawn, f"mixer.{path} {found}")


@law()
def no_array_stands_twice(subject: Subject):
    """No array stands twice in it: a training step that donates one could not give it away."""
    places = {}
    leaves, _ = jax.tree.flatten_with_path(subject.make(jr.key(0)))
    for keys, leaf in leaves:
        if eqx.is_array(leaf):
            path = path_of(keys)
            other = places.setdefault(leaf.unsafe_buffer_pointer(), path)
            require(other == path, f"mixer.{path} and mixer.{other} are one array")


@law()
def no_type_is_weak(subject: Subject):
    """Every array's type is its own: training would make one of a weak type, as `jnp.full(3, 0.5)`
    is, and compile its step again."""
    leaves, _ = jax.tree.flatten_with_path(subject.make(jr.key(0)))
    for keys, leaf in leaves:
        weak = eqx.is_array(leaf) and leaf.weak_type
        require(not weak, f"mixer.{path_of(keys)} is of a weak type")
