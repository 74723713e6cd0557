"""The expert MLP as Mosaic GPU kernels: which of the forms does these shapes here."""

from types import ModuleType

import jax

from kernels_pallas.expert_mlp import mosaic_gpu_fma, mosaic_gpu_prefill, mosaic_gpu_wgmma

FEW_ROWS = 2  # of x, up to which the one kernel without tensor cores is the faster form
MAX_ROWS = mosaic_gpu_wgmma.MAX_ROWS  # of the decode forms: more are for prefill


def problem(x, slots) -> str | None:
    """Why no form can do these shapes and dtypes, or None. Takes anything that has their shape and dtype."""
    if form(x, slots):
        return None
    if x.shape[0] > MAX_ROWS:
        return _tensor_core_problem(mosaic_gpu_prefill, x, slots)
    return f"{mosaic_gpu_fma.problem(x, slots)}; with tensor cores: {_tensor_core_problem(mosaic_gpu_wgmma, x, slots)}"


def form(x, slots) -> ModuleType | None:
    """The form that is faster among those that can do it."""
    if x.shape[0] > MAX_ROWS:
        return None if _tensor_core_problem(mosaic_gpu_prefill, x, slots) else mosaic_gpu_prefill
    can = []
    if mosaic_gpu_fma.problem(x, slots) is None:
        can.append(mosaic_gpu_fma)
    if _tensor_core_problem(mosaic_gpu_wgmma, x, slots) is None:
        can.append(mosaic_gpu_wgmma)
    return (can[0] if x.shape[0] <= FEW_ROWS else can[-1]) if can else None


def _tensor_core_problem(form: ModuleType, x, slots) -> str | None:
    capability = getattr(jax.devices()[0], "compute_capability", None)  # none on a CPU, where kernels are interpreted
    if capability is not None and int(float(capability)) != 9:
        return f"compute capability {capability} is not 9 (Hopper), which alone has these instructions"
    return form.problem(x, slots)


def expert_mlp(x, slots, group_slots, group_weights, num_asked=None, *, max_groups_per_row: int | None = None):
    """Raises NotImplementedError where `problem` has an answer."""
    chosen = form(x, slots)
    if chosen is None:
        raise NotImplementedError(
            f"expert_mlp: mosaic_gpu cannot do this: {problem(x, slots)}; use implementation='reference'"
        )
    options = {
        mosaic_gpu_wgmma: {"num_asked": num_asked},
        mosaic_gpu_prefill: {"max_groups_per_row": max_groups_per_row},
    }
    return chosen.expert_mlp(x, slots, group_slots, group_weights, **options.get(chosen, {}))
