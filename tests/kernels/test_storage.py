from __future__ import annotations

import pytest
import torch

from kernels.storage import CACHE_LINE, HUGE_PAGE, SHARED_BYTES, HugePages, empty_storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (2**19,), (700, 1000), (2, 3, 2**18 + 1)])
def test_storage_is_a_plain_contiguous_tensor_that_holds_what_is_written(shape, dtype):
    storage = empty_storage(*shape, dtype=dtype)
    assert storage.shape == shape
    assert storage.dtype is dtype
    assert storage.is_contiguous()
    values = torch.arange(storage.numel()).remainder(251).to(dtype).reshape(shape)
    storage.copy_(values)
    assert torch.equal(storage, values)


def test_large_storage_begins_on_a_huge_page():
    assert empty_storage(HUGE_PAGE // 4).data_ptr() % HUGE_PAGE == 0
    assert empty_storage(HUGE_PAGE // 2, dtype=torch.bfloat16).data_ptr() % HUGE_PAGE == 0


def test_tensors_that_share_huge_pages_do_not_overlap():
    pages = HugePages()
    shapes = [(3, 5), (SHARED_BYTES // 16,), (7,), (SHARED_BYTES // 4 + 1,), (SHARED_BYTES // 8,), (2, 2)]
    tensors = [pages.empty(*shape).fill_(number) for number, shape in enumerate(shapes)]
    for number, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True)):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % CACHE_LINE == 0
        assert bool((tensor == number).all())
