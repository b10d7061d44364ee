"""What Inductor makes for the pretended H100, kernel by kernel, while nothing is computed.

A compiled graph answers with fake tensors of the shapes that it would give, so a whole training step can run
through regions that are compiled and code between them that is not, and both are counted.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree

FUSED = ("pointwise", "reduction")  # kinds of kernels that Inductor writes itself, and that only move bytes


@dataclass(frozen=True)
class Kernel:
    """A kernel of a compiled graph.

    Attributes:
        kind: of FUSED, "template" (flex attention), "triton" (of ours), or "extern" (a library's, or an
            operator of ours that Inductor does not look into).
        name: of an extern kernel or a Triton kernel of ours, else "".
        bytes: read and written, each tensor once.
        origins: operators that it was fused from.
    """

    kind: str
    name: str
    bytes: int
    origins: str


@dataclass
class Graph:
    """A graph that was compiled: its kernels, and how often it was called in which phase."""

    kernels: list[Kernel]
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class Watch:
    """The graphs compiled so far.

    Attributes:
        graphs: in the order of their making.
        phase: under which calls are filed from here on.
        cubins: of each Triton kernel, where they are assembled: one a configuration that is tried on a GPU,
            and bytes of its shared memory.
    """

    graphs: list[Graph] = field(default_factory=list)
    phase: str = ""
    cubins: dict[tuple[int, str], list[tuple[bytes, int]]] = field(default_factory=dict)


@functools.cache
def watched(assemble: bool = False) -> Watch:
    """Watch what this process compiles from here on; it can run no compiled code any more.

    Args:
        assemble: compile the Triton kernels down to cubins as well, which takes most of the time.
    """
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config as config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    watch = Watch()
    config.shape_padding = False  # it would measure products
    config.compile_threads = 1
    config.force_disable_caches = True
    config.use_static_triton_launcher = False  # it drops a kernel's code
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if not assemble:
        AsyncCompile.triton = lambda self, *args, **options: None  # type: ignore[method-assign]
        AsyncCompile.wait = lambda self, scope: None  # type: ignore[method-assign]
    lower, build = GraphLowering._compile_to_module, CompiledFxGraph.__init__
    assembled = CachingAutotuner._precompile_config

    def lowered(self: Any) -> Any:
        module = lower(self)
        self.watched = Graph([kernel for node in self.scheduler.nodes if (kernel := _kernel_of(node))])
        watch.graphs.append(self.watched)
        return module

    def built(self: Any, compiled: Any, graph: Any, *args: Any, **options: Any) -> None:
        build(self, compiled, graph, *args, **options)
        output = next(node for node in reversed(graph.orig_gm.graph.nodes) if node.op == "output")
        nodes = _pytree.tree_leaves(output.args[0])
        self.watched = graph.watched, [n.meta["val"] if isinstance(n, torch.fx.Node) else n for n in nodes]

    def called(self: Any, inputs: Any) -> Any:
        graph, values = self.watched
        graph.calls[watch.phase] += 1
        if isinstance(inputs, list):
            inputs.clear()  # as a compiled graph does, so that activations are freed
        return [_empty_like(value) if isinstance(value, torch.Tensor) else value for value in values]

    def precompiled(self: Any, config: Any) -> Any:
        result = assembled(self, config)
        kernel = result.kernel
        found = watch.cubins.setdefault((id(self), self.fn.__name__), [])
        found.append((kernel.asm["cubin"], kernel.metadata.shared))
        return result

    GraphLowering._compile_to_module = lowered  # type: ignore[method-assign]
    CompiledFxGraph.__init__ = built  # type: ignore[method-assign]
    CompiledFxGraph.__call__ = called  # type: ignore[method-assign]
    CachingAutotuner._precompile_config = precompiled  # type: ignore[method-assign]
    return watch


def _empty_like(value: torch.Tensor) -> torch.Tensor:
    size, stride = [int(n) for n in value.size()], [int(n) for n in value.stride()]
    return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)


def _kernel_of(node: Any) -> Kernel | None:
    """The kernel of a node of Inductor's schedule, or None where it launches nothing."""
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    if isinstance(node, NopKernelSchedulerNode):
        return None
    origins = sorted({_operator(o) for n in node.get_nodes() for o in getattr(n.node, "origins", None) or ()})
    if not isinstance(node, ExternKernelSchedulerNode):
        is_template = any(n.is_template() for n in node.get_nodes())
        kind = "template" if is_template else "reduction" if node.is_reduction() else "pointwise"
        return Kernel(kind, "", node.get_read_write_buffers_sizes(), " ".join(origins))
    if isinstance(node.node, ir.MultiOutput | ir.MutationOutput):
        return None
    if isinstance(node.node, ir.UserDefinedTritonKernel):
        name = node.node.get_kernel_and_metadata()[0].fn.__name__
        return Kernel("triton", name, _bytes_of(node), " ".join(origins))
    overload = getattr(node.node, "op_overload", None)
    name = str(overload or node.node.get_kernel_name()).removeprefix("extern_kernels.")
    return Kernel("extern", name, _bytes_of(node), " ".join(origins))


def _operator(origin: Any) -> str:
    parts = str(origin.target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _bytes_of(node: Any) -> int:
    """Bytes of the tensors that an opaque kernel takes and gives; of what it changes in place, twice.

    A buffer that nobody has written before is only written.
    """
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    scheduler = node.scheduler
    changed = set(node.node.get_mutation_names())
    reads = {dep.name for dep in node.read_writes.reads}
    total = 0
    for name in reads | changed:
        buffer = V.graph.name_to_buffer.get(name) or V.graph.graph_inputs.get(name)
        writer = scheduler.name_to_buf.get(name)
        is_new = writer is not None and isinstance(writer.defining_op, NopKernelSchedulerNode)
        total += _size(buffer) * ((name in changed) + (name in reads and not is_new))
    for written in node.get_outputs():
        if written.get_name() not in changed:
            total += _outputs_size(scheduler, written)
    return total


def _outputs_size(scheduler: Any, written: Any) -> int:
    """Bytes of what a kernel allocates and fills, one tensor or several."""
    from torch._inductor import ir

    buffer = written.node
    if isinstance(buffer.layout, ir.MultiOutputLayout):
        users = (getattr(user.node, "node", None) for user in written.users)
        return sum(_size(user) for user in users if isinstance(user, ir.MultiOutput))
    return 0 if isinstance(buffer.layout, ir.NoneLayout) else _size(buffer)


def _size(buffer: Any) -> int:
    from torch._inductor.virtualized import V

    if buffer is None:
        return 0
    count = 1
    for side in buffer.get_size():
        count *= V.graph.sizevars.optimization_hint(side, fallback=0)
    return count * buffer.get_dtype().itemsize  # type: ignore[no-any-return]
