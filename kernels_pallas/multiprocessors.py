"""How kernels share out the multiprocessors of an H200.

A prefetch runs beside the experts of a layer, and beside the projections and the attention of the next one. Its blocks
fill the shared memory of their multiprocessors. A kernel with a block for every multiprocessor would then start its
last blocks when its first ones are done, and take up to twice as long: what may run beside a prefetch has fewer blocks.
"""

COUNT = 132
COPYING = 4  # as many as the link needs
BESIDE_A_COPY = COUNT - COPYING
