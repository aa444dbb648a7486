"""How much memory a training step takes, found without taking it.

The step runs on tensors that have shapes and types but no data, and every piece of memory that a
real one would take is counted while something still refers to it. So batch-norm groups, the casts
of autocast and what autograd keeps are those of the real step, at any batch, in a second.

Not counted, because only a GPU knows them: CUDA's own context, the workspaces of cuDNN, the pools
of DALI, and what the allocator cannot use between its blocks.

Letters in names: N pictures of one process, H W pixels.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from model.dictionary import Comparison, Dictionary
from model.encoder import EncoderConfig
from model.mechanism import ENCODERS
from model.micro_batches import MicroBatches
from model.moco import MoCoConfig, QueryEncoder, groups_per_process
from model.optimiser import make_optimiser
from model.run_state import flatten_optimiser
from model.schedule import OptimiserConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LiveBytes(TorchDispatchMode):
    """Counts the memory that operations inside it make, as long as it is referred to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out tensors that were there before."""
        for tensor in tensors:
            self._watch(tensor, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda made: self._watch(made, _storage_bytes(made)), result)
        return result

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._known:
            # PyTorch keeps the Python object of a storage for as long as the storage itself.
            end = weakref.finalize(storage, self._drop, id(storage), size)
            end.atexit = False
            self._known[id(storage)] = end
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def network_of_process(
    encoder: EncoderConfig,
    moco: MoCoConfig,
    batch: int,
    processes: int,
    image_px: int,
    micro_batch: int | None = None,
) -> QueryEncoder:
    """The encoders as one of so many processes has them, without data.

    Statistics over all processes take the memory of plain ones, so those stand for them.

    Args:
        encoder: the network.
        moco: the method.
        batch: pictures of a step, all processes together.
        processes: that share it.
        image_px: side of the views.
        micro_batch: pictures that may go through an encoder at once; None: all of a process.

    Raises:
        ValueError: if the batch-norm groups or the pictures cannot be shared out so.
    """
    groups = groups_per_process(moco, batch, processes)
    alone = replace(
        moco, batch_norm="split" if groups > 1 else "none", batch_norm_groups=max(groups, 1)
    )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return ENCODERS[moco.mechanism](
            replace(encoder, weights=None), alone, batch // processes, 0, image_px, micro_batch
        )


def peak_of_step(network: QueryEncoder, pictures: int, image_px: int, precision: str) -> int:
    """Bytes that forward and backward pass take at the most, gradients included.

    Without weights, optimiser and views, which are there all the time, and without the loss, which
    is small because it keeps no logits.

    Args:
        network: without data, of ``network_of_process``; has CPU tensors without data afterwards.
        pictures: of this process in a step (N), in the network's micro-batches.
        image_px: side of the views.
        precision: of train.py: no, bf16 or fp16.

    Returns:
        For moco-v2 at 32 pictures of 224 px 2.9 GiB in float32, 1.5 GiB in bfloat16.
    """
    # Meta tensors know no autocast, so the step runs on what PyTorch takes for a CPU; which
    # operations are cast differs little there from a GPU (layer norm stays in half precision).
    dtype = AUTOCAST.get(precision)
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        views = [torch.empty(pictures, 3, image_px, image_px) for _ in range(2)]
        live.ignore([*network.parameters(), *network.buffers(), *views])
        autocast = partial(torch.autocast, "cpu", dtype, enabled=dtype is not None)
        wrapped = autocast()(network)
        with live:
            MicroBatches(wrapped, network, Products(), 1.0, autocast=autocast).run(views, None, 0)
    return live.peak


class Products(Dictionary):
    """A loss that takes no memory, and through which queries, and keys that can, get a gradient."""

    def comparison(
        self,
        keys: Sequence[Tensor],
        temperature: float,  # noqa: ARG002
        sample_N: Any,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> Comparison:
        """Each query times its own key."""

        def compare(queries: Sequence[Tensor], own: slice) -> tuple[Tensor, Tensor]:
            pairs = zip(queries, keys, strict=True)
            total = torch.stack([(query * key[own]).sum() for query, key in pairs]).sum()
            return total, total.detach()

        return compare


def optimiser_state(config: OptimiserConfig, network: QueryEncoder) -> int:
    """Bytes that the optimiser keeps between steps: those that it has after a step without data."""
    for parameter in network.trained_parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = make_optimiser(config, network.parameters())
    for group in optimizer.param_groups:
        group["fused"] = False  # no fused kernel is for tensors without data
    optimizer.step()
    optimizer.zero_grad()
    tensors, _ = flatten_optimiser(optimizer)
    return bytes_of(tensors.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors that share none."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
