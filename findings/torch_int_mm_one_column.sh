#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch._int_mm(a, b.t(), out=out) with one inner column writes nothing into `out` and returns it;
# without `out` it returns fresh memory that nobody wrote. b.t() of b [n, 1] has strides (1, 1), and counts as contiguous
# already; the same values with strides (n, 1) are multiplied right, and so is b.t() with two inner columns.
#
# Output seen with torch 2.13.0+cpu on an Intel Xeon (family 6, model 207; AVX-512 VNNI, AMX):
#   2.13.0+cpu inner 1, b.t(): [[777, 777], [777, 777], [777, 777]]
#   2.13.0+cpu inner 1, b.t().contiguous(): [[777, 777], [777, 777], [777, 777]]
#   2.13.0+cpu inner 1, strides (2, 1): [[4, 5], [8, 10], [12, 15]]
#   2.13.0+cpu inner 2, b.t(): [[8, 10], [16, 20], [24, 30]]
#
# On processors without such instructions torch takes another way, which was not tried. Fails where it is no longer so.
# TORCH names another build of the same version, such as torch==2.13.0+cpu.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "${TORCH:-torch==2.13.0}" "numpy==2.2.6"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch

a, b = torch.tensor([[1], [2], [3]], dtype=torch.int8), torch.tensor([[4], [5]], dtype=torch.int8)


def product(a, right):
    return torch._int_mm(a, right, out=torch.full((3, 2), 777, dtype=torch.int32))


def show(what, values):
    print(torch.__version__, what + ":", values.tolist())
    return values


right = (a.long() @ b.long().t()).int()
for what, values in (("b.t()", b.t()), ("b.t().contiguous()", b.t().contiguous())):
    untouched = show("inner 1, " + what, product(a, values))
    assert (untouched == 777).all(), "torch writes this product now, or on this processor: the finding is out of date, or not for it"
assert torch.equal(show("inner 1, strides (2, 1)", product(a, torch.tensor([[4, 5]], dtype=torch.int8))), right)
assert torch.equal(show("inner 2, b.t()", product(a.repeat(1, 2), b.repeat(1, 2).t())), 2 * right)
PYTHON
