"""Routing as one Mosaic GPU kernel: a warpgroup for each row, a thread for each expert (for two of more than 128).

Bound by latency, and so by how much code runs once, and by how often threads wait for each other. Chosen are the
experts that fewer than `num_chosen` others outweigh; only if these are too many, for some of them weigh the same, are
equals counted as well. Then it is a matter of bits: 32 experts are a word, and the n-th chosen expert is the n-th bit
that is set.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.route.reference import LEAST_WEIGHT
from kernels_pallas.row_dots import by_rows_of

WARPS, LANES = 4, 32
WARPGROUP = WARPS * LANES  # threads
MAX_EXPERTS = 256  # two a thread
MAX_ROWS = 1024  # beyond, XLA's sort is no slower
COPIED = 4  # elements: TMA copies 16 bytes at least
UNROLL = 8  # of the chosen ones that are looked at: their loads are on their way together


def problem(logits) -> str | None:
    """Why these shapes cannot be done, or None. Takes anything that has their shape and dtype."""
    num_rows, num_experts = logits.shape
    if logits.dtype != jnp.float32:
        return f"logits are {logits.dtype}, not float32"
    if num_experts > MAX_EXPERTS or num_experts % COPIED or not 1 <= num_rows <= MAX_ROWS:
        return (
            f"{num_experts} experts must be a multiple of {COPIED} and at most {MAX_EXPERTS}, {num_rows} rows 1 to "
            f"{MAX_ROWS}"
        )
    return None


@functools.partial(jax.jit, static_argnames=("num_chosen", "normalize", "interpret"))  # compiled once for all layers
def route(logits, valid, *, num_chosen: int, normalize: bool, interpret=None):
    """Raises NotImplementedError where `problem` has an answer."""
    if why := problem(logits):
        raise NotImplementedError(f"route: mosaic_gpu cannot do this: {why}; use implementation='reference'")
    (num_rows, num_experts), room = logits.shape, -(-num_chosen // COPIED) * COPIED
    width = LANES * -(-num_experts // WARPGROUP)  # experts of a warp
    num_copies = -(-num_experts // width)
    if num_experts == WARPS * width:
        logits = logits.reshape(num_rows, WARPS, width)  # loaded by the threads: sooner there than by TMA
    kernel = plgpu.kernel(
        _kernel(num_experts, num_chosen, room, width, normalize),
        out_type=[jax.ShapeDtypeStruct((num_rows, room), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=(num_rows,),
        grid_names=("row",),
        scratch_types=[
            plgpu.SMEM((WARPS, width), jnp.float32),
            plgpu.SMEM((2, WARPS), jnp.float32),
            plgpu.SMEM((width // LANES, WARPS), jnp.int32),
            plgpu.SMEM((WARPS, width), jnp.int32),
            plgpu.SMEM((WARPS, width), jnp.float32),
            plgpu.Barrier(num_arrivals=num_copies),
        ],
        interpret=interpret,
    )
    expert_ids, weights = kernel(logits, valid.astype(jnp.int32))
    return expert_ids[:, :num_chosen], weights[:, :num_chosen]


def _kernel(num_experts: int, num_chosen: int, room: int, width: int, normalize: bool):
    """The kernel body; see the module's docstring."""
    layout = by_rows_of(width)

    def at(expert) -> tuple:
        """Its warp and its column."""
        return lax.shift_right_logical(expert, width.bit_length() - 1), expert & (width - 1)

    def iota(dimension: int):
        return plgpu.broadcasted_iota(jnp.int32, (WARPS, width), dimension, layout=layout)

    def load_logits(logits, here, arrived):
        """[4, width], of which the first `num_experts` are true."""
        if logits.ndim == 2:
            return plgpu.load(logits, layout=layout, optimized=False)
        for warp, part in enumerate(_rows(num_experts, width)):
            plgpu.copy_gmem_to_smem(logits.at[part], here.at[warp, pl.ds(0, part.size)], arrived)
        plgpu.barrier_wait(arrived)
        return plgpu.load(here, layout=layout)

    def route_rows(logits, valid, ids_out, weights_out, odds_here, of_warps, words_here, ids, weights, arrived):
        # logits [T, E] or [T, 4, width], valid [T]; ids_out, weights_out [T, room]; in shared memory odds_here, ids and
        # weights [4, width], of_warps [2, 4], words_here [width / 32, 4]
        row = lax.axis_index("row")
        is_token, column = valid[row] != 0, iota(1)  # asked for now, for it comes from far away
        me = iota(0) * width + column  # as an expert, and as a place among the chosen ones

        logit = jnp.where(me < num_experts, load_logits(logits.at[row], odds_here, arrived), -math.inf)
        of_warps[0] = jnp.max(logit, axis=1)
        largest = functools.reduce(jnp.maximum, [of_warps[0, warp] for warp in range(WARPS)])
        odds = jnp.exp(logit - largest)
        of_warps[1] = jnp.sum(odds, axis=1)
        odds = odds / ((of_warps[1, 0] + of_warps[1, 1]) + (of_warps[1, 2] + of_warps[1, 3]))
        odds_here[...] = odds

        def each(step, start):
            """`start` after a step with (warp, column) of some experts of each warp, and so on."""
            used = range(-(-num_experts // width))
            columns = min(num_experts, width)

            def some(n, carry):
                for k in range(COPIED):
                    carry = step([(warp, COPIED * n + k) for warp in used], carry)
                return carry

            return lax.fori_loop(0, columns // COPIED, some, start)

        def outweighed(experts, counts):
            """Of each warp's experts how many outweigh me: in float32, which compares and adds in two instructions."""
            heavier = [jnp.where(odds_here[expert] > odds, 1.0, 0.0) for expert in experts]
            return [count + one for count, one in zip(counts, heavier, strict=True)]

        zero = me * 0
        counts = each(outweighed, [zero.astype(jnp.float32)] * -(-num_experts // width))
        ranks = functools.reduce(jnp.add, counts)

        def choose(ranks) -> None:
            chosen = (ranks < num_chosen) & (me < num_experts)
            for k in range(width // LANES):
                bit = jnp.where(chosen & (column // LANES == k), lax.shift_left(zero + 1, column % LANES), 0)
                words_here[k] = jnp.sum(bit, axis=1)

        def words() -> list:
            """In the order of the experts."""
            return [words_here[k, warp] for warp in range(WARPS) for k in range(width // LANES)]

        choose(ranks)

        @pl.when(sum(_ones(word) for word in words()) != num_chosen)
        def _():
            def equal(experts, count):
                for warp, n in experts:
                    count += jnp.where((odds_here[warp, n] == odds) & (warp * width + n < me), 1.0, 0.0)
                return count

            choose(each(equal, ranks))

        expert = jnp.minimum(_nth(words(), me), num_experts - 1)
        ids[...] = jnp.where((me < num_chosen) & (zero < is_token.astype(jnp.int32)), expert, num_experts)

        def found(n, carry):
            weight, total = carry
            expert = jnp.minimum(ids[at(n)], num_experts - 1)
            odds = odds_here[at(expert)]
            return jnp.where(me == n, odds, weight), total + odds

        start = zero.astype(jnp.float32), jnp.float32(0)
        weight, total = lax.fori_loop(0, num_chosen, found, start, unroll=math.gcd(num_chosen, UNROLL))
        weight = jnp.maximum(weight / total if normalize else weight, LEAST_WEIGHT)
        weights[...] = jnp.where((me < num_chosen) & (zero < is_token.astype(jnp.int32)), weight, 0.0)
        plgpu.commit_smem()
        for warp, part in enumerate(_rows(room, width)):
            for here, out in ((ids, ids_out), (weights, weights_out)):
                plgpu.copy_smem_to_gmem(here.at[warp, pl.ds(0, part.size)], out.at[row, part])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return route_rows


def _rows(number: int, width: int) -> list:
    """What each warp has of as many elements, in order."""
    return [pl.ds(start, min(width, number - start)) for start in range(0, number, width)]


def _ones(word):
    """Bits that are set in an int32."""
    word = word - (lax.shift_right_logical(word, 1) & 0x55555555)
    word = (word & 0x33333333) + (lax.shift_right_logical(word, 2) & 0x33333333)
    word = (word + lax.shift_right_logical(word, 4)) & 0x0F0F0F0F
    return lax.shift_right_logical(word * 0x01010101, 24)


def _nth(words: list, n):
    """Which bit is the n-th that is set, counted from 0 through all the words; anything if there are no more."""
    word, at, before = n * 0 + words[0], n * 0, jnp.int32(0)
    left = n
    for k in range(1, len(words)):
        before += _ones(words[k - 1])
        later = n >= before
        word, at, left = (
            jnp.where(later, words[k], word),
            jnp.where(later, 32 * k, at),
            jnp.where(later, n - before, left),
        )
    for half in (16, 8, 4, 2, 1):
        lower = _ones(word & ((1 << half) - 1))
        later = left >= lower
        word = jnp.where(later, lax.shift_right_logical(word, half), word)
        at, left = jnp.where(later, at + half, at), jnp.where(later, left - lower, left)
    return at
