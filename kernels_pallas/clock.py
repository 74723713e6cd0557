"""The device's clock: %globaltimer, which counts ns and which all kernels share. Its low 32 bits, as an int32.

They wrap around every 4.3 s, so that only differences mean something, in int32 and below half of that. How often the
clock advances is the device's matter. Where kernels run beside each other it is better read by one that is there in any
case than by one of its own.
"""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import globaltimer
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int


def read() -> Int[Array, ""]:
    """Inside a kernel: the time. Each thread has its own, and what is stored is that of one. Not where interpreted."""
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(return_type=scalar)
    def timer(_):
        return mgpu.FragmentedArray.splat(globaltimer("low"), shape=(), is_signed=True)

    return timer()  # pyright: ignore[reportCallIssue]  # the kernel's context comes of itself


@jax.jit  # the layers of a model share one compilation
def now(after: Array) -> Int[Array, ""]:
    """A kernel of its own: the time once `after` is computed, an array whose values are of no matter."""

    def tell_time(after, time):
        time[0] = read()

    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    return plgpu.kernel(tell_time, out_type=one, grid=(1,), grid_names=("block",))(after.reshape(-1)).reshape(())
