"""The jobs of `python -m gdx`; they need the extra `gdx-jax[demo]`."""
