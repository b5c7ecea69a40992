"""The structs, numbers and prototypes of native/zo.h; a test compares them with the header."""

import ctypes
from collections.abc import Sequence
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint8,
    c_uint32,
    c_uint64,
)
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ON_CPU = -1  # the device of a kernel called by itself
NORMAL, RADEMACHER = 0, 1  # zo_distribution
MAX_BRANCHES = 4096  # ZO_MAX_BRANCHES
Handle = ctypes.c_void_p
FLOATS = POINTER(c_float)
INTS = POINTER(c_int32)
Ints = NDArray[np.int32]


class Probe(NamedTuple):
    """A place near theta: theta + scale * z(seed); scale 0 is theta itself."""

    seed: int
    scale: float


AT_THETA = Probe(0, 0.0)


class Part(IntEnum):
    """zo_part: which parameters a tensor of the noise belongs to."""

    SPARSE = 0
    INPLACE = 1
    LOWRANK = 2
    GAIN = 3

    def tensor(self, index: int) -> int:
        """ZO_TENSOR: the noise's number of the index-th tensor of this part."""
        return (self << 30) + index


class Branch(ctypes.Structure):
    """zo_branch."""

    _fields_ = (("seed", c_uint64), ("scale", c_float))


class Field(ctypes.Structure):
    """zo_field; `base` must outlive the call of zo_inplace_add only."""

    _fields_ = (
        ("n_values", c_int64),
        ("block_bytes", c_int64),
        ("n_per_block", c_int32),
        ("offset", c_int32 * 2),
        ("storage", c_int32),
        ("relative", c_bool),
        ("limit", c_float),
        ("base", FLOATS),
    )


class Batch(ctypes.Structure):
    """zo_batch; the arrays must outlive the call of zo_hook_begin only."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("n_outputs", c_int32),
        ("n_branches", c_int32),
        ("n_targets", c_int32),
        ("token_branch", POINTER(c_int32)),
        ("output_branch", POINTER(c_int32)),
        ("branches", POINTER(Branch)),
        ("target_output", POINTER(c_int32)),
        ("target_token", POINTER(c_int32)),
    )

    @classmethod
    def of(
        cls,
        branches: Sequence[Probe],
        token_branch: Ints,
        output_branch: Ints,
        target_output: Ints,
        target_token: Ints,
    ) -> "Batch":
        """The struct over these arrays."""
        return cls(
            token_branch.size,
            output_branch.size,
            len(branches),
            target_output.size,
            token_branch.ctypes.data_as(INTS),
            output_branch.ctypes.data_as(INTS),
            (Branch * len(branches))(*(Branch(*branch) for branch in branches)),
            target_output.ctypes.data_as(INTS),
            target_token.ctypes.data_as(INTS),
        )


class BlockLayout(ctypes.Structure):
    """zo_layout.

    Attributes:
        arrays: What its pointers lead to; they do not keep it alive themselves.
    """

    arrays: Sequence[NDArray[Any]]

    _fields_ = (
        ("block", c_int32),
        ("group", c_int32),
        ("block_bytes", c_int32),
        ("n_code_bits", c_int32),
        ("code_bits", INTS),
        ("n_levels", c_int32),
        ("codes", INTS),
        ("levels", FLOATS),
        ("d_byte", c_int32),
        ("min_byte", c_int32),
        ("min_sign", c_float),
        ("n_scale_bits", c_int32),
        ("scale_bits", INTS),
        ("n_scales", c_int32),
        ("scale_codes", INTS),
        ("scale_low", c_int32),
        ("n_min_bits", c_int32),
        ("min_bits", INTS),
    )


BYTES = POINTER(c_uint8)

# name -> (result type, argument types); a test compares this table with the prototypes in zo.h.
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "zo_engine_version": (c_char_p, ()),
    "zo_gpu_kernels": (c_char_p, ()),
    "zo_gpu_count": (c_int32, ()),
    "zo_gpu_launches": (c_int64, ()),
    "zo_check_engine": (c_int32, ()),
    "zo_last_error": (c_char_p, ()),
    "zo_noise": (c_int32, (c_int32, c_uint64, c_uint32, c_int64, c_int64, FLOATS)),
    "zo_store_init": (c_int32, (POINTER(Handle), c_int32, c_int32)),
    "zo_store_free": (None, (Handle,)),
    "zo_store_add": (
        c_int32,
        (Handle, c_char_p, c_int64, c_int64, c_int64, POINTER(c_int64), FLOATS),
    ),
    "zo_store_size": (c_int64, (Handle,)),
    "zo_store_read": (c_int32, (Handle, c_int64, FLOATS)),
    "zo_store_write": (c_int32, (Handle, c_int64, FLOATS)),
    "zo_store_noise": (c_int32, (Handle, c_uint64, c_int64, FLOATS)),
    "zo_store_apply": (
        c_int32,
        (Handle, c_char_p, Branch, c_int64, FLOATS, c_int64, FLOATS, c_int64, c_int32),
    ),
    "zo_inplace_init": (c_int32, (POINTER(Handle), c_int32, c_int32)),
    "zo_inplace_free": (None, (Handle,)),
    "zo_inplace_add": (c_int32, (Handle, c_char_p, POINTER(Field), c_int64, FLOATS)),
    "zo_inplace_size": (c_int64, (Handle,)),
    "zo_inplace_read": (c_int32, (Handle, c_int64, FLOATS)),
    "zo_inplace_write": (c_int32, (Handle, c_int64, FLOATS)),
    "zo_inplace_noise": (c_int32, (Handle, c_uint64, c_int64, FLOATS)),
    "zo_inplace_values": (c_int32, (Handle, Branch, c_int64, FLOATS)),
    "zo_inplace_check": (c_int32, (Handle,)),
    "zo_inplace_apply": (c_int32, (Handle, Branch)),
    "zo_lowrank_init": (c_int32, (POINTER(Handle), c_int32, c_int32)),
    "zo_lowrank_free": (None, (Handle,)),
    "zo_lowrank_add": (c_int32, (Handle, c_char_p, c_int64, c_int64)),
    "zo_lowrank_set": (
        c_int32,
        (Handle, c_int32, c_int32, c_int64, c_int64, FLOATS, c_int64, FLOATS),
    ),
    "zo_lowrank_train": (c_int32, (Handle, c_int32, c_int64, c_float, c_uint32, c_int64, FLOATS)),
    "zo_lowrank_probe": (c_int32, (Handle, c_int32, Branch)),
    "zo_lowrank_apply": (
        c_int32,
        (Handle, c_int32, c_int32, c_int64, FLOATS, c_int64, FLOATS, c_int64, c_int32, c_int32),
    ),
    "zo_gain_init": (c_int32, (POINTER(Handle),)),
    "zo_gain_free": (None, (Handle,)),
    "zo_gain_add": (c_int32, (Handle, c_char_p, c_int64)),
    "zo_gain_set": (c_int32, (Handle, c_int32, c_int32, c_int64, FLOATS)),
    "zo_tensors_init": (c_int32, (POINTER(Handle),)),
    "zo_tensors_free": (None, (Handle,)),
    "zo_tensors_add": (c_int32, (Handle, c_char_p, c_int64)),
    "zo_tensors_eval": (c_bool, (ctypes.c_void_p, c_bool, ctypes.c_void_p)),
    "zo_tensors_missing": (c_int32, (Handle,)),
    "zo_tensors_set": (c_int32, (Handle, c_int32, ctypes.c_void_p, c_int64)),
    "zo_recorder_init": (c_int32, (POINTER(Handle),)),
    "zo_recorder_free": (None, (Handle,)),
    "zo_recorder_add": (c_int32, (Handle, c_char_p, c_int64)),
    "zo_recorder_begin": (c_int32, (Handle, c_int32, c_int32, INTS, c_int32, INTS)),
    "zo_recorder_find": (c_int32, (Handle, c_int32, INTS, INTS)),
    "zo_recorder_read": (c_int32, (Handle, c_int32, c_int32, c_int64, INTS, FLOATS)),
    "zo_feedback_init": (c_int32, (POINTER(Handle), c_int32, c_double, c_bool)),
    "zo_feedback_free": (None, (Handle,)),
    "zo_feedback_weight": (c_int32, (Handle, c_char_p, c_int32, ctypes.c_void_p, c_int64)),
    "zo_feedback_track": (
        c_int32,
        (Handle, c_char_p, c_int64, c_int64, c_int64, c_int64, FLOATS),
    ),
    "zo_feedback_track_gain": (c_int32, (Handle, c_char_p, c_int64)),
    "zo_feedback_begin": (c_int32, (Handle, POINTER(Batch), c_int32, INTS)),
    "zo_feedback_end": (c_int32, (Handle, POINTER(c_bool))),
    "zo_feedback_run": (c_int32, (Handle, c_int32, FLOATS)),
    "zo_feedback_gradient": (c_int32, (Handle, c_int32, c_int64, FLOATS)),
    "zo_feedback_pairs": (c_int32, (Handle, c_int32, c_int64, FLOATS, c_int64, FLOATS)),
    "zo_feedback_gain_gradient": (c_int32, (Handle, c_int32, c_int64, FLOATS)),
    "zo_feedback_clear": (c_int32, (Handle,)),
    "zo_feedback_token_bytes": (c_int64, (Handle,)),
    "zo_feedback_matrix": (c_char_p, (Handle, c_int32, POINTER(c_int64), POINTER(c_int64))),
    "zo_feedback_norm": (c_char_p, (Handle, c_int32, POINTER(c_int64))),
    "zo_feedback_stop": (c_char_p, (Handle, c_int32)),
    "zo_requantize": (
        c_int32,
        (
            POINTER(BlockLayout),
            c_int64,
            c_int64,
            BYTES,
            c_int64,
            FLOATS,
            FLOATS,
            c_int64,
            BYTES,
            c_int32,
            BYTES,
        ),
    ),
    "zo_moments_init": (c_int32, (POINTER(Handle), c_int64, c_int64, c_int64, FLOATS, c_int32)),
    "zo_moments_free": (None, (Handle,)),
    "zo_moments_choose": (
        c_int32,
        (
            Handle,
            POINTER(BlockLayout),
            c_double,
            c_int32,
            c_int64,
            POINTER(c_int64),
            c_int32,
            c_int64,
            BYTES,
            c_int64,
            FLOATS,
            c_int32,
            BYTES,
            POINTER(c_double),
        ),
    ),
    "zo_discard_init": (c_bool, (ctypes.c_void_p, ctypes.c_void_p, c_uint32)),
    "zo_discard_apply": (None, (ctypes.c_void_p,) * 4),
    "zo_losses": (
        c_int32,
        (
            FLOATS,
            c_int64,
            c_int64,
            c_int32,
            c_int32,
            INTS,
            INTS,
            c_int32,
            c_int32,
            POINTER(c_double),
        ),
    ),
    "zo_hook_init": (c_int32, (POINTER(Handle), Handle, Handle, Handle, Handle, c_int32, c_bool)),
    "zo_hook_free": (None, (Handle,)),
    "zo_hook_set_recorder": (c_int32, (Handle, Handle)),
    "zo_hook_set_feedback": (c_int32, (Handle, Handle)),
    "zo_hook_eval": (c_bool, (ctypes.c_void_p, c_bool, ctypes.c_void_p)),
    "zo_hook_begin": (c_int32, (Handle, POINTER(Batch))),
    "zo_hook_check": (c_int32, (Handle,)),
    "zo_hook_end": (c_int32, (Handle, c_int32, POINTER(c_double))),
}
