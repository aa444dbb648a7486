"""The CUDA kernel of the loss: its arithmetic in Triton's interpreter, its size by the compiler.

Triton reads TRITON_INTERPRET when it is imported, so that test has a process of its own.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.info_nce import info_nce_with_accuracy
from tests.warm_python import warm_python

pytest.importorskip("triton", reason="no Triton for this platform: the loss runs in chunks")

ROOT = Path(__file__).resolve().parents[1]
# N, D, K, temperature, type of the queue: parts that are not full, one row, D that is no power of 2
CASES = [
    (1, 16, 1, 0.2, torch.float32),
    (3, 48, 5, 0.07, torch.float32),
    (33, 128, 300, 0.07, torch.float32),
    (40, 128, 1000, 0.2, torch.bfloat16),
    (35, 256, 65, 0.005, torch.float32),
    (35, 64, 200, 10.0, torch.float32),
]
SHARED_MEMORY_BYTES = 99 * 1024  # of the smallest cards that PyTorch supports with tf32

IN_INTERPRETER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from tests.test_info_nce_triton import CASES, require_equal_to_float64
from model import info_nce
from model.info_nce_triton import triton_sums
info_nce._form_for = lambda device, dim: triton_sums
for case in CASES:
    require_equal_to_float64(case, torch.device("cpu"))
"""

COMPILED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.info_nce_triton import kernel_options, sums_kernel
torch.cuda.get_device_capability = lambda device: (9, 0)
names = [name for name in sums_kernel.arg_names if name.islower()]
types = {{name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}}
for capability in (80, 90):
    for dim, queue_type in ((128, "*fp32"), (128, "*bf16"), (256, "*fp32")):
        options = kernel_options(dim, torch.device("cuda"))
        constants = {{name: options.pop(name) for name in list(options) if name.isupper()}}
        signature = {{**types, "queue_ptr": queue_type, **dict.fromkeys(constants, "constexpr")}}
        source = ASTSource(sums_kernel, signature, constants)
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(kernel.metadata.shared)
"""


def unit_rows(rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def require_equal_to_float64(case, device):
    """Loss, gradient and accuracy of ``info_nce`` against the definition."""
    n, d, k, temperature, dtype = case
    query_ND = unit_rows(n, d, 1)
    key_ND = F.normalize(query_ND + unit_rows(n, d, 2), dim=1)
    queue_KD = unit_rows(k, d, 3).to(dtype)
    exact_ND = query_ND.double().requires_grad_()
    positive_N1 = (exact_ND * key_ND.double()).sum(dim=1, keepdim=True)
    logits_NC = torch.cat([positive_N1, exact_ND @ queue_KD.double().T], dim=1) / temperature
    exact = F.cross_entropy(logits_NC, torch.zeros(n, dtype=torch.long))
    exact.backward()
    query_ND = query_ND.to(device).requires_grad_()
    loss, accuracy = info_nce_with_accuracy(
        query_ND, key_ND.to(device), queue_KD.to(device), temperature
    )
    loss.backward()
    rounding = {"rtol": 1e-5, "atol": 1e-6 / temperature}
    torch.testing.assert_close(loss.double().cpu(), exact.detach(), **rounding)
    torch.testing.assert_close(query_ND.grad.double().cpu(), exact_ND.grad, **rounding)
    right_N = logits_NC[:, 0] > logits_NC[:, 1:].amax(dim=1)
    assert math.isclose(accuracy.item(), right_N.double().mean().item(), rel_tol=1e-6)


def run(python, code, tmp_path, **environment):
    """The output of a Python process, which must succeed."""
    done = subprocess.run(
        [*python, "-c", code],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_equals_the_definition_in_float64(tmp_path):
    run([sys.executable], IN_INTERPRETER, tmp_path, TRITON_INTERPRET="1")


def test_the_kernel_compiles_without_a_gpu_and_fits_small_cards(tmp_path):
    shared = [int(line) for line in run(warm_python(), COMPILED, tmp_path).split()]
    assert len(shared) == 6
    assert max(shared) <= SHARED_MEMORY_BYTES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [*CASES, (256, 128, 65_536, 0.07, torch.float32)], ids=str)
def test_on_a_gpu_the_kernel_is_chosen_and_equals_the_definition(case):
    from model.info_nce import _form_for
    from model.info_nce_triton import triton_sums

    device = torch.device("cuda", torch.cuda.current_device())
    assert _form_for(device, case[1]) is triton_sums
    require_equal_to_float64(case, device)
