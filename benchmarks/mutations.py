#!/usr/bin/env python
"""Breaks each guard of the fusion rules once and asks whether a test notices.

    python benchmarks/mutations.py [--only TEXT]

Run it with the Python that has onnxpress and pytest. Every mutation is applied to a copy of the repository, one at a
time, and the tests of its file must fail there. Prints a table; exits with 1 when a mutation survives, when the tests
fail without any, or when the text of a mutation no longer occurs exactly once. `--only` picks by file or name.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compiler", "models", "passes", "runtime")
TIMEOUT_S = 600

_FUSION, _TESTS = "passes/fusion", "tests/passes/fusion"
_QUANTIZATION, _QUANTIZED = "passes/quantization", "tests/passes/quantization"
# The tests that must notice, quickest first: pytest stops at the first failure.
TESTS = {
    f"{_FUSION}/fuse_rmsnorm.py": (f"{_TESTS}/test_fuse_rmsnorm.py",),
    f"{_FUSION}/fuse_rotary.py": (f"{_TESTS}/test_rotary_kinds.py", f"{_TESTS}/test_fuse_rotary.py"),
    f"{_FUSION}/fuse_attention.py": (f"{_TESTS}/test_attention_guards.py",),
    f"{_FUSION}/_attention.py": (f"{_TESTS}/test_attention_guards.py", f"{_TESTS}/test_encoder_attention_guards.py"),
    f"{_FUSION}/fuse_encoder_attention.py": (f"{_TESTS}/test_encoder_attention_guards.py",),
    f"{_FUSION}/fuse_skip_norm.py": (f"{_TESTS}/test_fuse_skip_norm.py",),
    f"{_FUSION}/fold_attention_bias.py": (f"{_TESTS}/test_fold_attention_bias.py",),
    f"{_FUSION}/pack_attention.py": (f"{_TESTS}/test_pack_attention.py",),
    f"{_FUSION}/unpack_attention.py": (f"{_TESTS}/test_unpack_attention.py", f"{_TESTS}/test_pack_attention.py"),
    f"{_FUSION}/fuse_swiglu.py": (f"{_TESTS}/test_fuse_swiglu.py",),
    f"{_FUSION}/fuse_gelu.py": (f"{_TESTS}/test_fuse_gelu.py",),
    f"{_FUSION}/pack_qkv.py": (f"{_TESTS}/test_pack_qkv.py",),
    f"{_FUSION}/split_projections.py": (f"{_TESTS}/test_split_projections.py",),
    "passes/canonicalize/unflatten.py": ("tests/passes/canonicalize/test_unflatten.py",),
    f"{_FUSION}/pack_gate_up.py": (f"{_TESTS}/test_pack_gate_up.py",),
    "compiler/projections.py": (f"{_TESTS}/test_pack_gate_up.py", f"{_TESTS}/test_pack_qkv.py"),
    "compiler/packing.py": ("tests/compiler/test_packing.py", "tests/passes/quantization/test_rtn.py"),
    "compiler/fusing.py": ("tests/compiler/test_fusing.py",),
    "compiler/region.py": ("tests/compiler/test_fusing.py", "tests/compiler/test_sized_number.py"),
    "compiler/genai.py": ("tests/compiler/test_genai_cache.py", "tests/compiler/test_artifact.py"),
    "compiler/safetensors_file.py": ("tests/compiler/test_peft.py",),
    "compiler/peft.py": ("tests/compiler/test_peft.py",),
    "compiler/lora_targets.py": ("tests/compiler/test_lora_targets.py",),
    "compiler/lora_graph.py": ("tests/passes/low_rank/test_merge_lora.py", "tests/passes/low_rank/test_lora_slots.py"),
    "compiler/lora_slots.py": ("tests/runtime/test_adapters.py",),
    "compiler/requantize.py": ("tests/compiler/test_requantize.py",),
    "compiler/truncated_svd.py": ("tests/compiler/test_truncated_svd.py",),
    "compiler/adapters.py": ("tests/compiler/test_lora_verbs.py",),
    "compiler/roles.py": ("tests/passes/low_rank/test_lora_slots.py",),
    "passes/low_rank/merge_lora.py": ("tests/passes/low_rank/test_merge_lora.py",),
    "passes/low_rank/lora_slots.py": ("tests/passes/low_rank/test_lora_slots.py",),
    "passes/quantization/compensate.py": ("tests/passes/quantization/test_compensate_adapter.py",),
    "runtime/adapters.py": ("tests/runtime/test_adapters.py",),
    "runtime/generate.py": ("tests/runtime/test_adapters.py",),
    "runtime/session.py": ("tests/runtime/test_adapters.py",),
    f"{_QUANTIZATION}/mixed.py": (f"{_QUANTIZED}/test_fitted_errors.py", f"{_QUANTIZED}/test_mixed.py"),
    f"{_QUANTIZATION}/_mixed.py": (f"{_QUANTIZED}/test_fitted_errors.py", f"{_QUANTIZED}/test_mixed.py"),
    f"{_QUANTIZATION}/_fitted_errors.py": (f"{_QUANTIZED}/test_fitted_errors.py",),
    f"{_QUANTIZATION}/_calibrated.py": (f"{_QUANTIZED}/test_calibrated.py", f"{_QUANTIZED}/test_gptq.py"),
    "compiler/stats.py": (f"{_QUANTIZED}/test_calibrated.py",),
    "passes/pruning/prune.py": ("tests/passes/pruning/test_prune.py",),
    "passes/pruning/_savings.py": ("tests/passes/pruning/test_prune.py",),
    **{
        f"passes/pruning/_channel_{name}.py": ("tests/passes/pruning/test_prune_channels.py",)
        for name in ("fit", "groups", "moves", "readers", "rules", "walk")
    },
    "compiler/calibration_arrays.py": ("tests/compiler/test_calibration_arrays.py",),
    "compiler/differentiable.py": ("tests/compiler/test_differentiable.py",),
    "compiler/differentiable_ops.py": ("tests/compiler/test_differentiable.py",),
    "compiler/distillation.py": ("tests/passes/pruning/test_heal.py",),
    "passes/pruning/heal.py": ("tests/passes/pruning/test_heal.py",),
}
# By file: (what goes wrong, text that occurs once, text that takes its place).
MUTATIONS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "compiler/differentiable.py": (
        ("no comparison with ONNX Runtime", "if not difference <= tolerance:", "if False:"),
        ("a value that a later part reads is lost", "if last.get(id(value), -1) >= end]", "if last.get(id(value), -1) > end]"),
    ),
    "compiler/differentiable_ops.py": (
        ("strange attributes pass", "if name not in _ATTRIBUTES[key]:", "if False:"),
        ("gradient of scales without codes", "product = gradient_NK * torch.from_numpy", "product = gradient_NK + 0 * torch.from_numpy"),
        ("window one token too long", "visible.triu(1 - window)", "visible.triu(-window)"),
    ),
    "compiler/distillation.py": (
        ("the rest of the vocabulary forgotten", "torch.logaddexp(log_named, log_others)", "log_named + 0 * log_others"),
        ("the last state instead of the best", "if course.best == step + 1:", "if True:"),
        ("a run that was killed begins anew", "if record is not None:", "if False:"),
        ("gradient not by change", "one.size * leaf.grad", "leaf.grad / one.size"),
    ),
    "passes/pruning/heal.py": (
        ("written although nothing was won", "if course.best == 0:", "if course.has_nothing_to_learn:"),
        ("factors merged the wrong way round", "(added.T if is_turned else added)", "(added if is_turned else added.T)"),
        ("zeros filled", "> _SPARSE:", "> 2:"),
    ),
    f"{_FUSION}/fuse_rmsnorm.py": (
        ("epsilon ignored", 'ir.AttrFloat32("epsilon", found.epsilon)', 'ir.AttrFloat32("epsilon", 1e-5)'),
        ("another axis", 'ir.AttrInt64("axis", -1)', 'ir.AttrInt64("axis", 1)'),
        ("a mean over any axis", "not squares or not last_axis(", "not squares or not (lambda *_: True)("),
        ("any power", "scalar(square.inputs[1]) == 2.0", "scalar(square.inputs[1]) is not None"),
        ("any product", "else square.inputs[1] is x", "else True"),
        ("other readers of intermediate values", "if len(readers) != 1:\n            return None", "if not readers:\n            return None"),
        ("not divided by its own root", "and other(node, value) is x:", "and other(node, value) is not None:"),
        ("a weight that is no vector", "if vector(weight) is not None:", "if weight is not None:"),
        ("weight dropped", "found.gamma, found.output = weight, readers", "found.output = readers"),
        ("the unit is an output", ' and not found.output.is_graph_output():', ":"),
        ("width unknown", "if found.gamma is None and not isinstance(width, int):", "if False:"),
        ("type of the ones", "int(found.x.shape[-1]), found.x.dtype or ir.DataType.FLOAT", "int(found.x.shape[-1]), ir.DataType.FLOAT"),
    ),
    f"{_FUSION}/fuse_rotary.py": (
        ("cosine for sine", "operands = [found.x, positions, cos, sin]", "operands = [found.x, positions, cos, cos]"),
        ("partial size ignored", 'ir.AttrInt64("rotary_embedding_dim", turned)', 'ir.AttrInt64("rotary_embedding_dim", 0)'),
        ("heads of a part ignored", 'ir.AttrInt64("num_heads", heads), ', ""),
        ("rest of another value", "or whole is None or rest.inputs[0] is not whole:", "or whole is None:"),
        ("turned part is an output", "join is None or found.output.is_graph_output():", "join is None:"),
        ("turned part has other readers", "join = joins[0] if len(joins) == 1 and", "join = joins[0] if"),
        ("width of heads unknown", "if not isinstance(turned, int) or heads is None or width is None:", "if not isinstance(turned, int):"),
        ("positions not for each row", "positions = source if source.is_graph_input() else", "positions = source if True else"),
        ("angles depend on an activation", 'if any(node.op_type != "Shape" for node in readers):', "if False:"),
        ("table of double angles", "for n in (0, self.length, 1)]", "for n in (0, 2 * self.length, 2)]"),
        ("length ignored", 'int(context.config.get("max_position_embeddings") or 4096)', "4096"),
    ),
    f"{_FUSION}/fuse_attention.py": (
        ("DROPPED SCALE", '            ir.AttrFloat32("scale", found.scale),\n', ""),
        ("DROPPED WINDOW", 'ir.AttrInt64("local_window_size", window)', 'ir.AttrInt64("local_window_size", -1)'),
        ("IGNORED MASK", "total, found.cos, found.sin, None, bias]", "total, found.cos, found.sin, None, None]"),
        (
            "WRONG LENGTHS",
            'last = made.node("ArgMax", [summed], axis=1, keepdims=0)',
            'last = made.node("Sub", [made.node("ReduceSum", [mask, made.const(np.array([1]), "list")], keepdims=0),'
            ' made.const(np.array(1), "one")])',
        ),
        ("soft cap ignored", "if found.softcap:", "if False:"),
        ("heads and key-value heads swapped", 'ir.AttrInt64("kv_num_heads", found.num_kv_heads)', 'ir.AttrInt64("kv_num_heads", found.num_heads)'),
        ("interleaved rotary ignored", 'ir.AttrInt64("rotary_interleaved", found.interleaved)', 'ir.AttrInt64("rotary_interleaved", 0)'),
        ("rotary dropped", 'ir.AttrInt64("do_rotary", 1)', 'ir.AttrInt64("do_rotary", 0)'),
        ("positions passed on", "found.cos, found.sin, None, bias]", "found.cos, found.sin, found.positions, bias]"),
        ("past keys and values swapped", "operands = [q, k, v, found.past_k, found.past_v,", "operands = [q, k, v, found.past_v, found.past_k,"),
        ("head size that the kernel lacks", "if found.head_size % 8:", "if False:"),
        ("no mask taken for causal", 'if not found.masks:\n            raise NotCuttable("no mask', 'if False:\n            raise NotCuttable("no mask'),
        ("mask from any input", "            if leaf.is_graph_input() and rank(leaf) == 2 and leaf.dtype in integers", "            if leaf.is_graph_input() and leaf.dtype in integers"),
        ("gaps in the mask", "if count == 0 or not seen[-count:].all():", "if count == 0:"),
        ("all is taken for a window", "return -1 if count == total else count", "return count"),
        ("probe shorter than the window", "max([64, *constants, *named])", "max([8])"),
        ("padding on the left untried", "        if not self.left:\n            return\n", "        return\n"),
        ("windows untried", "if self.window > 0:\n            steps", "if False:\n            steps"),
        ("padded rows compared", "array = array * seen[:, -array.shape[1] :, None]", "pass"),
        ("norm of heads dropped", "nodes.append(again)\n            apart = again.outputs[0]", "apart = value"),
        ("heads joined without turning", 'ir.AttrInt64s("perm", [0, 2, 1, 3])], name=f"{value.name}/swap"', 'ir.AttrInt64s("perm", [0, 1, 2, 3])], name=f"{value.name}/swap"'),
        ("what rotary refuses is left", "if found.cos is None:\n                        raise", "if True:\n                        raise"),
        ("bias for padding on the right too", 'self.padding == "any")', "True)"),
        ("present values for keys", "outputs = [found.output, found.present_k, found.present_v]", "outputs = [found.output, found.present_v, found.present_k]"),
    ),
    f"{_FUSION}/_attention.py": (
        ("scale of the queries ignored", "scale=core.scale * q_scale * k_scale", "scale=core.scale * k_scale"),
        ("scale of the keys ignored", "scale=core.scale * q_scale * k_scale", "scale=core.scale * q_scale"),
        ("scale above the soft cap ignored", "scale *= softcap  #", "#"),
        ("values are scaled", 'if v_scale != 1.0:\n        raise NotCuttable("the values', 'if False:\n        raise NotCuttable("the values'),
        ("anything between scores and Softmax", 'raise NotCuttable(f"{node.op_type} between the scores and the Softmax")', "value = node.inputs[0]"),
        ("cache of any origin", "if past is None or new is None or not past.is_graph_input():", "if past is None or new is None:"),
        ("other readers of probabilities", 'if len(readers) != 1:\n            break\n        node = readers[0]\n        if node.op_type == "MatMul" and node', 'if not readers:\n            break\n        node = readers[0]\n        if node.op_type == "MatMul" and node'),
        ("probabilities are an output", 'if value.is_graph_output():\n            raise NotCuttable("the prob', 'if False:\n            raise NotCuttable("the prob'),
        ("product is an output", 'if value.is_graph_output():\n            raise NotCuttable("the product', 'if False:\n            raise NotCuttable("the product'),
        ("probabilities are replaced", 'if node.op_type == "Where" and not _is_guard(', "if False and not _is_guard("),
        ("any guard", "test is not None and test.inputs[0] is value and", "test is not None and"),
        ("size of the product is asked", "if not all(ends_in(node, walked) for node in sizes):", "if False:"),
        ("rotary of other angles", "if not same or q.inputs[0] is None", "if q.inputs[0] is None"),
        ("interleaved rotary ignored", "found.interleaved = 0 if attribute is None else attribute.as_int()", "found.interleaved = 0"),
        ("query heads of the cache", "return static(self.q, 2) // self.head_size", "return self.num_kv_heads"),
    ),
    f"{_FUSION}/fuse_encoder_attention.py": (
        ("scale dropped", ', ir.AttrFloat32("scale", found.scale)]', "]"),
        ("scale of the queries ignored", "core.scale * q.scale * k.scale,", "core.scale * k.scale,"),
        ("mask dropped", "None, None, bias, found.k.past,", "None, None, None, found.k.past,"),
        ("Softmax over another axis", "if axis is not None and axis.as_int() not in (-1, 3):", "if False:"),
        ("a cache", "if core.cached or (k.past is None and _has_cache(core.k)):", "if False:"),
        ("soft cap ignored", "if core.softcap:", "if False:"),
        ("selecting mask added", "if mask is not None and mask.dtype == ir.DataType.BOOL:", "if False:"),
        ("values are scaled", "if v.scale != 1.0:", "if False:"),
        ("replaced probabilities", "if found.is_guarded and not _rows_see_a_key(fuser, found):", "if False:"),
        ("head count swapped with width", "heads = core.num_heads or static(core.output, 1)", "heads = core.num_heads or static(core.output, 3)"),
        ("mask written out once for all shapes", "bias = biases[_bias_key(found)] = add(", "bias = add("),
        ("lengths of the queries ignored", "key.append(_length(operand))", "pass"),
        ("a circle", "if operand is not None and id(operand) in made:", "if False:"),
        ("one mask for all layers", "biases.get(_bias_key(found))", "next(iter(biases.values()), None)"),
        ("a refused mask is kept", "            del biases[_bias_key(found)]", "            pass"),
        ("masks of one row untried", "(2, 4, 0, 2), (2, 4, 0, 0)]", "]"),
        ("heads joined without turning", 'ir.AttrInt64s("perm", [0, 2, 1, 3])])', 'ir.AttrInt64s("perm", [0, 1, 2, 3])])'),
        ("keys turned otherwise", "perm not in (turn, [0, 2, 3, 1]):", "perm is None:"),
    ),
    f"{_FUSION}/split_projections.py": (
        ("rows untold", "not (rows == own.reshape(own.shape + (1,) * (part.ndim - 2))).all():", "False:"),
        ("one row stands for all", "if (columns == columns[0, 0]).all() else None", "if True else None"),
        ("shared columns", "if len(np.unique(named)) != len(named):", "if False:"),
        ("packed weight read elsewhere", "if any(len(value.uses()) != 1 or value.is_graph_output() for value in stored):", "if False:"),
        ("a part given away", "if any(part.is_graph_output() for part in parts):", "if False:"),
        ("bias not cut", 'packed.bias, columns.reshape(-1), f"{name}.bias"', 'packed.bias, np.sort(columns.reshape(-1)), f"{name}.bias"'),
        ("the whole is read", "if packed.output in parts:\n        return", "if False:\n        return"),
    ),
    "passes/canonicalize/unflatten.py": (
        ("norm over rows", "return axis is None or axis.as_int() in (-1, 1)", "return True"),
        ("scaled product", "if any(factor != 1.0 for factor in factors):", "if False:"),
        ("rows elsewhere", "if not all(same):", "if False:"),
        ("matrix not turned", 'if _is_set(gemm, "transB"):', "if False:"),
    ),
    f"{_FUSION}/fuse_skip_norm.py": (
        ("epsilon ignored", "1e-5 if epsilon is None else epsilon.as_float()", "1e-5"),
        ("default epsilon of the other operator", "1e-5 if epsilon is None else", "1e-12 if epsilon is None else"),
        ("bias dropped", "operands = [left, right, *norm.inputs[1:]]", "operands = [left, right, norm.inputs[1]]"),
        ("a constant is a residual", "or left.const_value is not None or right.const_value is not None:", "or False:"),
        ("any rank", " or len(left.shape) != 3 or len(right.shape) != 3:", ":"),
        ("broadcast", 'if all(known):\n            raise', 'if False:\n            raise'),
        ("positions first", "return (right, left) if first == {1} else (left, right)", "return left, right"),
        ("unknown beside a 1", "known.index(1 not in (one, two))", "known.index(True)"),
        ("made-up names are sizes", 'size is not None and not str(size).startswith("unk__")', "size is not None"),
        ("unknown order", "if len(first) > 1 or 2 in first:", "if len(first) > 1:"),
        ("two orders", "if len(first) > 1 or 2 in first:", "if 2 in first:"),
        ("branch first", "first.add(0 if _is_computed_from(right, left) else 1", "first.add(1 if _is_computed_from(right, left) else 0"),
        ("mean is read", "if any(value.uses() for value in norm.outputs[1:]):", "if False:"),
        ("sum is read", "len(add.outputs[0].uses()) > 1 or add.outputs[0].is_graph_output()", "add.outputs[0].is_graph_output()"),
        ("sum is an output", "len(add.outputs[0].uses()) > 1 or add.outputs[0].is_graph_output()", "len(add.outputs[0].uses()) > 1"),
        ("another operator of that name", "if norm.op_type not in _FUSED or norm.domain:", "if norm.op_type not in _FUSED:"),
        ("bias is read elsewhere", "or len(branch.uses()) != 1 or branch.is_graph_output():", "or branch.is_graph_output():"),
        ("bias of any rank", "if len(bias.shape or ()) != 1 or product", "if product"),
        ("bias that widens", "or product.shape != branch.shape:", ":"),
    ),
    f"{_FUSION}/fold_attention_bias.py": (
        ("values not moved", "(held + moved).astype", "(held + 0 * moved).astype"),
        ("a cache or a bias of its own", "if keeps_a_cache(node):", "if False:"),
        ("heads apart", "== len(value.shape) == 3 and", "== len(value.shape) and"),
        ("a reader of keys", "is_same and len(readers) == 1 else None", "is_same else None"),
        ("readers of attention", "if len(uses) == 1 and not", "if uses and not"),
        ("bias that widens", " or held.size != weight.const_value.shape[1]:", ":"),
        ("sizes not asked anew", 'if reader.op_type == "Shape":', "if False:"),
    ),
    f"{_FUSION}/pack_attention.py": (
        ("scale dropped", "for name in SHARED if", "for name in set(SHARED) - {'scale'} if"),
        ("causal dropped", "for name in SHARED if", "for name in set(SHARED) - {'unidirectional'} if"),
        ("mask dropped", "added, padding, None, bias]", "added, None, None, bias]"),
        ("score bias dropped", "added, padding, None, bias]", "added, padding, None, None]"),
        ("a cache or a bias of its own", "if keeps_a_cache(node):", "if False:"),
        ("keys of another input", "if len({id(one.activation) for one in found}) != 1:", "if False:"),
        ("quantized", 'if any(one.node.op_type != "MatMul" for one in found):', "if False:"),
        ("type that the CPU lacks", "if types != {ir.DataType.FLOAT} or activation", "if activation"),
        ("CUDA too", 'if context.target.provider != "cpu":', "if False:"),
        ("width of values", "if widths[2] != widths[0]:", "if False:"),
        ("a shared weight", "if any(len(value.uses()) != 1 or value.is_graph_output() for value in stored):", "if False:"),
        ("readers of keys", 'if any(reader.op_type != "Shape" or not is_as_wide for', 'if any(False for'),
        ("sizes of another width", 'if any(reader.op_type != "Shape" or not is_as_wide for', 'if any(reader.op_type != "Shape" for'),
        ("biases of another order", "np.concatenate(biases)", "np.concatenate(biases[::-1])"),
    ),
    f"{_FUSION}/unpack_attention.py": (
        ("scale dropped", "for name in SHARED if", "for name in set(SHARED) - {'scale'} if"),
        ("causal dropped", "for name in SHARED if", "for name in set(SHARED) - {'unidirectional'} if"),
        ("mask dropped", "operands = [*parts, None, mask, scores]", "operands = [*parts, None, None, scores]"),
        ("score bias dropped", "operands = [*parts, None, mask, scores]", "operands = [*parts, None, mask, None]"),
        ("a cache", "if inputs[_PAST] is not None or inputs[6] is not None or present:", "if present:"),
        ("a present", "if inputs[_PAST] is not None or inputs[6] is not None or present:", "if inputs[_PAST] is not None:"),
        ("rotary", "if rotary is not None and rotary.as_int():", "if False:"),
        ("no bias", "    if bias is None:\n        return", "    if False:\n        return"),
        ("bias that is given", " or bias.const_value is None:", ":"),
        ("a shared weight", "if any(value is not None and (len(value.uses()) != 1 or value.is_graph_output()) for", "if any(False for"),
        ("any mask", "if mask is not None and rank(mask) != 2:", "if False:"),
        ("any counts", "if rank(mask) == 1 and is_count else", "if rank(mask) == 1 else"),
        ("every bias is zero", "if bias.const_value.numpy()[columns].any():", "if False:"),
        ("zeros are kept", "if bias.const_value.numpy()[columns].any():", "if True:"),
        ("widths of parts", "return [total // 3] * 3 if sizes is None else list(sizes.as_ints())", "return [total // 3] * 3"),
    ),
    f"{_FUSION}/fuse_swiglu.py": (
        ("alpha", 'ir.AttrFloat32("alpha", 1.0)', 'ir.AttrFloat32("alpha", 1.702)'),
        ("alpha left to the operator", "[x], alpha, name", "[x], [], name"),
        ("sigmoid is read twice", "len(readers) != 1 or readers", "not readers or readers"),
        ("sigmoid is an output", ' or node.outputs[0].is_graph_output():', ":"),
        ("gate of another value", "if other(readers[0], node.outputs[0]) is not x:", "if other(readers[0], node.outputs[0]) is None:"),
        ("type that the CPU lacks", "if x.dtype not in (ir.DataType.FLOAT, None) and", "if False and"),
        ("CUDA has that type", ' and context.target.provider == "cpu":', ":"),
    ),
    f"{_FUSION}/fuse_gelu.py": (
        ("forms swapped", '{"Erf": "Gelu", "Tanh": "FastGelu"}', '{"Erf": "FastGelu", "Tanh": "Gelu"}'),
        ("operators inside", " and all(node.op_type in _INSIDE for node in region.nodes):", ":"),
        ("type that the CPU lacks", "if x.dtype not in (ir.DataType.FLOAT, None) and", "if False and"),
        ("other readers", "if len(readers) != 1 or readers[0].op_type not in _INSIDE or", "if not readers or readers[0].op_type not in _INSIDE or"),
        ("an output in between", " or value.is_graph_output():\n            break", ":\n            break"),
        ("soft caps are reported", 'if anchor.op_type == "Erf":', "if True:"),
    ),
    f"{_FUSION}/pack_qkv.py": (
        ("keys first", "packed = projections.pack(fuser, found,", "packed = projections.pack(fuser, found[::-1],"),
        ("other readers", "if value is not None and len(value.uses()) == 1 else None", "if value is not None else None"),
        ("obstacles ignored", "if reason is not None:", "if False:"),
        ("norms of heads", "if len(found) != 3:", "if len(found) < 1:"),
        ("cache of any origin", "if any(producer(node.inputs[place]", "if False and any(producer(node.inputs[place]"),
        ("packed already", ' or node.inputs[1] is None:', ":"),
    ),
    f"{_FUSION}/pack_gate_up.py": (
        ("up first", "parts = (gate, up)", "parts = (up, gate)"),
        ("halves swapped", "outputs = [one.output for one in parts]", "outputs = [one.output for one in parts[::-1]]"),
        ("up has other readers", "if value is not None and len(value.uses()) == 1 else None", "if value is not None else None"),
        ("another activation", " and gate.activation is up.activation:", ":"),
        ("two gates", "if len(found) == 1 else None", "if found else None"),
        ("another axis", 'ir.AttrInt64("axis", -1)', 'ir.AttrInt64("axis", 1)'),
        ("old Split", 'if model.opset_imports.get("", 18) < _SPLIT_OPSET:', "if False:"),
        ("obstacles ignored", "if reason is not None:", "if False:"),
    ),
    "compiler/projections.py": (
        ("an output", "if value is None or value.is_graph_output():", "if value is None:"),
        ("product before the bias is read", "if len(inner.uses()) != 1 or inner.is_graph_output() or", "if inner.is_graph_output() or"),
        ("product before the bias is an output", "if len(inner.uses()) != 1 or inner.is_graph_output() or", "if len(inner.uses()) != 1 or"),
        ("order of columns", "if any(one is not None for one in node.inputs[4:]):", "if False:"),
        ("bias of another width", "_sizes(bias) != [found.width] else found", "False else found"),
        ("two inputs", "if len({id(one.activation) for one in parts}) != 1:", "if False:"),
        ("one bias alone", "if len({one.bias is None for one in parts}) != 1:", "if False:"),
        ("formats", "if any(one.format != parts[0].format for one in parts):", "if False:"),
        ("weights read by others", "if any(len(value.uses()) != 1 or value.is_graph_output() for value in stored):", "if any(value.is_graph_output() for value in stored):"),
        ("weights are outputs", "if any(len(value.uses()) != 1 or value.is_graph_output() for value in stored):", "if any(len(value.uses()) != 1 for value in stored):"),
        ("rows along the other axis", 'return 1 if node.op_type == "MatMul" else 0', "return 0"),
        ("names that are taken", 'while name in taken or f"{name}.out" in taken or any(', "while False and any("),
    ),
    "compiler/packing.py": (
        ("high bits first", "<< np.uint8(slot * bits)", "<< np.uint8(8 - bits - slot * bits)"),
        ("implicit zero", "np.float32(2 ** (bits - 1)) if zero_NG is None", "np.float32(0) if zero_NG is None"),
        ("zero points dropped", "blocks_NGb -= zero", "blocks_NGb -= zero * 0"),
        ("rows not padded", "padding = -zeros_NG.shape[1] % per_byte", "padding = 0"),
        ("default block", '_int(node, "block_size", 128)', '_int(node, "block_size", 32)'),
        ("padding columns kept", "padded[:, :num_columns] = codes_NK", "padded[:, -num_columns:] = codes_NK"),
    ),
    "compiler/fusing.py": (
        ("EVERYTHING IS ACCEPTED", "self.verdicts[key] = self._compare(old, new, leaves, feeds, valid)", "self.verdicts[key] = None"),
        ("any difference", "TOLERANCE.get(dtype, 1e-4),", "1.0,"),
        ("verdicts of the old form alone", "key = old.signature(shared) + new.signature(shared)", "key = old.signature(shared)"),
        ("tables for weights", "if id(value) in held]", "if True]"),
        ("weights for tables", "if id(value) in held]", "if False]"),
        ("names lost", "            new.name = name\n", ""),
        ("graph outputs lost", "replace_all_uses_with(new, replace_graph_outputs=True)", "replace_all_uses_with(new)"),
        ("shapes lost", "new.shape, new.type = old.shape, old.type", "new.type = old.type"),
        ("leftovers in an unchanged graph", "        graph.remove(self.inserted[::-1], safe=True)\n", ""),
        ("order", "            graph.sort()\n", ""),
        ("names of other constants taken", "held.dtype == array.dtype and np.array_equal(held, array):", "True:"),
        ("division taken for a product", "return (left, 1.0 / number) if number else", "return (left, number) if number else"),
        ("any axis is the last", "return axes == [-1] or (rank is not None and axes == [rank - 1])", "return True"),
        ("several numbers are one", "value.const_value is None or value.const_value.size != 1:\n        return None\n    return float", "value.const_value is None:\n        return None\n    return float"),
        ("opset of its own", 'self.model.opset_imports.get("", 18)', "11"),
    ),
    "compiler/region.py": (
        ("tolerance", "if not worst <= tolerance:", "if worst > 1e9:"),
        ("NaN agrees", "if not worst <= tolerance:", "if worst > tolerance:"),
        ("shapes may differ", "if one.shape != two.shape:", "if False:"),
        ("attributes not in the signature", 'for name in sorted(node.attributes):', "for name in ():"),
        ("constants not in the signature", "if tensor.size <= 64 or id(value) not in ignored:", "if False:"),
        ("inputs not in the signature", "digest.update(str(number[id(value)]).encode())", "pass"),
        ("widths not in the signature", 'digest.update(f"{leaf.dtype}{_rank_and_width(leaf)}".encode())', "pass"),
        ("all inputs zero", "rng.standard_normal(sizes).astype(dtype) if is_float else", "np.zeros(sizes, dtype) if is_float else"),
        ("caches not carried over", "feed.after(want), feed.after(got)", "feed, feed"),
        ("any number of nodes", "if len(seen) > _FAR:", "if False:"),
        ("weights of any size", "if value.const_value.nbytes > _LARGEST_CONSTANT:", "if False:"),
        ("unknown shapes", 'raise NotCuttable("the shape of what it reads is unknown, so no samples can be made")\n        sizes = [\n            size', "shape = []\n        sizes = [\n            size"),
        ("outputs by another index", "outputs[self.carry[place]] if", "outputs[0] if"),
        ("sizes that matter", "if len(results) == 1 else None", "if results else None"),
    ),
    "compiler/genai.py": (
        ("past and present of other layers", "or past[0] != present[0]:", "or False:"),
        ("layers with gaps", "if key_layers != value_layers or key_layers != set(range(len(key_layers))):", "if key_layers != value_layers:"),
        ("keys without values", "if key_layers != value_layers or key_layers", "if key_layers"),
        ("two families of names", 'if len(numbers["k"]) != 1 or len(numbers["v"]) != 1:', "if False:"),
        ("cache of a Concat is shared", 'if node is None or node.op_type != "GroupQueryAttention":', "if node is None:"),
        ("past of any origin", "past is not None and past.is_graph_input() and len", "past is not None and len"),
        ("size of the past is asked", " and len(past.uses()) == 1 for past", " for past"),
        ("head size for heads", "num_heads=dims[1] if dims else None", "num_heads=dims[3] if dims else None"),
    ),
    "compiler/safetensors_file.py": (
        ("a header beyond the file", "if not 0 < length <= min(size - 8, MAX_HEADER):", "if not 0 < length:"),
        ("bytes beyond the end", "if not begin <= end <= data.size or end - begin", "if end - begin"),
        ("shared bytes", "        if begin < end:", "        if begin < end - (1 << 40):"),
        ("sizes below zero", "type(one) is int and 0 <= one < 2**48", "type(one) is int"),
    ),
    "compiler/peft.py": (
        ("the scale left out", "np.asarray(np.float32(scale) * b, np.float32)", "np.asarray(b, np.float32)"),
        ("the root of the rank left out", "alpha / math.sqrt(rank)", "alpha / rank"),
        ("a part of a name fits", 'rf"(.*\\.)?({key})$"', 'rf".*({key})$"'),
        ("biases dropped", 'if (bias := config.get("bias", "none")) != "none":', 'if (bias := config.get("bias", "none")) == "":'),
        ("whole modules dropped", "        if config.get(name):", "        if config.get(name) == 0:"),
        ("numbers that are none", "if not np.isfinite(entry[side]).all():", "if False:"),
        ("integers as floats", 'if array.dtype.kind not in "fV"', 'if array.dtype.kind not in "fVi"'),
        ("a table written as a linear", '("lora_embedding_A", "lora_embedding_B") if one.is_table', '("lora_embedding_A", "lora_embedding_B") if False'),
        ("the digest without settings", "hashlib.sha256(json.dumps(config, sort_keys=True).encode())", "hashlib.sha256()"),
    ),
    "compiler/lora_targets.py": (
        ("part of a name", 'inside = f".{module}."', 'inside = f".{module}"'),
        ("a name of another shape", "if len(own) == 1 and own[0].shape == shape:", "if own:"),
        ("groups of rows forgotten", '_GROUPED = ("bloom", "falcon", "gpt_neox", "gpt_neox_japanese")', "_GROUPED = ()"),
        ("key and value swapped", "pieces = [groups[:, :-2], groups[:, -2], groups[:, -1]]", "pieces = [groups[:, :-2], groups[:, -1], groups[:, -2]]"),
        ("experts as plain layers", "if match is None or _ELSEWHERE.search(", "if match is None or False and _ELSEWHERE.search("),
        ("tables as linears", "[one for one in targets if (one.kind in TABLE_KINDS) == is_table]", "list(targets)"),
    ),
    "compiler/lora_graph.py": (
        ("moved numbers forgotten", "if match := _TRANSFORMS.search(done):", "if match := None:"),
        ("rows of a packed matrix", "            start += rows", "            start += 0"),
        ("float16 forgotten", "    tensor = stored.weight.const_value\n    assert tensor is not None\n    return tensor.dtype", "    return ir.DataType.FLOAT"),
        ("no sum", '"Add", [end, delta], name=name)', '"Add", [end, end], name=name)'),
        ("another order of parts", "for part in parts]\n    if len(pieces) > 1:", "for part in parts[::-1]]\n    if len(pieces) > 1:"),
        ("the name of the output", "    if end.is_graph_output():", "    if False:"),
    ),
    "compiler/lora_slots.py": (
        ("another shape", "if len(shape) != 2 or shape[1 - axis] != fixed", "if len(shape) != 2"),
        ("another type", "if value.data_type() != expected:", "if False:"),
        ("two ranks", 'if len(sides) != 2 or sides["A"] != sides["B"]:', "if len(sides) != 2:"),
        ("half an adapter", 'if len(sides) != 2 or sides["A"] != sides["B"]:', 'if len(sides) == 2 and sides["A"] != sides["B"]:'),
        ("another format", "if start[4:8] != _IDENTIFIER:", "if False:"),
        ("numbers that are none", "and not np.isfinite(value.numpy()).all():", "and False:"),
    ),
    "compiler/requantize.py": (
        ("always the new grid", "take = _error(w_NK, other) < error_N", "take = error_N >= 0"),
        ("always the old grid", "take = _error(w_NK, other) < error_N", "take = error_N < 0"),
        ("long scales", "    if is_short:", "    if False:"),
        ("zero points of the old grid", "        zero[take] = other.zero[take]", "        pass"),
        ("zero points that are floats", "(len(arrays) > 2 and arrays[2].dtype != np.uint8)", "False"),
    ),
    "compiler/truncated_svd.py": (
        ("no iteration", "_ROUNDS = 6", "_ROUNDS = 0"),
        ("unequal norms", "root = np.sqrt(sizes[:rank])", "root = sizes[:rank]"),
        ("the error of nothing", "np.linalg.norm(w - b_NR.astype(np.float64)", "np.linalg.norm(0 * w + b_NR.astype(np.float64)"),
    ),
    "compiler/adapters.py": (
        ("the sign", "new.matrix(name) - before", "before - new.matrix(name)"),
        ("other weights unseen", "            found.append(name)", "            pass"),
        ("a full directory", "if path.exists() and (not path.is_dir() or any(path.iterdir())):", "if False:"),
    ),
    "compiler/roles.py": (
        ("through slots", "            if _fills_slot(node):", "            if False:"),
    ),
    "passes/low_rank/merge_lora.py": (
        ("merged twice", "        if adapter.digest in merged:", "        if False:"),
        ("into the first rows", "part = w_NK[self.start : self.start + len(self.rows)", "part = w_NK[-len(self.rows) :"),
        ("lost and not told", "        if total > self.max_loss + _ROUNDING:", "        if False:"),
        ("one at a time", "            _check(job, adapter)", "            pass"),
        ("a pair with half an update", "np.concatenate([old_second.w_NK(), b_NR], axis=1)", "np.concatenate([old_second.w_NK(), 0 * b_NR], axis=1)"),
        ("no lengths", "total *= (magnitude_N", "total *= (0 * magnitude_N + 1"),
    ),
    "passes/quantization/compensate.py": (
        ("slots mixed", "            _refuse_slots(model)", "            pass"),
        ("codes alone in the stream", "w_NK if product is None else w_NK + _multiplied(product).T", "w_NK"),
        ("in other places", "f\"{linear.name}.lora_A\": product.first_KR", "f\"{linear.name}.lora_A\": -product.first_KR"),
        ("floats counted as bytes", "(_PER_SIDE + rank * (rows + columns) * site.dtype.numpy().itemsize)", "(_PER_SIDE + rank * (rows + columns))"),
        ("codes that lean on the product", "        if self.form == \"adapter\":\n            return super()._fit(group, site_of)\n", ""),
    ),
    "passes/low_rank/lora_slots.py": (
        ("a second slot", "if any(f\"{part.target.name}.lora_A\" in model.graph.initializers for part in parts):", "if False:"),
    ),
    "runtime/adapters.py": (
        ("nothing bound", "            binding.bind_ortvalue_input(name, value)", "            pass"),
        ("unknown is none", "        if not name:\n            return NO_ADAPTER", "        if not name or name not in self._loaded:\n            return NO_ADAPTER"),
    ),
    "runtime/generate.py": (
        ("the cache of another adapter", "decoding.max_length >= length and is_same", "decoding.max_length >= length"),
    ),
    "runtime/session.py": (
        ("steps without the adapter", "        self.adapter.bind(binding)\n        self._bind_step_inputs(binding)", "        self._bind_step_inputs(binding)"),
        ("prompts without the adapter", "        self.adapter.bind(binding)\n        held =", "        held ="),
        ("whole sequences without the adapter", "        self.adapters.find(adapter).bind(binding)\n", ""),
    ),
    f"{_QUANTIZATION}/mixed.py": (
        ("never priced anew", "            self._reprice(items, model, context)", "            pass"),
        ("another probe", "[item.probe, *item.formats]", "[item.formats[0], *item.formats]"),
        ("tables fitted too", "for site in item.sites if not site.embeddings]", "for site in item.sites]"),
        ("more text than asked for", "tokens = min(self.tokens, _FITTING_TOKENS)", "tokens = _FITTING_TOKENS"),
        ("windows longer than the text", "length=min(self.length, tokens)", "length=self.length"),
        ("few tokens say as much", "Fitted.damping * max(1.0, _FITTING_TOKENS / tokens)", "Fitted.damping"),
        ("unknown errors are none", "if len(known) < len(item.sites) or not item.cost:", "if not known or not item.cost:"),
        ("rounding of the first alone", "before = sum(one for one, _ in known)", "before = known[0][0]"),
        ("fitting of the first alone", "sum(after[index] for _, after in known)", "known[0][1][index]"),
        ("fitting leaves everything", "Option(item.cost * sum(after[index] for _, after in known) / before, option.nbytes)", "option"),
        ("bytes of the first format", "/ before, option.nbytes)", "/ before, item.options[0].nbytes)"),
        ("gate and up apart", '"gate": "gate_up", "up": "gate_up"', '"gate": "gate"'),
        ("a free probe", "_PROBE if _error(item, _PROBE) > _EXACT else item.formats[0]", "_PROBE"),
    ),
    f"{_QUANTIZATION}/_mixed.py": (
        ("scales cannot be chosen", '{**OVERRIDABLE, "scales": ("max", "mse")}', "OVERRIDABLE"),
        ("nothing rounded", "return rounded(sites, context, self.name())", "return rounded([], context, self.name())"),
    ),
    f"{_QUANTIZATION}/_fitted_errors.py": (
        ("not relative", " / energy if energy > 0 else 0.0", ""),
        ("of the weights, not the outputs", "return least_squares.quadratic(np.ascontiguousarray(error_KN), moments.plain_KK)", "return float(np.vdot(error_KN, error_KN))"),
        ("damping ignored", "Moments(group.stats.hessian_KK, damping)", "Moments(group.stats.hessian_KK, 0.01)"),
        ("rounded in a format to fit", "**rounded._asdict()", "**fitted[0]._asdict()"),
        ("rounding for fitting", "error_KN = steps_KN * grid.spread(grid.scale_GN, len(steps_KN)) - w_NK.T", "error_KN = plain.T - w_NK.T"),
        ("numbers that are none", "if not is_finite(group):", "if False:"),
        ("the last reader tells", "found.setdefault(id(site_of[id(linear)]), (before, after))", "found[id(site_of[id(linear)])] = before, after"),
    ),
    f"{_QUANTIZATION}/_calibrated.py": (
        ("falls back unasked", "            if not self.fallback:\n                raise\n", ""),
        ("random tokens are text", "if wanted and self.fallback:", "if False:"),
        ("fallback without a word", "            report.notes.append(f\"rounded to the nearest, not", "            str(f\"rounded to the nearest, not"),
        ("fitted codes rounded again", "for site in sites if id(site) in found for linear", "for site in sites[:0] for linear"),
        ("fallback rounds nothing", "for site in sites if id(site) in found for linear", "for site in sites for linear"),
        ("what is not finite is rounded", "if id(site) not in unfit and not any(", "if not any("),
        ("what is not finite is fitted", "elif is_finite(group):", "elif True:"),
        ("left out without a word", 'report.skip(site.name, "its activation is not finite on the calibration text")', "pass"),
        ("scarcity no reason to damp", "self.damping * scarcity", "self.damping"),
        ("scarcity no reason for a ridge", "self.ridge * scarcity", "self.ridge"),
        ("no teacher", "if not self.teacher or group.stats.drift_KK is None:", "if True:"),
        ("always a teacher", "if not self.teacher or group.stats.drift_KK is None:", "if group.stats.drift_KK is None:"),
        ("a sum for a mean", "group.stats.drift_KK / group.stats.count", "group.stats.drift_KK"),
        ("targets of no use", "w_KN if correction_KK is None else w_KN + correction_KK @ w_KN", "w_KN"),
        ("targets turned over", "w_KN + correction_KK @ w_KN", "w_KN + correction_KK.T @ w_KN"),
        ("targets the wrong way", "w_KN + correction_KK @ w_KN", "w_KN - correction_KK @ w_KN"),
        ("errors do not travel", "group.replace(linear, coded.w_NK())", "pass"),
        ("the last reader decides", "coded = found.setdefault(id(site_of[id(linear)]), coded)", "found[id(site_of[id(linear)])] = coded"),
    ),
    "compiler/stats.py": (
        ("one token a feature is enough", "_TOKENS_PER_FEATURE = 5", "_TOKENS_PER_FEATURE = 1"),
        ("never scarce", "return max(1.0, _TOKENS_PER_FEATURE * self.num_in / max(self.count, 1))", "return 1.0"),
        ("more than enough", "return max(1.0, _TOKENS_PER_FEATURE * self.num_in / max(self.count, 1))", "return _TOKENS_PER_FEATURE * self.num_in / max(self.count, 1)"),
    ),
    "passes/pruning/prune.py": (
        ("the first choice stands", "_TRIES = 4", "_TRIES = 1"),
        ("protected sublayers go", "if index in free and not self._excluded(part.name):", "if not self._excluded(part.name):"),
        ("excluded sublayers go", "if index in free and not self._excluded(part.name):", "if index in free:"),
        ("layers of the old numbers", "if one.reader.output.name not in removed]", "]"),
        ("sublayers cost nothing", "options.append((costs.get(index, 0.0), gain, 0))", "options.append((0.0, gain, 0))"),
        ("attention saves what feed-forward does", "savings.attention if parts[index].has_attention else savings.feed_forward", "savings.feed_forward"),
        ("out of reach unsaid", "if most < needed:", "if False:"),
        ("missed unsaid", "if missed and self.kl is None:", "if False:"),
        ("noise is a saving", "if savings.best <= _SURE * savings.error or most <= 0:", "if most <= 0:"),
        ("costs worked out again", "record = section.read(str(index), digest)", "record = None"),
    ),
    "passes/pruning/_savings.py": (
        ("nothing follows", "if self.then:", "if False:"),
        ("channels stay in the variant", "if count < one.total:", "if False:"),
        ("sublayers stay in the variant", "if plan.gone:", "if False:"),
        ("all of a kind for one", "plans.append((kind, Plan(half), len(half)))", "plans.append((kind, Plan(half), 1))"),
        ("upside down", "seconds[id(other)] / seconds[id(whole)]", "seconds[id(whole)] / seconds[id(other)]"),
    ),
    "passes/pruning/_channel_walk.py": (
        ("outputs of the model may shrink", "for value in model.graph.outputs:\n        if (last := found.of(value))", "for value in []:\n        if (last := found.of(value))"),
        ("a shared matrix comes apart", "            if len(known) == len(labels):\n                self.join(known, labels)", "            if len(known) == len(labels):\n                pass"),
        ("sizes are not compared", "sizes[axis] in (None, len(labels))", "True"),
        ("copies of a matrix come apart", "(id(origin(value)), axis, role)", "(id(value), axis, role)"),
    ),
    "passes/pruning/_channel_rules.py": (
        ("a second input is overlooked", 'walk.freeze(state.labels, blame(node, "reads them beside what it works on"))', "pass"),
        ("indices may be an output", "one.uses() or one.is_graph_output() for one", "one.uses() for one"),
        ("a gate hands on too few", "    if len(labels) > 1 or all(", "    if True or all("),
        ("what is added need not shrink", "            walk.join(labels, state.labels)", "            pass"),
        ("groups lose different channels", "        walk.join(parts[0], part)", "        pass"),
        ("depthwise keeps its groups", "    walk.edit(state.labels, regroup)", "    pass"),
        ("Softmax over channels", "if axis == state.axis or (walk.opset < 13 and state.axis > axis):", "if walk.opset < 13 and state.axis > axis:"),
    ),
    "passes/pruning/_channel_moves.py": (
        ("a half may be emptied", "    walk.parts += parts", "    pass"),
        ("a shared target changes for all", 'or len(value.uses()) > 1 or value', "or value"),
        ("Flatten repeats in the wrong order", "np.repeat(np.tile(state.labels, wide // count), repeats)", "np.tile(np.tile(state.labels, wide // count), repeats)"),
        ("Reshape keeps its target", "        walk.edit(moved.labels, resize)", "        pass"),
        ("a reader of sizes is overlooked", "    walk.freeze(state.labels, blame(node, \"reads their number\"))", "    pass"),
        ("mean over channels", "    if state.axis in gone:\n        walk.freeze(state.labels, blame(node, \"mixes them\"))", "    if False:\n        walk.freeze(state.labels, blame(node, \"mixes them\"))"),
    ),
    "passes/pruning/_channel_readers.py": (
        ("dilations ignored", "np.arange(self.kernel[axis]) * dilations[axis]", "np.arange(self.kernel[axis])"),
        ("padding on the wrong side", 'if name == "SAME_UPPER" else (more, less)', 'if name == "SAME_LOWER" else (more, less)'),
    ),
    "passes/pruning/_channel_fit.py": (
        ("one window has no judge", "        turn = min(_HELD_OUT, self.batch)", "        turn = self.batch + 1"),
        ("the scale of a bias is overlooked", "(reader.scales[1] * added)", "added"),
        ("one reader decides", "costs = np.sum([one.costs(kept) for one in parts], axis=0)", "costs = parts[0].costs(kept)"),
        ("a fit that does not help is kept", "    if not error < judging.energy:", "    if False:"),
        ("no bias is fitted", "        moved.append(d_NK[:, -1] if with_bias", "        moved.append(d_NK[:, -1] * 0 if with_bias"),
        ("means are taken for variance", "        return shrunk(second - np.outer(mean_K, mean_K), self.count)", "        return shrunk(second, self.count)"),
    ),
    "passes/pruning/_channel_groups.py": (
        ("new biases are not counted", "        if _is_bare(one.node) and one.bias() is not None", "        if False"),
        ("declared shapes stay", "                sizes[channels.axis] = int(alive(channels.labels).sum())", "                pass"),
        ("worth by nothing", "            worth += np.array(", "            worth += 0 * np.array("),
    ),
    "compiler/calibration_arrays.py": (
        ("NaN goes in", "np.isnan(array).any()", "False"),
        ("nothing is held out", "        left = np.arange(max(batch, total - self._held(total)))", "        left = np.arange(total)"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One guard that is broken: in `file`, `old` becomes `new`, and `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def obstacle(self, root: Path = ROOT) -> str | None:
        """Why it cannot be applied; None when `old` occurs exactly once."""
        count = (root / self.file).read_text(encoding="utf-8").count(self.old)
        return None if count == 1 else f"{self.file}: {self.name}: the old text occurs {count} times, expected 1"


def mutations() -> list[Mutation]:
    """All of them, in the order of the table."""
    return [Mutation(name, file, old, new, TESTS[file]) for file, rows in MUTATIONS.items() for name, old, new in rows]


def copy_of_repository(target: Path) -> None:
    """The packages below one name, as they install, and the tests: imported from there, whatever is installed."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "onnxpress", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "benchmarks"):
        (shutil.copy if (ROOT / name).is_file() else shutil.copytree)(ROOT / name, target / name)
    for name in PACKAGES:
        (target / "onnxpress" / name).symlink_to(target / name)


def fails(tests: tuple[str, ...], root: Path) -> bool:
    """Whether `tests` fail in the copy at `root`; a run without end counts as a failure."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return True
    if done.returncode > 1:  # no test ran; below 0 the process crashed, which a test may well find
        raise SystemExit(f"pytest {' '.join(tests)} returned {done.returncode}:\n{done.stdout.decode()[-2000:]}")
    return done.returncode != 0


def run(chosen: list[Mutation], root: Path) -> Iterator[tuple[Mutation, bool, float]]:
    """(mutation, whether a test noticed, seconds), one after the other, in the copy at `root`."""
    for tests in dict.fromkeys(one.tests for one in chosen):
        if fails(tests, root):
            raise SystemExit(f"{' '.join(tests)}: fails without a mutation")
    for one in chosen:
        path, started = root / one.file, time.perf_counter()
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(one.old, one.new), encoding="utf-8")
        try:
            is_killed = fails(one.tests, root)
        finally:
            path.write_text(text, encoding="utf-8")
        yield one, is_killed, time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations whose file or name contains TEXT")
    only: str = parser.parse_args().only
    chosen = [one for one in mutations() if only in f"{one.file}: {one.name}"]
    obstacles = [reason for one in chosen if (reason := one.obstacle()) is not None]
    if obstacles or not chosen:
        print("\n".join(obstacles) or f"no mutation contains {only!r}", file=sys.stderr)
        return 1
    table, survivors = Table("file", "mutation", "result", "seconds"), 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder) / "repository"
        root.mkdir()
        copy_of_repository(root)
        for one, is_killed, seconds in run(chosen, root):
            result = "killed" if is_killed else "SURVIVED"
            survivors += not is_killed
            print(f"{result}  {one.file}: {one.name}", file=sys.stderr, flush=True)
            table.add_row(one.file, one.name, result, f"{seconds:.1f}")
    Console().print(table)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
