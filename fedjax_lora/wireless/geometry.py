"""Where clients are: the server sits at the origin of a circular cell."""

import jax
import jax.numpy as jnp
from jax import Array


def annulus_position(key: Array, inner_m: Array | float, outer_m: Array | float) -> Array:
    """`[2]` position in metres, uniform in area over the annulus `inner_m <= |x| <= outer_m`."""
    area_key, angle_key = jax.random.split(key)
    radius_m = jnp.sqrt(jax.random.uniform(area_key, (), minval=jnp.square(inner_m), maxval=jnp.square(outer_m)))
    angle = jax.random.uniform(angle_key, (), maxval=2 * jnp.pi)
    return radius_m * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
