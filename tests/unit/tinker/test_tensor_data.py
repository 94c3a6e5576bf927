"""Tensors in the SDK's words, sparse ones against torch's CSR."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from agentlightning.tinker.types import TensorData

MATRIX = torch.tensor([[-1, -1, -1, -1, 7], [-1, -1, -1, -1, -1], [-1, 8, -1, 0, -1], [-1, -1, -1, -1, -1]])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_tensor_is_torchs_csr_and_comes_back_dense():
    sparse = TensorData.from_torch_sparse(MATRIX, pad_value=-1)
    csr = (MATRIX + 1).to_sparse_csr()
    assert sparse.sparse_crow_indices == csr.crow_indices().tolist()
    assert sparse.sparse_col_indices == csr.col_indices().tolist()
    assert (sparse.data, sparse.dtype, sparse.shape) == ((csr.values() - 1).tolist(), "int64", [4, 5])
    for one in (sparse, pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(one.to_torch(pad_value=-1), MATRIX)
        assert one.tolist(pad_value=-1) == MATRIX.tolist()
    assert torch.equal(sparse.to_torch(), csr.to_dense() - (csr.to_dense() != 0).long())


@pytest.mark.parametrize("tensor", [torch.arange(6).view(2, 3) + 1, torch.tensor([0, 0, 0, 0, 1])])
def test_what_would_not_be_smaller_stays_dense(tensor):
    dense = TensorData.from_torch_sparse(tensor)
    assert dense.sparse_crow_indices is None
    assert (dense.shape, dense.tolist()) == (list(tensor.shape), tensor.tolist())


@pytest.mark.parametrize(
    ("shape", "rows", "columns", "words"),
    [
        ([2, 3], [0, 1, 3], None, "expected flat data"),
        (None, [0, 1, 3], [0, 1, 2], "shape of two numbers"),
        ([6], [0, 1, 3], [0, 1, 2], "shape of two numbers"),
        ([2, 3], [0, 1], [0, 1, 2], "do not fit 3 values"),
        ([2, 3], [0, 1, 2], [0, 1, 2], "do not fit"),
        ([2, 3], [1, 1, 3], [0, 1, 2], "do not fit"),
        ([3, 3], [0, 3, 1, 3], [0, 1, 2], "do not fit"),
        ([2, 3], [0, 1, 3], [0, 1, 3], "do not fit"),
        ([2, 3], [0, 1, 3], [-1, 1, 2], "do not fit"),
        ([2, 3], [0, 1, 3], [0, 1], "do not fit"),
        ([2, 3], [0, 1, 3], [0, 2, 1], "do not rise"),
        ([2, 3], [0, 1, 3], [0, 2, 2], "do not rise"),
    ],
)
def test_sparse_indices_that_fit_nothing_are_refused(shape, rows, columns, words):
    with pytest.raises(ValueError, match=words):
        TensorData(np.array([1, 2, 3]), "int64", shape, rows, columns)
