"""Rewrites of an exported graph: constants are computed now, operators that change nothing are removed."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
_NOTHING = {
    aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default, aten.to.dtype,
    aten._to_copy.default, aten.contiguous.default, aten.expand.default, aten.dropout.default, aten.clone.default,
    aten.pad.default, aten.constant_pad_nd.default,
}  # fmt: skip
_SILU = {aten.silu.default, aten.silu_.default}
_RESHAPES = {aten.view.default, aten.reshape.default}


def tidy(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Fold what depends on no input, drop operators without effect, compute repeated ones once; changed in place."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    from edge_ibtm.rewrite_share import share

    if _writes_constants(program) or _writes_what_is_read(program.graph):  # the order of writing and reading would be lost
        program = program.run_decompositions({})
    drop_no_ops(program.graph_module)
    activate_first(program.graph_module)
    add_as_bias(program.graph_module)
    with torch.no_grad():
        program = constant_prop_pass(program)
        drop_ones(program)
        program = share(program)
    fold_reshapes(program.graph_module)
    return program


def _writes_constants(program: torch.export.ExportedProgram) -> bool:
    """Whether an operator writes in place what was computed from no input, as a mask that is filled window by window."""
    from edge_ibtm.rewrite_share import written_values

    computed: set[Node] = set()
    for node in program.graph.nodes:
        if node.name in program.graph_signature.user_inputs or computed.intersection(node.all_input_nodes):
            computed.add(node)
    return any(node not in computed for node in written_values(program.graph))


def _writes_what_is_read(graph: torch.fx.Graph) -> bool:
    """Whether an operator writes in place what another one reads too."""
    from edge_ibtm.rewrite_share import written_by

    return any(value is not node and len(value.users) > 1 for node in graph.nodes for value in written_by(node))


def own_constants(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Give every constant that is a view of a part of a tensor memory of its own; changed in place.

    XNNPACK would write the beginning of the whole tensor into the file (executorch 1.5.1).
    """
    signature = program.graph_signature
    names = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers, **signature.inputs_to_parameters}
    for node in program.graph.find_nodes(op="placeholder"):
        for known in (program.constants, program.state_dict):
            value = known.get(names.get(node.name, ""))
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() != value.nbytes:
                own = value.detach().clone(memory_format=torch.contiguous_format)
                known[names[node.name]] = torch.nn.Parameter(own) if isinstance(value, torch.nn.Parameter) else own
                node.meta["val"] = node.meta["val"].clone(memory_format=torch.contiguous_format)
    return program


def drop_no_ops(module: GraphModule) -> None:
    """Remove copies, detaches, casts and expands whose output equals their input, and assertions on metadata."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in _NOTHING and _same(node, node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    module.recompile()


def activate_first(module: GraphModule) -> None:
    """Apply a SiLU before the permutations and reshapes of what it reads, so that those meet the ones behind it; in place."""
    graph = module.graph
    for node in [n for n in graph.nodes if n.target in _SILU]:
        first = node
        while _moves(first.args[0]):
            first = first.args[0]
        if first is node:
            continue
        with graph.inserting_before(first):
            gate = graph.call_function(aten.silu.default, (first.args[0],))
        gate.meta = {**node.meta, "val": first.args[0].meta["val"]}
        first.replace_input_with(first.args[0], gate)
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    module.recompile()


def add_as_bias(module: GraphModule) -> None:
    """Let products of tokens without a bias add the number that is added to their output (a norm's eps); in place."""
    graph = module.graph
    for node in [n for n in graph.nodes if n.target is aten.add.Tensor and not n.kwargs]:
        layer, number = node.args if isinstance(node.args[0], Node) else node.args[::-1]
        if not isinstance(number, (int, float)) or len(layer.users) > 1:
            continue
        matrices = layer.target is aten.matmul.default and all(a.meta["val"].ndim == 2 for a in layer.args)
        if not matrices and (layer.target is not aten.linear.default or layer.args[2:] not in ((), (None,))):
            continue
        value = layer.meta["val"]
        with graph.inserting_before(layer):
            kind = {"dtype": value.dtype, "device": value.device}
            bias = graph.call_function(aten.full.default, ([value.shape[-1]], float(number)), kind)
        bias.meta["val"] = value.new_empty(value.shape[-1:])
        layer.args = (bias, *layer.args) if matrices else (*layer.args[:2], bias)
        layer.target = aten.addmm.default if matrices else layer.target
        node.replace_all_uses_with(layer)
        graph.erase_node(node)
    module.recompile()


def _moves(node: Any) -> bool:
    """Whether a value is another one's permutation or reshape that one operator reads."""
    return isinstance(node, Node) and node.target in {*_RESHAPES, aten.permute.default} and len(node.users) == 1


def drop_ones(program: torch.export.ExportedProgram) -> None:
    """Remove products with constants of ones, the sizes of tokens that have not merged yet; changed in place."""
    from edge_ibtm.rewrite_share import constants_of

    graph = program.graph
    ones = {node for node, value in constants_of(program).items() if bool((value == 1).all())}
    for node in list(graph.nodes):
        if node.target is not aten.mul.Tensor:
            continue
        for factor, other in (node.args, node.args[::-1]):
            if factor in ones and _same(node, other):
                node.replace_all_uses_with(other)
                graph.erase_node(node)
                break
    program.graph_module.recompile()


def fold_reshapes(module: GraphModule) -> None:
    """Reshape a reshaped value from its origin where nothing else reads the step between; drop those that change nothing.

    In XNNPACK a reshape is free only where nothing else reads its input and one operator its output; else it is a copy.
    """
    from edge_ibtm.rewrite_share import aliases, written_values

    graph = module.graph
    written = set(written_values(graph))
    for node in list(graph.nodes):
        if node.op == "call_function" and aliases(node) and written.intersection(node.all_input_nodes):
            written.add(node)
        if node.target not in _RESHAPES or node in written:
            continue
        steps = [node]
        while steps[-1].target in _RESHAPES and steps[-1].args[0] not in written:
            steps.append(steps[-1].args[0])
        same = next((step for step in steps[1:] if _same(node, step)), None)
        origin = next((step for step in steps[1:] if step.target not in _RESHAPES or len(step.users) > 1), steps[-1])
        if same is not None:
            node.replace_all_uses_with(same)
            _erase_unused(graph, node)
        elif origin not in (node, node.args[0]):
            between, node.args = node.args[0], (origin, *node.args[1:])
            node.target = aten.reshape.default
            _erase_unused(graph, between)
    module.recompile()


def _erase_unused(graph: torch.fx.Graph, node: Node) -> None:
    while not node.users and node.target in _RESHAPES:
        source = node.args[0]
        graph.erase_node(node)
        node = source  # type: ignore[assignment]


def _same(node: Node, source: Any) -> bool:
    mine, its = node.meta.get("val"), source.meta.get("val") if isinstance(source, Node) else None
    if mine is None or its is None:
        return False
    return mine.shape == its.shape and mine.dtype == its.dtype and mine.stride() == its.stride()


def pads_as_concatenations(module: GraphModule) -> None:
    """Write padding with zeros as a concatenation; in place.

    A pad that quantization put between 8-bit values does not load in XNNPACK 1.5.1 ("Failed to create StaticConstantPad").
    """
    graph = module.graph
    for node in list(graph.nodes):
        how = dict(zip(("mode", "value"), node.args[2:]))
        if node.target is not aten.pad.default or how.get("mode", "constant") != "constant" or how.get("value"):
            continue
        value, shape = node.args[0], list(node.args[0].meta["val"].shape)
        with graph.inserting_before(node):
            for i, amounts in enumerate(zip(node.args[1][::2], node.args[1][1::2])):
                axis = len(shape) - 1 - i
                parts = [_zeros(module, node, [*shape[:axis], n, *shape[axis + 1 :]]) for n in amounts]
                joined = [parts[0], value, parts[1]]
                value = graph.call_function(aten.cat.default, ([p for p in joined if p is not None], axis))
                shape[axis] += sum(amounts)
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    module.recompile()


def split_silu(module: GraphModule) -> None:
    """Write every SiLU as its sigmoid and a product; in place."""
    graph = module.graph
    for node in [n for n in graph.nodes if n.target in _SILU]:
        x = node.args[0]
        with graph.inserting_before(node):
            gate = graph.call_function(aten.sigmoid.default, (x,))
            product = graph.call_function(aten.mul.Tensor, (x, gate))
        gate.meta, product.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    module.recompile()


def _zeros(module: GraphModule, node: Node, shape: list[int]) -> Node | None:
    if 0 in shape:
        return None
    name = "zeros_" + "_".join(map(str, shape))
    if not hasattr(module, name):
        module.register_buffer(name, torch.zeros(shape, dtype=node.meta["val"].dtype))
    made = module.graph.get_attr(name)
    made.meta["val"] = node.meta["val"].new_empty(shape)
    return made
